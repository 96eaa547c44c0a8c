"""MLflow (``pip install mlflow``). MLFLOW_TRACKING_URI says where: a server, a database or a folder."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imgcap_jax.training.writers.contract import PROJECT, LoggedRun, Sample

_ID = "imgcap.id"  # the tag by which a resumed run is found
_LONGEST = 500  # characters of a parameter; MLflow's limit for all stores


@dataclass(frozen=True)
class Mlflow:
    """Each run is a run of the experiment MLFLOW_EXPERIMENT_NAME; a resumed run continues it."""

    def open(self, run: LoggedRun) -> "MlflowWriter":
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it reports each of seven attempts
        client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = client.search_runs([number], f"tags.`{_ID}` = '{run.id}'")
        if found:
            return MlflowWriter(client, found[0].info.run_id)
        tags = {_ID: run.id, "imgcap.folder": str(run.folder), **({"imgcap.group": run.group} if run.group else {})}
        new = client.create_run(number, tags=tags, run_name=run.name).info.run_id
        params = [Param(name, str(value)[:_LONGEST]) for name, value in run.settings.items()]
        for first in range(0, len(params), 100):  # MLflow's limit per call
            client.log_batch(new, params=params[first : first + 100])
        return MlflowWriter(client, new)


class MlflowWriter:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run = client, run_id
        client.set_terminated(run_id, status="RUNNING")

    def last_step(self, kind: str) -> int:
        return max((point.step for point in self._client.get_metric_history(self._run, f"{kind}/epoch")), default=-1)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_key(f"{kind}/{name}"), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def samples(self, step: int, samples: Sequence[Sample], pictures: Sequence[np.ndarray]) -> None:
        from PIL import Image

        lines = [f"{sample.file_name}: {sample.caption}" for sample in samples]
        self._client.log_text(self._run, "\n".join(lines) + "\n", f"captions/step_{step}.txt")
        for number, picture in enumerate(pictures, 1):
            self._client.log_image(self._run, Image.fromarray(picture), key=f"sample_{number}", step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _key(name: str) -> str:
    """A name with the characters that MLflow allows."""
    return "".join(one if one.isalnum() or one in "/_-. " else "_" for one in name)
