"""Trackio (``pip install trackio``): a local dashboard, or one on Hugging Face with TRACKIO_SPACE_ID."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imgcap_jax.training.writers.contract import PROJECT, LoggedRun, Sample


@dataclass(frozen=True)
class Trackio:
    """Each run is a run of the project. Trackio knows runs by their name, so the name contains the run's id."""

    project: str = PROJECT

    def open(self, run: LoggedRun) -> "TrackioWriter":
        import trackio

        found = trackio.init(
            self.project,
            name=f"{run.name}-{run.id[:6]}",
            group=run.group or None,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return TrackioWriter(found)


class TrackioWriter:
    def __init__(self, run: Any) -> None:
        self._run = run
        # Not public. Without it, the steps of earlier processes would be written twice.
        self._last = int(getattr(run, "_next_step", 0)) - 1

    def last_step(self, kind: str) -> int:
        return self._last

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def samples(self, step: int, samples: Sequence[Sample], pictures: Sequence[np.ndarray]) -> None:
        import trackio

        texts = (f"- {sample.caption} ({sample.file_name})" for sample in samples)
        found: dict[str, Any] = {"validation/captions": trackio.Markdown("\n".join(texts))}
        for number, (sample, picture) in enumerate(zip(samples, pictures, strict=bool(pictures)), 1):
            found[f"validation/sample_{number}"] = trackio.Image(picture, caption=sample.caption)
        self._run.log(found, step=step)

    def close(self) -> None:
        self._run.finish()
