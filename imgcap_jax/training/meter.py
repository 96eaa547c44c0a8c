"""The progress of training, the log of its metrics, and the check that the loss is finite."""

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.terminal import Work, duration
from imgcap_jax.training.checkpoints import Progress
from imgcap_jax.training.log import MetricsLog
from imgcap_jax.training.optimizer import LearningRate


class _Pending(NamedTuple):
    """Metrics that are not read yet, of ``steps`` steps from ``first`` on, and the learning rates of logged steps."""

    first: int
    steps: int
    metrics: Mapping[str, Array]
    rates: Mapping[int, Mapping[str, Array | np.ndarray]]


class Meter:
    """Logs the training metrics, and shows some of them with the speed, the time left and the best score.

    Metrics are read one call of the feed late. The device is then already computing the next steps and does not wait
    for the host.

    Attributes:
        losses: the loss of the first and of the latest step of this process; empty before the first step.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        log_steps: int,
        progress: Progress,
        log: MetricsLog,
        work: Work,
        shown: Mapping[str, str],
        learning_rate: LearningRate | None,
        *,
        judged: bool = True,
    ) -> None:
        """Starts the measurement.

        Args:
            total_steps: the number of steps of the whole run.
            steps_per_epoch: the number of steps per epoch.
            log_steps: metrics are logged every ``log_steps`` steps, and if ``flush`` says so.
            progress: where training starts or resumes.
            log: where metrics are written.
            work: shows the progress.
            shown: the metrics that the progress shows, and their formats.
            learning_rate: the learning rate as a function of the number of steps before; None if it is not known.
            judged: whether the best score is shown.
        """
        self.losses: tuple[float, ...] = ()
        self._total, self._epoch = total_steps, steps_per_epoch
        self._log_steps, self._log, self._work, self._formats = log_steps, log, work, shown
        self._learning_rate, self._judged = learning_rate, judged
        self._pending: _Pending | None = None
        self._first = progress.step
        self.restart(progress)

    def restart(self, progress: Progress) -> None:
        """Restarts the measurement of speed, after a compilation or a pause in training."""
        self._since, self._since_step, self._captions = time.perf_counter(), progress.step, 0.0
        self._best = progress.best

    def add(self, progress: Progress, metrics: Mapping[str, Array], steps: int = 1) -> None:
        """Stores the metrics of steps that were just started, and reads those of the steps before.

        Args:
            progress: after these steps.
            metrics: arrays [], or [K] of which the first ``steps`` are used.
            steps: the number of steps.

        Raises:
            UserError: the loss or the gradient norm of a step before is not finite.
        """
        self.flush()
        first = progress.step - steps + 1
        if first == self._first + 1:
            np.asarray(metrics["loss"])  # wait for the first call, whose time includes compilation
            self.restart(progress)
        logged = (step for step in range(first, progress.step + 1) if step % self._log_steps == 0)
        self._pending = _Pending(first, steps, metrics, {step: self._rate(step) for step in logged})

    def _rate(self, step: int) -> Mapping[str, Array | np.ndarray]:
        return {} if self._learning_rate is None else {"learning_rate": self._learning_rate(step - 1)}

    def flush(self, *, logged: bool = False) -> None:
        """Reads the pending metrics.

        Args:
            logged: whether to log the last step in any case, not only every ``log_steps`` steps.

        Raises:
            UserError: see ``add``.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        columns = {name: np.atleast_1d(np.asarray(value))[: pending.steps] for name, value in pending.metrics.items()}
        captions = columns.pop("captions")
        rows = [
            dict(zip(columns, row, strict=True)) for row in zip(*(of.tolist() for of in columns.values()), strict=True)
        ]
        for step, values in enumerate(rows, pending.first):
            self._check(step, values)
            self.losses = (*self.losses[:1], values["loss"])
        last = pending.first + pending.steps - 1
        seconds, steps = time.perf_counter() - self._since, last - self._since_step
        self._captions += float(captions.sum()) if steps else 0.0
        rate = self._captions / seconds if steps else math.nan
        rates = {**pending.rates, **({last: self._rate(last)} if logged else {})}
        for step, of_step in rates.items():
            values = rows[step - pending.first]
            values |= {name: float(np.asarray(value)) for name, value in of_step.items()}
            self._log.write("train", step, {**values, "captions_per_second": rate})
        self._work.update(last, self._parts(last, rows[-1], rate, seconds / steps if steps else math.nan))

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics and raises UserError if the loss or the gradient norm is not finite."""
        # The loss belongs to the parameters before the update. A gradient that is not finite spoils the update.
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            return
        rate = {name: float(np.asarray(value)) for name, value in self._rate(step).items()}
        self._log.write("train", step, {**values, **rate})
        intact = "; the best parameters so far are intact: --init-from starts from them"
        raise UserError(
            f"the loss is {values['loss']:.4g} at step {step} (gradient norm {values['gradient_norm']:.4g}): train "
            f"in another --run{', or delete the folder,' if self._best is None else ''} with a lower "
            f"--optimizer.learning-rate, a longer --optimizer.warmup-epochs or --training.dtype float32"
            f"{'' if self._best is None else intact}"
        )

    def _parts(self, step: int, values: Mapping[str, float], rate: float, seconds: float) -> list[str]:
        """What the progress shows, the most important first. seconds: per step."""
        first, *others = [f"{name} {values[name]:{form}}" for name, form in self._formats.items()] or [""]
        parts = [f"step {step:,}/{self._total:,}", first]
        if math.isfinite(seconds):
            parts.append(f"{duration((self._total - step) * seconds)} left")
        if self._best is not None and self._judged:
            parts.append(f"best CIDEr-D {100 * self._best:.1f}")
        if math.isfinite(seconds):
            parts.append(f"{rate:,.0f} captions/s")
        return [part for part in (*parts, *others, f"epoch {step / self._epoch:.2f}") if part]
