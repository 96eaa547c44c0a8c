"""What a run writes down while it trains: ``metrics.jsonl`` and TensorBoard events."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from imgcap_jax.files import write_text


class MetricsLog:
    """Appends metrics to ``metrics.jsonl`` (one JSON object a line) and to TensorBoard.

    Lines after ``resumed_step`` were written by a run that was killed past its last checkpoint. They are
    dropped, for the steps are about to be repeated.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= resumed_step]
            write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line: kind is "train" or "validation"."""
        # JSON has no NaN: a null says that the number was not finite.
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._events.close()


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a kill
