"""How long a study will take, from a few timed steps of each kind of run."""

import math
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imgcap_jax.ablation.runs import StudyRun
from imgcap_jax.errors import Terminated
from imgcap_jax.experiment import Experiment
from imgcap_jax.session import open_data
from imgcap_jax.terminal import Say
from imgcap_jax.train import train
from imgcap_jax.training.metrics_file import read_metrics
from imgcap_jax.training.optimizer import steps_of

_BATCHES = 4  # steps per epoch of the timed run, which has two epochs
_VALIDATION_IMAGES = 64


@dataclass(frozen=True)
class RunTime:
    """The time of a run.

    Attributes:
        steps: the number of steps. step_seconds: the time per step.
        validations: their number. validation_seconds: the time of one, with scoring.
        start_seconds: the rest: opening the data, making the model, compilation.
    """

    steps: int
    step_seconds: float
    validations: int
    validation_seconds: float
    start_seconds: float

    @property
    def seconds(self) -> float:
        """The time of the run, without features of a frozen encoder and without the last evaluation."""
        return self.steps * self.step_seconds + self.validations * self.validation_seconds + self.start_seconds


def time_runs(runs: Sequence[StudyRun], *, init_from: Path | None, show: Say) -> list[tuple[StudyRun, int, RunTime]]:
    """Times the first of those runs that differ only in their seed. Nothing is kept.

    Args:
        runs: the runs.
        init_from: another run, whose best parameters are the start.
        show: receives a line per timed run.

    Returns:
        The timed runs, each with the number of runs that it stands for.
    """
    seeds_of: dict[str, list[StudyRun]] = {}
    for run in runs:
        seeds_of.setdefault(run.settings[0].name, []).append(run)
    timed = []
    for number, (name, alike) in enumerate(seeds_of.items(), 1):
        show(f"timing a few steps of {name} ({number} of {len(seeds_of)})")
        timed.append((alike[0], len(alike), time_run(alike[0].experiment, init_from=init_from)))
    return timed


def time_run(experiment: Experiment, *, init_from: Path | None) -> RunTime:
    """Trains on the first images for a few steps, with the vocabulary of the whole dataset."""
    data, training = open_data(experiment, smoke=False), experiment.training
    steps_per_epoch = max(1, math.ceil(data.images_per_epoch / experiment.data.batch_size))
    steps = max(1, steps_of(training.epochs, steps_per_epoch))
    validation_images = len(data.validation)
    few = max(1, _BATCHES * experiment.data.batch_size // len(data.sources))
    validation = data.validation.first(_VALIDATION_IMAGES)
    part = replace(
        data,
        sources=[source.first(few) for source in data.sources],
        validation=validation,
        vocabulary_sources=data.sources,
    )
    short = replace(training, epochs=2.0, evaluate_epochs=1.0, patience=0, log_steps=1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        outcome = train(
            replace(experiment, training=short),
            run,
            cache=Path(folder) / "features",
            init_from=init_from,
            data=part,
            show=lambda line: None,
        )
        whole = time.perf_counter() - started
        records = read_metrics(run)
    if outcome.interrupted:
        raise Terminated if outcome.interrupted == signal.SIGTERM else KeyboardInterrupt
    last = [record for record in records if record["kind"] == "train"][-1]
    judged = [record for record in records if record["kind"] == "validation"][-1]
    captions = experiment.data.batch_size * experiment.data.captions_per_image
    step_seconds = captions / last["captions_per_second"]
    validation_seconds = judged["seconds"] - last["seconds"]
    return RunTime(
        steps,
        step_seconds,
        math.ceil(steps / max(1, steps_of(training.evaluate_epochs, steps_per_epoch))),
        validation_seconds * validation_images / len(validation),
        max(0.0, whole - 2 * _BATCHES * step_seconds - 2 * validation_seconds),
    )
