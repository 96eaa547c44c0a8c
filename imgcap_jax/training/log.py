"""The metrics of a run: ``metrics.jsonl``, TensorBoard, services. Captions of a few images: ``samples.jsonl``."""

import json
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from imgcap_jax.errors import UserError, printable, raise_error
from imgcap_jax.files import appending, disk_errors, read_json, reading, reason, write_text
from imgcap_jax.terminal import Say
from imgcap_jax.training.metrics_file import METRICS, parse_line
from imgcap_jax.training.writers.contract import LoggedRun, MetricsWriter, Sample, WriterSettings
from imgcap_jax.training.writers.tensorboard import TensorBoard
from imgcap_jax.training.writers.worker import Worker

SAMPLES = "samples.jsonl"
TENSORBOARD = "tensorboard"
LOG_ID = "log_id.json"  # by which services know a run; only with services
_CLOSING_SECONDS = 30.0  # in which services must take what is pending at the end

Draw = Callable[[], Sequence[np.ndarray]]
"""Draws the pictures of samples, uint8 [h,w,3] each. It is called in another thread."""


@dataclass(frozen=True)
class LogTo:
    """Where metrics go in addition to the run's folder.

    services: by the names that users give. group: the name of the population that the run belongs to.
    """

    services: Mapping[str, WriterSettings] = field(default_factory=dict)
    group: str = ""


class MetricsLog:
    """Appends metrics to ``metrics.jsonl`` (one JSON object per line), to TensorBoard and to services.

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
        to: LogTo = LogTo(),
        settings: Mapping[str, Any] | None = None,
        show: Say = print,
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
            to: the services, each of which is opened in a thread of its own.
            settings: those of the experiment, for the services.
            show: receives a note if a service fails. Training goes on without it.
        """
        self._epoch, self._began = steps_per_epoch, time.monotonic() - seconds
        self._writing, self._fail, self._show = writing, fail, show
        self._path = folder / METRICS
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()  # of other threads
        if not writing:
            return
        validated = resumed_step - validation_due
        self._metrics = _continued(folder / METRICS, {"train": resumed_step, "validation": validated})
        self._samples = _continued(folder / SAMPLES, {None: validated})
        self._events = TensorBoard(folder / TENSORBOARD, resumed_step)
        self._pictures: Worker[TensorBoard] | None = None
        self._services: list[_Service] = []
        if to.services:
            run = LoggedRun(folder, _log_id(folder / LOG_ID), to.group, settings or {})
            self._services = [
                _Service(name, service, run, self._lines, self._notes.put) for name, service in to.services.items()
            ]

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
            self._events.scalars(kind, step, finite)
        for service in self._services:
            service.scalars(kind, step, finite)
        self._show_notes()

    def write_samples(self, step: int, samples: Sequence[Sample], draw: Draw | None = None) -> None:
        """Writes captions of validation images, and in other threads their pictures, if they can be drawn."""
        if not self._writing:
            return
        with self._failing():
            _append(self._samples, {"step": step, "samples": [asdict(sample) for sample in samples]})
            self._events.captions(step, samples)
        drawn = _Once(draw, self._notes.put)
        if draw is not None:
            if self._pictures is None:
                self._pictures = Worker("pictures", lambda: self._events, self._pictures_failed)
            if not self._pictures.put(lambda events: events.pictures(step, drawn())):
                self._notes.put("TensorBoard lacks pictures of some validations: drawing them takes too long")
        named = [replace(one, file_name=printable(one.file_name), caption=printable(one.caption)) for one in samples]
        for service in self._services:
            service.samples(step, named, drawn)
        self._show_notes()

    def _pictures_failed(self, error: Exception) -> None:
        if isinstance(error, UserError):  # the disk is full
            self._fail(error)
        else:
            self._notes.put(f"TensorBoard gets no pictures: {reason(error)}")

    def _show_notes(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._show(f"note: {self._notes.get_nowait()}")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self._fail(error)

    def validation(self, step: int) -> dict[str, float] | None:
        """The line of the validation at a step, without kind and step; None if it was not logged."""
        for found in self._lines():
            if found["step"] == step and found.get("kind") == "validation":
                return {name: value for name, value in found.items() if name not in ("kind", "step")}
        return None

    def _lines(self) -> Iterator[dict[str, Any]]:
        for line in self._path.read_text(encoding="utf-8").split("\n"):
            yield parse_line(line)

    def close(self) -> None:
        """Flushes and closes the files, and waits a while for the services. Raises UserError if the disk is full."""
        if not self._writing:
            return
        until = time.monotonic() + _CLOSING_SECONDS
        for service in self._services:
            service.end()
        if self._pictures is not None:
            self._pictures.end()
            self._pictures.wait(until)
        with disk_errors(str(self._events.folder)):
            self._metrics.close()
            self._samples.close()
            self._events.close()
        for service in self._services:
            service.wait(until)
        self._show_notes()


class _Service:
    """A service that gets the metrics of a run in a thread of its own."""

    def __init__(
        self,
        name: str,
        settings: WriterSettings,
        run: LoggedRun,
        history: Callable[[], Iterable[Mapping[str, Any]]],
        note: Say,
    ) -> None:
        """Opens the service in the thread, and writes the metrics that it lacks.

        Args:
            name: as the user gave it.
            settings: opens the service.
            run: the run.
            history: reads the lines of metrics so far. It is called in the thread.
            note: receives lines for the user, also in the thread.
        """
        self._name, self._history, self._note = name, history, note
        self._had: dict[str, int] = {}  # kind -> the last step that the service had when it was opened
        self._last: dict[str, int] = {}  # kind -> the last step that it has
        self._is_late = False
        self._worker: Worker[MetricsWriter] = Worker(name, lambda: settings.open(run), self._failed)
        self._put(self._catch_up)

    def _put(self, job: Callable[[MetricsWriter], None]) -> None:
        """Gives the service a job. If too many wait, metrics are read from the file in their place."""
        if not self._worker.put(job, instead=self._catch_up) and not self._is_late:
            self._is_late = True
            self._note(f"{self._name} is late: it gets all metrics, but not the captions of every validation")

    def _catch_up(self, writer: MetricsWriter) -> None:
        """Writes the metrics that the service lacks."""
        if not self._had:
            self._had = {kind: writer.last_step(kind) for kind in ("train", "validation")}
            self._last = dict(self._had)
        for line in self._history():
            if line.get("kind") in ("train", "validation") and math.isfinite(line["step"]):
                values = {name: one for name, one in line.items() if name not in ("kind", "step") and one is not None}
                self._write(writer, line["kind"], line["step"], values)

    def _write(self, writer: MetricsWriter, kind: str, step: int, values: Mapping[str, float]) -> None:
        if step > self._last[kind]:
            writer.scalars(kind, step, values)
            self._last[kind] = step

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._put(lambda writer: self._write(writer, kind, step, values))

    def samples(self, step: int, samples: Sequence[Sample], drawn: Draw) -> None:
        def write(writer: MetricsWriter) -> None:
            if step > self._had["validation"]:
                writer.samples(step, samples, drawn())

        self._put(write)

    def end(self) -> None:
        """Closes the service after what is pending. Returns at once."""
        self._worker.end(lambda writer: writer.close())

    def wait(self, until: float) -> None:
        """Waits for the end until a time of ``time.monotonic``. A note says so if that is too soon."""
        if not self._worker.wait(until):
            self._note(
                f"{self._name} has not taken all metrics; {METRICS} has them, and the same command sends the rest"
            )

    def _failed(self, error: Exception) -> None:
        why = reason(error).rstrip(".")
        self._note(f"{self._name}: {why}; training continues without it, and {METRICS} has all metrics")


class _Once:
    """Draws pictures at the first call, in any thread. No pictures if that fails."""

    def __init__(self, draw: Draw | None, note: Say) -> None:
        self._draw, self._note, self._lock = draw, note, threading.Lock()
        self._drawn: Sequence[np.ndarray] | None = None if draw else ()

    def __call__(self) -> Sequence[np.ndarray]:
        with self._lock:
            if self._drawn is None:
                self._drawn = ()
                try:
                    self._drawn = self._draw() if self._draw is not None else ()
                except Exception as error:  # of a damaged image, or in the code of users
                    self._note(f"the captions of validation images are logged without pictures: {reason(error)}")
                self._draw = None  # frees what it reads
            return self._drawn


def _log_id(path: Path) -> str:
    """The id by which services know a run. It is made and stored if the run has none."""
    advice = "delete it; services then show another run"
    if not path.exists():
        write_text(path, json.dumps({"id": secrets.token_hex(8)}) + "\n")
    found = read_json(path, advice)
    with reading(path, advice):
        return str(found["id"])


def _continued(path: Path, last: Mapping[str | None, int]) -> TextIO:
    """Opens a file of JSON lines to append to it, without the lines of each kind after their last step."""
    with reading(path, "move it away"):
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")

            def is_kept(record: Mapping[str, Any]) -> bool:
                kind = record.get("kind")
                return bool(record["step"] <= last.get(kind if isinstance(kind, str) else None, -math.inf))

            kept = [line for line in text.split("\n") if is_kept(parse_line(line))]
            write_text(path, "".join(line + "\n" for line in kept))
        return appending(path)


def _append(file: TextIO, value: Mapping[str, Any]) -> None:
    with disk_errors(f"{file.name} (the last checkpoint is intact)"):
        file.write(json.dumps(value) + "\n")
        file.flush()
