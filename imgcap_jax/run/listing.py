"""What runs are in a folder, and how far they are. It reads small files only, and imports no JAX."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from imgcap_jax.errors import UserError
from imgcap_jax.files import DIGESTS, OWNER, is_locked, parse_json, reading, reason
from imgcap_jax.run.finder import CHECKPOINTS, EXPERIMENT, run_folders
from imgcap_jax.training.metrics_file import METRICS, parse_line

_PROGRESS = ("validated.json", "progress/metadata")  # in a checkpoint, the first one that exists counts
_TAIL = 1 << 16  # bytes of metrics.jsonl that are read; they have its last lines

Status = Literal["training", "finished", "interrupted", "failed", "no checkpoint", "damaged"]


@dataclass(frozen=True)
class RunSummary:
    """A run in a list.

    Attributes:
        folder: the run's folder.
        status: "training" if a process has locked the folder; "failed" if the loss of the last logged step was not
            finite; "no checkpoint" if there is none to resume from; "damaged" if a file cannot be read.
        step: the step of the newest checkpoint, or while training of the last logged metrics.
        epoch: the same in epochs. epochs: of the whole run. None: not known.
        best: the highest validation CIDEr-D, 0 to 10; None before the first validation.
        seconds: of training, with validations and compilations; None: not known.
        updated: the time of the last change, in seconds since 1970.
        size: bytes on disk.
        note: what is damaged; "" if nothing is.
    """

    folder: Path
    status: Status
    step: int | None
    epoch: float | None
    epochs: float | None
    best: float | None
    seconds: float | None
    updated: float
    size: int
    note: str = ""


def list_runs(folder: Path) -> Iterator[RunSummary]:
    """The runs in a folder and in all folders below it, in the order of ``run_folders``."""
    for path in run_folders(folder):
        yield summarise(path)


def summarise(folder: Path) -> RunSummary:
    """The state of a run. A file that cannot be read is noted."""
    notes: list[str] = []
    experiment = _read(folder / EXPERIMENT, notes)
    newest = _newest(folder)
    progress = None if newest is None else _progress(newest, notes)
    size, updated = _size(folder)
    live = is_locked(folder / OWNER)
    line, last = _last_lines(folder / METRICS)
    step = int(progress["step"]) if progress is not None else None
    epochs = _number(experiment, "training", "epochs")
    per_epoch = _steps_per_epoch(experiment, progress, line)
    misses, patience = _number(progress, "misses") or 0, _number(experiment, "training", "patience") or 0
    done = step is not None and (
        (per_epoch is not None and epochs is not None and step >= max(1, round(epochs * per_epoch)))
        or 0 < patience <= misses
    )
    status: Status = "interrupted"
    if live:
        status = "training"
        step = max(step or 0, int(line["step"])) if line else step
    elif notes:
        status = "damaged"
    elif done and progress is not None and not progress.get("validation_due"):
        status = "finished"
    elif last is not None and any(last.get(name, 0.0) is None for name in ("loss", "gradient_norm")):
        status = "failed"
        notes.append(f"the loss was not finite at step {last['step']}")
    elif progress is None:
        status = "no checkpoint"
    epoch = None if step is None or per_epoch is None else step / per_epoch
    return RunSummary(
        folder,
        status,
        step,
        epoch,
        epochs,
        _number(progress, "best"),
        _number(progress, "seconds"),
        updated,
        size,
        "; ".join(notes),
    )


def _read(path: Path, notes: list[str]) -> Mapping[str, Any] | None:
    """A JSON object; None, with a note, if it cannot be read."""
    try:
        with reading(path, "restore it"):
            found = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it is not a JSON object")
            return found
    except UserError as error:
        notes.append(f"{path.name}: {reason(error.__cause__ or error)}")
        return None


def _newest(folder: Path) -> Path | None:
    """The folder of the newest complete checkpoint: the one with the highest step that has its digests."""
    try:
        names = os.listdir(folder / CHECKPOINTS / "newest")
    except OSError:
        return None
    steps = sorted((int(name) for name in names if name.isdigit()), reverse=True)
    paths = (folder / CHECKPOINTS / "newest" / str(step) for step in steps)
    return next((path for path in paths if (path / DIGESTS).is_file()), None)


def _progress(checkpoint: Path, notes: list[str]) -> Mapping[str, Any] | None:
    """What the checkpoint says of the progress (``training.checkpoints.Progress``)."""
    path = next((checkpoint / name for name in _PROGRESS if (checkpoint / name).is_file()), checkpoint / _PROGRESS[-1])
    found = _read(path, notes)
    try:
        if found is not None and path.name == "metadata":  # Orbax keeps the JSON as a text
            found = json.loads(found["json"])
        if found is not None:
            int(found["step"])
        return found
    except (LookupError, TypeError, ValueError) as error:
        notes.append(f"checkpoint {checkpoint.name}: {reason(error)}")
        return None


def _number(found: Mapping[str, Any] | None, *names: str) -> float | None:
    """The finite number under these keys; None if there is none."""
    value: Any = found
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _steps_per_epoch(
    experiment: Mapping[str, Any] | None, progress: Mapping[str, Any] | None, line: Mapping[str, Any] | None
) -> float | None:
    """From the sizes of the datasets in a checkpoint, or else from a line of metrics."""
    batch = _number(experiment, "data", "batch_size")
    try:
        sources = progress["data"]["sources"] if progress is not None else []
        images = sum(max(1, round(weight * count)) for _, _, count, weight in sources)
        if images and batch:
            return float(max(1, math.ceil(images / batch)))
    except (LookupError, TypeError, ValueError):
        pass
    step, epoch = _number(line, "step"), _number(line, "epoch")
    return step / epoch if step and epoch else None


def _last_lines(path: Path) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The last line of metrics, and the last one of training.

    Only the end of the file is read: ``read_metrics`` would read megabytes per run, and --watch does so every two
    seconds.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return None, None
    last = None
    for text in reversed(lines):
        line = parse_line(text)
        if not math.isfinite(line["step"]):
            continue
        last = last or line
        if line.get("kind") == "train":
            return last, line
    return last, None


def _size(folder: Path) -> tuple[int, float]:
    """The bytes of a run's files, and the time of the last change of one of them."""
    size, updated = 0, 0.0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(path, name))
            except OSError:  # deleted meanwhile
                continue
            size += found.st_size
            if name != OWNER:
                updated = max(updated, found.st_mtime)
    return size, updated or time.time()
