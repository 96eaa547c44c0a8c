"""The metrics of a run: ``metrics.jsonl`` and TensorBoard events. Captions of a few images: ``samples.jsonl``."""

import html
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from imgcap_jax.errors import UserError, printable, raise_error
from imgcap_jax.files import appending, disk_errors, reading, write_text

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class Sample:
    """A validation image with its caption and its reference captions."""

    image_id: int
    file_name: str
    caption: str
    references: Sequence[str]


class MetricsLog:
    """Appends metrics to ``metrics.jsonl`` (one JSON object per line) and to TensorBoard.

    Each line has the step, the epoch and the seconds of training so far. Lines after ``resumed_step`` come from a run
    that was killed after its last checkpoint. They are dropped, because their steps are repeated.
    """

    def __init__(
        self,
        folder: Path,
        resumed_step: int,
        *,
        steps_per_epoch: int,
        seconds: float = 0.0,
        validation_due: bool = False,
        writing: bool = True,
        fail: Callable[[UserError], None] = raise_error,
    ) -> None:
        """Opens the files and starts the clock.

        Args:
            folder: the run's folder.
            resumed_step: lines of later steps are dropped.
            steps_per_epoch: the number of steps per epoch.
            seconds: the seconds of training before this process started.
            validation_due: whether lines of a validation of this step are dropped too.
            writing: whether anything is written. Only the first process writes.
            fail: receives the error if ``write`` or ``write_samples`` fails, because the disk is full.
        """
        self._epoch, self._began = steps_per_epoch, time.monotonic() - seconds
        self._writing, self._fail = writing, fail
        self._path = folder / METRICS
        if not writing:
            return
        validated = resumed_step - validation_due
        self._metrics = _continued(folder / METRICS, {"train": resumed_step, "validation": validated})
        self._samples = _continued(folder / SAMPLES, {None: validated})
        from tensorboardX import SummaryWriter  # imports PyTorch if it is installed, which takes a second

        self._events = SummaryWriter(str(folder / TENSORBOARD), purge_step=resumed_step + 1)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including compilations, validations and the runs that this one resumes."""
        return time.monotonic() - self._began

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line; kind is "train" or "validation"."""
        if not self._writing:
            return
        metrics = {"epoch": round(step / self._epoch, 4), "seconds": round(self.seconds, 2), **metrics}
        # JSON has no NaN; null means that the number was not finite.
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # TensorBoard warns otherwise
        with self._failing():
            _append(self._metrics, {"kind": kind, "step": step, **values})
            with disk_errors(self._events.logdir):
                for name, value in finite.items():
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes captions of validation images."""
        if not self._writing:
            return
        with self._failing():
            _append(self._samples, {"step": step, "samples": [asdict(sample) for sample in samples]})
            with disk_errors(self._events.logdir):
                self._events.add_text("validation/captions", "\n\n".join(map(_markdown, samples)), step)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self._fail(error)

    def validation(self, step: int) -> dict[str, float] | None:
        """The line of the validation at a step, without kind and step; None if it was not logged."""
        for line in self._path.read_text(encoding="utf-8").split("\n"):
            found = _record(line)
            if found["step"] == step and found.get("kind") == "validation":
                return {name: value for name, value in found.items() if name not in ("kind", "step")}
        return None

    def close(self) -> None:
        """Flushes and closes the files. Raises UserError if the disk is full."""
        if not self._writing:
            return
        with disk_errors(self._events.logdir):
            self._metrics.close()
            self._samples.close()
            self._events.close()


def _continued(path: Path, last: Mapping[str | None, int]) -> TextIO:
    """Opens a file of JSON lines to append to it, without the lines of each kind after their last step."""
    with reading(path, "move it away"):
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")

            def is_kept(record: Mapping[str, Any]) -> bool:
                kind = record.get("kind")
                return bool(record["step"] <= last.get(kind if isinstance(kind, str) else None, -math.inf))

            kept = [line for line in text.split("\n") if is_kept(_record(line))]
            write_text(path, "".join(line + "\n" for line in kept))
        return appending(path)


def _append(file: TextIO, value: Mapping[str, Any]) -> None:
    with disk_errors(f"{file.name} (the last checkpoint is intact)"):
        file.write(json.dumps(value) + "\n")
        file.flush()


def _markdown(sample: Sample) -> str:
    """The sample as TensorBoard's Markdown, in which a list needs an empty line before it."""
    references = "\n".join(f"* {_plain(reference)}" for reference in sample.references)
    return f"**{_plain(sample.caption)}** ({_plain(sample.file_name)})\n\n{references}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: ``<unk>`` would vanish as an HTML tag."""
    return re.sub(r"[\\`*_{}\[\]#]", r"\\\g<0>", html.escape(printable(text), quote=False))


def _record(line: str) -> dict[str, Any]:
    """The values of a line. Of an incomplete line, which a killed run leaves, only an infinite step."""
    try:
        record = json.loads(line)
        return {**record, "step": int(record["step"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {"step": math.inf}
