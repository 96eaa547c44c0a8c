"""What training shows and logs of its metrics."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.terminal import Work
from imgcap_jax.training.checkpoints import Progress
from imgcap_jax.training.meter import Meter


class Log:
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, Mapping[str, float]]] = []

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        assert kind == "train"
        self.lines.append((step, dict(metrics)))


class OnDevice:
    """A number on a device, which records that it is read."""

    def __init__(self, value: float) -> None:
        self.value, self.read = value, False

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.read = True
        return np.array(self.value, dtype or np.float32)


def metrics(loss: float = 2.5) -> dict[str, Any]:
    numbers = {"loss": loss, "perplexity": 12.0, "gradient_norm": 1.0, "captions": 64.0}
    return {name: OnDevice(value) for name, value in numbers.items()}


def make(log: Log, work: Work, progress: Progress, **options: Any) -> Meter:
    shown = {"loss": ".3f", "perplexity": ".2f"}
    return Meter(1000, 10, 2, progress, log, work, shown, rate, **options)  # type: ignore[arg-type]


def rate(step: int) -> np.ndarray:
    return np.array((step + 1) / 10, np.float32)


@pytest.fixture
def work() -> Work:
    return Work("", 1000, "steps", 0, print)


def test_metrics_are_read_one_step_late_so_that_the_device_never_waits(work: Work) -> None:
    meter = make(Log(), work, Progress(0, None))
    steps = [metrics() for _ in range(4)]
    for step, values in enumerate(steps, 1):
        meter.add(Progress(step, None), values)
        if step > 1:  # the first step is waited for, because it includes the compilation
            assert not any(value.read for value in values.values())
            assert all(value.read for value in steps[step - 2].values())


def test_log_has_the_learning_rate_of_each_step(work: Work) -> None:
    log = Log()
    meter = make(log, work, Progress(0, None))
    for step in range(1, 5):
        meter.add(Progress(step, None), metrics(loss=5.0 - step))
    meter.flush()
    assert [(step, round(values["learning_rate"], 6)) for step, values in log.lines] == [(2, 0.2), (4, 0.4)]
    assert meter.losses == (4.0, 1.0)


def test_progress_shows_the_most_important_first(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = make(Log(), work, Progress(100, None, best=0.451))
    meter.add(Progress(101, None, best=0.451), metrics())
    meter.flush()
    assert work.parts() == [
        "step 101/1,000",
        "loss 2.500",
        "best CIDEr-D 45.1",
        "perplexity 12.00",
        "epoch 10.10",
    ]
    clock[0] += 0.5
    meter.add(Progress(102, None, best=0.451), metrics())
    meter.flush()
    assert work.parts() == [
        "step 102/1,000",
        "loss 2.500",
        "7:29 left",
        "best CIDEr-D 45.1",
        "128 captions/s",
        "perplexity 12.00",
        "epoch 10.20",
    ]
    smoke = make(Log(), work, Progress(0, None, best=0.0), judged=False)
    smoke.add(Progress(1, None, best=0.0), metrics())
    smoke.flush()
    assert not any("best" in part for part in work.parts())


def test_loss_that_is_not_finite_ends_training(work: Work) -> None:
    log = Log()
    meter = make(log, work, Progress(0, None))
    meter.add(Progress(1, None), metrics(loss=float("nan")))
    with pytest.raises(UserError, match=r"the loss is nan at step 1 .*learning-rate"):
        meter.flush()
    ((step, values),) = log.lines
    assert step == 1
    assert values.keys() == {"loss", "perplexity", "gradient_norm", "learning_rate"}
    assert round(values["learning_rate"], 6) == 0.1


@pytest.mark.parametrize("best", [None, 0.4])
def test_error_of_the_loss_names_earlier_parameters_only_if_there_are_any(best: float | None, work: Work) -> None:
    meter = make(Log(), work, Progress(0, None, best=best))
    meter.add(Progress(1, None, best=best), {**metrics(loss=3556784209920.0), "gradient_norm": float("inf")})
    with pytest.raises(UserError, match=r"the loss is 3.557e\+12 at step 1 \(gradient norm inf\)") as error:
        meter.flush()
    assert ("--init-from" in str(error.value)) == (best is not None)
    assert ("delete the folder" in str(error.value)) == (best is None)


def test_metrics_of_a_validated_step_are_logged(work: Work) -> None:
    log = Log()
    meter = make(log, work, Progress(0, None))
    meter.add(Progress(1, None), metrics())
    meter.flush(logged=True)
    meter.flush(logged=True)
    ((step, values),) = log.lines
    assert step == 1
    assert round(values["learning_rate"], 6) == 0.1
