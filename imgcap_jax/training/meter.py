"""The progress of training, the log of its metrics, and the check that the loss is finite."""

import math
import time
from collections.abc import Mapping

import numpy as np
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.terminal import Work, duration
from imgcap_jax.training.checkpoints import Progress
from imgcap_jax.training.log import MetricsLog
from imgcap_jax.training.optimizer import LearningRate


class Meter:
    """Logs the training metrics, and shows some of them with the speed, the time left and the best score.

    Metrics are read one step late. The device is then already computing the next step and does not wait for the host.

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
        self._pending: tuple[int, Mapping[str, Array | np.ndarray]] | None = None
        self._first = progress.step
        self.restart(progress)

    def restart(self, progress: Progress) -> None:
        """Restarts the measurement of speed, after a compilation or a pause in training."""
        self._since, self._since_step, self._captions = time.perf_counter(), progress.step, 0.0
        self._best = progress.best

    def add(self, progress: Progress, metrics: Mapping[str, Array]) -> None:
        """Stores the metrics of a step that was just started, and reads those of the previous step.

        Raises:
            UserError: the loss or the gradient norm of the previous step is not finite.
        """
        self.flush()
        if progress.step == self._first + 1:
            np.asarray(metrics["loss"])  # wait for the first step, whose time includes compilation
            self.restart(progress)
        logged = progress.step % self._log_steps == 0
        self._pending = (progress.step, {**metrics, **(self._rate(progress.step) if logged else {})})

    def _rate(self, step: int) -> dict[str, Array | np.ndarray]:
        return {} if self._learning_rate is None else {"learning_rate": self._learning_rate(step - 1)}

    def flush(self, *, logged: bool = False) -> None:
        """Reads the pending metrics.

        Args:
            logged: whether to log them at any step, not only every ``log_steps`` steps.

        Raises:
            UserError: see ``add``.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        captions = values.pop("captions")
        # The loss belongs to the parameters before the update. A gradient that is not finite spoils the update.
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            now = {name: float(np.asarray(value)) for name, value in self._rate(step).items()}
            self._log.write("train", step, {**values, **now})
            intact = "; the best parameters so far are intact: --init-from starts from them"
            raise UserError(
                f"the loss is {values['loss']:.4g} at step {step} (gradient norm {values['gradient_norm']:.4g}): train "
                f"in another --run{', or delete the folder,' if self._best is None else ''} with a lower "
                f"--optimizer.learning-rate, a longer --optimizer.warmup-epochs or --training.dtype float32"
                f"{'' if self._best is None else intact}"
            )
        self.losses = (*self.losses[:1], values["loss"])
        seconds = time.perf_counter() - self._since
        steps = step - self._since_step
        self._captions += captions if steps else 0.0
        rate = self._captions / seconds if steps else math.nan
        if logged or step % self._log_steps == 0:
            values |= {name: float(np.asarray(value)) for name, value in self._rate(step).items()}
            self._log.write("train", step, {**values, "captions_per_second": rate})
        self._work.update(step, self._parts(step, values, rate, seconds / steps if steps else math.nan))

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
