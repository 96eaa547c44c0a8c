"""The progress line, and the check that the loss is finite."""

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.training.log import MetricsLog

LINE_SECONDS = 10.0


class Meter:
    """Logs the training metrics, and shows a progress line with some of them, the speed and the time left.

    Metrics are read one step late. The device is then already computing the next step and does not wait for the host.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        log_steps: int,
        first_step: int,
        log: MetricsLog,
        show: Callable[[str], None],
        line: Mapping[str, str],
    ) -> None:
        """Starts the measurement.

        Args:
            total_steps: the number of steps of the whole run.
            steps_per_epoch: the number of steps per epoch.
            log_steps: metrics are logged every ``log_steps`` steps.
            first_step: the number of steps done before this process started.
            log: where metrics are written.
            show: receives each progress line.
            line: the metrics that the progress line shows, and their formats.
        """
        self._total, self._epoch = total_steps, steps_per_epoch
        self._log_steps, self._log, self._show, self._line = log_steps, log, show, line
        self._pending: tuple[int, Mapping[str, Array]] | None = None
        self._shown = 0.0
        self._first = first_step
        self.restart(first_step)

    def restart(self, step: int) -> None:
        """Restarts the measurement of speed, after a compilation or a pause in training."""
        self._since, self._since_step, self._captions = time.perf_counter(), step, 0.0

    def add(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Stores the metrics of a step that was just started, and reads those of the previous step.

        Raises:
            UserError: the loss or the gradient norm of the previous step is not finite.
        """
        self.flush()
        if step == self._first + 1:
            np.asarray(metrics["loss"])  # wait for the first step, whose time includes compilation
            self.restart(step)
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads the pending metrics.

        Raises:
            UserError: see ``add``.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        # The loss belongs to the parameters before the update. A gradient that is not finite spoils the update.
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            self._log.write("train", step, values)
            raise UserError(
                f"the loss is {values['loss']} at step {step} (gradient norm {values['gradient_norm']}): train in "
                f"another --run with a lower --optimizer.learning-rate, a longer --optimizer.warmup-epochs or "
                f"--training.dtype float32; earlier checkpoints are intact (--init-from starts from the best one)"
            )
        seconds = time.perf_counter() - self._since
        captions = values.pop("captions")
        steps = step - self._since_step
        self._captions += captions if steps else 0.0
        rate = self._captions / seconds if steps else math.nan
        if step % self._log_steps == 0:
            self._log.write("train", step, {**values, "captions_per_second": rate})
        now = time.monotonic()
        if now - self._shown >= LINE_SECONDS:
            self._shown = now
            left = (self._total - step) * seconds / steps if steps else math.nan
            said = "  ".join(f"{name} {values[name]:{form}}" for name, form in self._line.items())
            self._show(
                f"step {step}/{self._total}  epoch {step / self._epoch:.2f}  {said}  "
                f"{_speed(rate)}  {_duration(left)} left"
            )


def _speed(rate: float) -> str:
    return f"{rate:.0f} captions/s" if math.isfinite(rate) else "- captions/s"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
