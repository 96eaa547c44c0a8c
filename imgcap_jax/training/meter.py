"""The progress line, and the check that the loss is a number."""

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.training.log import MetricsLog

LINE_SECONDS = 10.0


class Meter:
    """Logs training metrics and shows some of them, captions/s and the time left.

    Metrics are read one step late: the device is then already busy with the next step, so that reading them
    keeps nobody waiting.
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
        """``line``: the metrics that the progress line shows, and their formats."""
        self._total, self._epoch = total_steps, steps_per_epoch
        self._log_steps, self._log, self._show, self._line = log_steps, log, show, line
        self._pending: tuple[int, Mapping[str, Array]] | None = None
        self._shown = 0.0
        self._first = first_step
        self.restart(first_step)

    def restart(self, step: int) -> None:
        """Begins the measurement of speed anew, after a pause that is not training (or a compilation)."""
        self._since, self._since_step, self._captions = time.perf_counter(), step, 0.0

    def add(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Takes the metrics of a step that was just started, and reads those of the one before.

        Raises:
            UserError: the loss of the step before is not finite.
        """
        self.flush()
        if step == self._first + 1:
            np.asarray(metrics["loss"])  # the first step compiles, which is not its speed
            self.restart(step)
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads what is pending. Raises UserError as ``add``."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        # The loss is of the parameters before the update, which a gradient that is not finite has spoilt.
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            self._log.write("train", step, values)
            raise UserError(
                f"the loss is {values['loss']} at step {step} (gradient norm {values['gradient_norm']}): try a "
                f"lower --optimizer.learning-rate, a longer --optimizer.warmup-epochs, or --training.dtype float32, "
                f"in another --run; the checkpoint before it is intact (--init-from starts from the best)"
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
