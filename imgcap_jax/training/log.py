"""The metrics of a run: ``metrics.jsonl`` and TensorBoard events."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from imgcap_jax.files import appending, disk_errors, reading, write_text

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsLog:
    """Appends metrics to ``metrics.jsonl`` (one JSON object per line) and to TensorBoard.

    Lines after ``resumed_step`` come from a run that was killed after its last checkpoint. They are dropped, because
    their steps are repeated.
    """

    def __init__(self, folder: Path, resumed_step: int, *, writing: bool = True) -> None:
        """Opens both. If ``writing`` is False, nothing is written. Only the first process writes."""
        self._writing = writing
        self._path = path = folder / METRICS
        if not writing:
            return
        with reading(path, "move it away"):
            if path.exists():
                text = path.read_text(encoding="utf-8", errors="replace")
                kept = [line for line in text.split("\n") if _step(line) <= resumed_step]
                write_text(path, "".join(line + "\n" for line in kept))
            self._file = appending(path)
        self._events = SummaryWriter(str(folder / TENSORBOARD), purge_step=resumed_step + 1)

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line; kind is "train" or "validation". Raises UserError if the disk is full."""
        if not self._writing:
            return
        # JSON has no NaN; null means that the number was not finite.
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with disk_errors(f"{self._file.name} (the last checkpoint is intact)"):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # TensorBoard warns otherwise
        for name, value in finite.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def validation(self, step: int) -> dict[str, float] | None:
        """The scores of the validation at a step; None if they were not logged."""
        for line in self._path.read_text(encoding="utf-8").split("\n"):
            if _step(line) == step and (found := json.loads(line)).get("kind") == "validation":
                return {name: value for name, value in found.items() if name not in ("kind", "step")}
        return None

    def close(self) -> None:
        """Flushes and closes both."""
        if not self._writing:
            return
        self._file.close()
        self._events.close()


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # an incomplete line of a killed run
