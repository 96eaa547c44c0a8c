"""Weights & Biases (``pip install wandb``), with its environment variables: WANDB_MODE, WANDB_PROJECT, WANDB_DIR."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imgcap_jax.training.writers.contract import PROJECT, LoggedRun, Sample


@dataclass(frozen=True)
class Wandb:
    """Each run is a run of the project; a resumed run continues it."""

    def open(self, run: LoggedRun) -> "WandbWriter":
        import wandb

        offline = os.environ.get("WANDB_MODE", "online") != "online"
        # wandb.init would ask for a key on a terminal, in the middle of training.
        if not offline and not wandb.login(prompt=False):
            raise RuntimeError("not logged in; run wandb login, or set WANDB_MODE=offline")
        found = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            group=run.group or None,
            config=dict(run.settings),
            resume=None if offline else "allow",  # an offline run has the whole curve, and cannot see earlier ones
            reinit="create_new",  # the members of a population are open at once
            settings=wandb.Settings(silent=True, console="off"),
        )
        return WandbWriter(found)


class WandbWriter:
    def __init__(self, run: Any) -> None:
        self._run = run

    def last_step(self, kind: str) -> int:
        return int(self._run.starting_step) - 1

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def samples(self, step: int, samples: Sequence[Sample], pictures: Sequence[np.ndarray]) -> None:
        import wandb

        rows = [[sample.file_name, sample.caption, "\n".join(sample.references)] for sample in samples]
        found: dict[str, Any] = {"validation/captions": wandb.Table(["file", "caption", "references"], rows)}
        for number, (sample, picture) in enumerate(zip(samples, pictures, strict=bool(pictures)), 1):
            found[f"validation/sample_{number}"] = wandb.Image(picture, caption=sample.caption)
        self._run.log(found, step=step)

    def close(self) -> None:
        self._run.finish()
