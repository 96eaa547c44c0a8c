"""Checkpoints with Orbax: the newest, to resume from, and the best, to caption with."""

import json
import logging
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from imgcap_jax.errors import UserError
from imgcap_jax.files import add_digests, damages, disk_errors, read_digests, reason, write_digests, write_text
from imgcap_jax.remote import shown, url_of
from imgcap_jax.terminal import Say
from imgcap_jax.training.background import BackgroundJobs
from imgcap_jax.training.orbax_files import Writer, placed_as, quiet_orbax, read_arrays, read_progress, snapshot
from imgcap_jax.training.parameter_file import PARAMETERS, read_parameters

CHECKPOINTS = "checkpoints"  # folder in a run's folder
DAMAGED = "damaged"  # folder in it, of damaged checkpoints that were moved aside
_PATTERN = re.compile(r"[\[\]*?\\]")  # characters that make a path a pattern
_KEPT = 2  # checkpoints: if the newest is damaged, the one before it remains
_NO_DIGESTS = "its digests are missing"  # it is incomplete, or was written by an older version
_VALIDATED = "validated.json"  # in a checkpoint: its progress, after a validation that was due when it was written


@dataclass(frozen=True)
class Progress:
    """What a resumed run needs in addition to the state.

    step: the number of steps done. data: the state of the data iterator after the batch of that step.
    best: the highest validation CIDEr-D so far; None before the first validation. best_step: the step of the best
    parameters. best_ties: their BLEU-4 and negative teacher-forced loss, which decide between equal CIDEr-D.
    misses: the number of validations since the last better one. seconds: those of training so far.
    validation_due: whether the validation of this step is not finished; the other values are those before it.
    """

    step: int
    data: Any
    best: float | None = None
    best_step: int | None = None
    best_ties: tuple[float, ...] = ()
    misses: int = 0
    seconds: float = 0.0
    validation_due: bool = False

    @classmethod
    def parse(cls, text: str) -> "Progress":
        """The progress from JSON, also from that of older versions, which have fewer fields."""
        progress = cls(**json.loads(text))
        return replace(progress, best_ties=tuple(progress.best_ties))


class Checkpoints:
    """``newest``, ``best`` and ``start`` in ``<run>/checkpoints``. ``start`` contains the initial parameters, for a KL
    penalty.

    Saving copies the state into host memory. A thread then writes it, while training goes on. Orbax writes into a
    temporary folder and renames it. The digests of its files, which follow, complete a checkpoint. If the process is
    killed, the checkpoint before remains: the two latest of ``newest`` and of ``best`` are kept. One thread writes both
    kinds in order, so that ``newest`` never refers to best parameters that are not on disk. (Orbax's own asynchronous
    saves promise no order between two folders, and write no digests.)

    The state is replicated, so one process writes for all, and any number of processes and devices can read.
    """

    def __init__(self, run: Path, *, writing: bool = False) -> None:
        """Opens the checkpoints of a run.

        Args:
            run: the run's folder.
            writing: whether this process saves. Only one process may: the first one of those that train the run.
        """
        self.folder = run.absolute() / CHECKPOINTS
        self._writing = writing
        self._link: Path | None = None
        self._writers: dict[str, Writer] = {}
        self._intact = set[tuple[str, int]]()  # checked by this process
        self._jobs = BackgroundJobs("checkpoints")
        self._saved = {kind: latest_step(self.folder / kind) for kind in ("newest", "best")}

    @property
    def step(self) -> int | None:
        """Step of the newest checkpoint, which may still be on its way to the disk; None if there is none."""
        return self._saved["newest"]

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint, which may still be on its way to the disk; None if there is none."""
        return self._saved["best"]

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last save was on disk; 0 while one is being written, or if this process writes none."""
        return self._jobs.idle_seconds if self._writing else 0.0

    def recover(
        self,
        say: Say,
        share: Callable[[int], int] = lambda number: number,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> int | None:
        """Finds the checkpoint to resume from: the newest one, or if it is damaged or incomplete, the one before it.

        The writing process deletes incomplete ones and moves damaged ones aside. Their steps are repeated, so that the
        run ends as one that was not interrupted.

        Args:
            say: receives a warning if a checkpoint is not used.
            share: returns to all processes the number that the first one passes.
            together: a context that raises the error of one process on all of them.

        Returns:
            Its step, the same on all processes; None: there is none.

        Raises:
            UserError: no checkpoint is intact, or the best one is damaged.
        """
        with together():
            step = self._recover(say) if self._writing else None
        step = share(-1 if step is None else step)
        self._saved["newest"] = None if step < 0 else step
        self._saved["best"] = latest_step(self.folder / "best")
        return self.step

    def _recover(self, say: Say) -> int | None:
        folder = self.folder / "newest"
        steps = _steps(folder)
        if not steps:
            return None
        newest, problems = steps[-1], dict[int, str]()
        for step in reversed(steps):
            what = self._damage("newest", step)
            if not what:
                break
            problems[step] = what
        else:
            damaged = next((step for step, what in problems.items() if what != _NO_DIGESTS), None)
            if damaged is not None:
                raise self._damaged("newest", damaged, problems[damaged])
            step, problems = newest, {}  # checkpoints of older versions can lack digests
        for later, what in problems.items():
            kept = self._remove("newest", later, what)
            name = shown(folder / str(later))
            say(f"note: the checkpoint {name} is damaged ({what}{kept}); continuing from step {step}")
        self._forget_later_best(self._progress(step))
        best = latest_step(self.folder / "best")
        if best is not None:
            self._check("best", best)  # which could remain the best one until the end
        return step

    def _remove(self, kind: str, step: int, what: str) -> str:
        """Deletes an incomplete checkpoint, or moves a damaged one aside. Returns what to add to its problem."""
        folder = self.folder / kind / str(step)
        with disk_errors(str(folder)):
            if what == _NO_DIGESTS:  # a save that was killed
                shutil.rmtree(folder)
                return ""
            self._intact.discard((kind, step))
            (self.folder / DAMAGED).mkdir(exist_ok=True)
            number = 1
            while (aside := self.folder / DAMAGED / f"{kind}_{step}_{number}").exists():
                number += 1
            folder.rename(aside)
        return f"; it is kept in {aside}"

    def _forget_later_best(self, progress: Progress) -> None:
        """Deletes best parameters of validations that are repeated."""
        steps = _steps(self.folder / "best")
        if progress.best_step is None or progress.best_step in steps:
            for step in steps:
                if progress.best_step is None or step > progress.best_step:
                    shutil.rmtree(self.folder / "best" / str(step))

    def save(self, state: Any, progress: Progress) -> None:
        """Copies the training state, and begins to write it. Waits for the save before, if it is not on disk yet.

        After a failed save nothing is written, and ``check`` raises the error. Earlier checkpoints are kept.
        """
        if progress.step == self.step:
            return
        self._saved["newest"] = progress.step
        if self._writing:
            self._jobs.drain("newest")  # before another copy takes memory
            self._write("newest", progress.step, snapshot(state), json.dumps(asdict(progress)))

    def save_validated(self, progress: Progress) -> None:
        """Adds the result of a validation to the checkpoint of its step. See ``save``."""
        if self._writing:
            folder = self.folder / "newest" / str(progress.step)
            text = json.dumps(asdict(replace(progress, validation_due=False))) + "\n"

            def write() -> None:
                with _saving(self.folder):
                    write_text(folder / _VALIDATED, text)
                    add_digests(folder, [_VALIDATED])

            self._jobs.start("validated", write)

    def save_best(self, step: int, params: Any) -> None:
        """Saves these parameters as the best, in place of those of later steps. See ``save``."""
        self._saved["best"] = step
        if self._writing:
            self._jobs.drain("best")
            self._write("best", step, snapshot(params))

    @property
    def failed(self) -> bool:
        """Whether a save has failed."""
        return self._jobs.failed

    def fail(self, error: UserError) -> None:
        """After an error of other files of the run, nothing is saved, and ``check`` raises it."""
        self._jobs.fail(error)

    def check(self) -> None:
        """Raises UserError if a save has failed, because the disk is full or failing. Returns at once."""
        self._jobs.check()

    def wait(self) -> None:
        """Waits until everything is on disk. Raises as ``check`` does."""
        self._jobs.wait()

    def drain(self) -> BaseException | None:
        """Waits, in any thread, until everything is on disk. Returns the error of a save, and raises none."""
        return self._jobs.drain()

    def keep_start(self, params: Any) -> None:
        """Saves the initial parameters, and waits until they are on disk. If that fails, ``check`` raises the error.

        Those of a run that was killed before its first checkpoint are replaced.
        """
        if self._writing:
            self._write("start", 0, snapshot(params))
            self._jobs.drain("start")

    def restore_start(self, template: Any) -> Any:
        """The parameters that ``keep_start`` saved, placed as ``template`` is.

        Raises:
            UserError: they are missing or damaged, or do not fit the experiment.
        """
        if latest_step(self.folder / "start") is None:
            raise UserError(
                f"{shown(self.folder / 'start')} (the parameters that training started from) is missing; "
                f"train again in another --run"
            )
        return self._read("start", 0, template)

    def restore(self, template: Any) -> tuple[Any, Progress]:
        """The newest state, placed as ``template`` is, and its progress.

        Raises:
            UserError: the checkpoint is damaged or does not fit the experiment.
        """
        self.wait()
        step = self.step
        assert step is not None
        state = self._read("newest", step, template)
        progress = self._progress(step)
        self._complete("newest", step)
        return state, progress

    def restore_best(self, template: Any, step: int | None = None) -> Any:
        """The best parameters, placed as ``template`` is.

        Args:
            template: the shapes and the placement.
            step: that of the parameters, one of the two latest that are kept; None: the latest.

        Raises:
            UserError: there are none yet, they are damaged, or they do not fit the experiment.
        """
        self.wait()
        step = self.best_step if step is None else step
        if step is None:
            raise UserError(
                f"{shown(self.folder.parent)} has no best parameters, because no validation is finished or "
                f"{shown(self.folder)} has lost them; give its training command again"
            )
        return self._read("best", step, template)

    def close(self) -> None:
        """Waits until everything is on disk, and stops the threads. Raises as ``check`` does."""
        try:
            self.wait()
        finally:
            self._jobs.close()
            for writer in self._writers.values():
                writer.close()

    def _path(self, kind: str) -> Path:
        """The folder of a kind of checkpoint, under a name that Orbax can read.

        Orbax and TensorStore expand patterns in paths: below a folder called ``a[1]`` they find nothing. There, the
        folder gets another path by a temporary symbolic link.
        """
        if _PATTERN.search(str(self.folder)) is None:
            return self.folder / kind
        if self._link is None:
            if self._writing:
                self.folder.mkdir(parents=True, exist_ok=True)
            place = Path(tempfile.mkdtemp(prefix="imgcap_"))
            weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            if _PATTERN.search(str(place)) is not None:
                raise UserError(f"{place.parent}: the folder of temporary files contains one of [ ] * ? \\; set TMPDIR")
            self._link = place / CHECKPOINTS
            self._link.symlink_to(self.folder, target_is_directory=True)
        return self._link / kind

    def _write(self, kind: str, step: int, arrays: dict[str, np.ndarray], progress: str | None = None) -> None:
        """Begins to write a checkpoint, and the digests of its files."""
        path = self._path(kind)

        def write() -> None:
            with _saving(self.folder):
                if kind not in self._writers:
                    self._writers[kind] = Writer(path, kept=_KEPT)
                writer = self._writers[kind]
                writer.delete_from(step)
                writer.write(step, arrays, progress)
                write_digests(self.folder / kind / str(step))

        self._jobs.start(kind, write)

    def _read(self, kind: str, step: int, template: Any) -> Any:
        """The arrays of a checkpoint, placed as ``template`` is."""
        self._check(kind, step)
        with self._explaining(kind, step):
            return read_arrays(self._path(kind) / str(step), template)

    def _progress(self, step: int) -> Progress:
        """The progress of a checkpoint of ``newest``."""
        folder = self.folder / "newest" / str(step)
        with self._explaining("newest", step):
            if _VALIDATED in (read_digests(folder) or {}):
                return Progress.parse((folder / _VALIDATED).read_text(encoding="utf-8"))
            return Progress.parse(read_progress(self._path("newest") / str(step)))

    def _complete(self, kind: str, step: int) -> None:
        """Writes the digests of a checkpoint of an older version that has none."""
        folder = self.folder / kind / str(step)
        if self._writing and read_digests(folder) is None:
            with _saving(self.folder):
                write_digests(folder)

    def _check(self, kind: str, step: int) -> None:
        """Raises UserError if a file of a checkpoint has changed since it was written."""
        what = self._damage(kind, step)
        if what and what != _NO_DIGESTS:
            raise self._damaged(kind, step, what)

    def _damage(self, kind: str, step: int) -> str:
        """What is wrong with a checkpoint; "" if nothing. Its files are read once."""
        if (kind, step) in self._intact:
            return ""
        folder = self.folder / kind / str(step)
        if read_digests(folder) is None:
            return _NO_DIGESTS
        what = _problem(folder)
        if not what:
            self._intact.add((kind, step))
        return what

    def _damaged(self, kind: str, step: int, what: str) -> UserError:
        """The error for a damaged checkpoint, with what can be used instead."""
        folder = self.folder / kind
        others = [other for other in _steps(folder) if other != step]
        intact = [other for other in others if read_digests(folder / str(other)) and not _problem(folder / str(other))]
        away = "move the damaged folder away" if url_of(folder) is None else f"delete it in the bucket and in {folder}"
        if intact:
            advice = f"{shown(folder / str(intact[-1]))} is intact: {away} to continue from that one"
        elif kind == "newest" and self.best_step is not None:
            advice = (
                f"restore it from a backup, or train again in another --run with --init-from "
                f"{shown(self.folder.parent)}, which starts from its best parameters"
            )
        elif kind == "best" and self.step is not None:
            advice = f"{away} and give the training command again, which puts the newest parameters in its place"
        else:
            advice = "restore it from a backup, or train again in another --run"
        return UserError(f"the checkpoint {shown(folder / str(step))} is damaged ({what}); {advice}")

    @contextmanager
    def _explaining(self, kind: str, step: int) -> Iterator[None]:
        """Explains an error of Orbax. Files with digests are intact here, so the experiment must be another one."""
        folder = self.folder / kind / str(step)
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of almost any type, if files are damaged
            if read_digests(folder) is None and not isinstance(error, OSError):
                # Written without digests: damaged files and other shapes look alike.
                cause = "its files are damaged, or it was written by another experiment or version"
            elif isinstance(error, OSError) and error.errno is not None:
                raise UserError(f"the checkpoint {shown(folder)} can't be read ({reason(error)})") from error
            else:
                cause = "it was written by another experiment or version"
            raise UserError(
                f"the checkpoint {shown(folder)} does not fit this experiment ({reason(error)}); {cause}: choose "
                f"another --run"
            ) from error


def _problem(folder: Path) -> str:
    """What is wrong with a folder that has digests; "" if nothing. Files that cannot be read are damaged."""
    try:
        return next(iter(damages(folder)), "")
    except OSError as error:
        name = Path(error.filename).name if error.filename else "a file"
        return f"{name} can't be read: {reason(error)}"


def latest_step(folder: Path) -> int | None:
    """The step of the latest checkpoint in a folder such as ``newest``, also of a damaged one; None if there is none.

    (Orbax skips folders that lack some of its files.)
    """
    return max(_steps(folder), default=None)


def _steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def restore_best(run: Path, template: Any, step: int | None = None) -> tuple[Any, int]:
    """The best parameters of a run, or those of an exported one, placed as ``template`` is, and their step.

    Raises:
        UserError: see ``Checkpoints.restore_best`` and ``parameter_file.read_parameters``.
    """
    checkpoints = Checkpoints(run)
    try:
        step = checkpoints.best_step if step is None else step
        if step is None and (run / PARAMETERS).is_file():
            return read_parameters(run / PARAMETERS, template, placed_as)
        params = checkpoints.restore_best(template, step)
        assert step is not None
        return params, step
    finally:
        checkpoints.close()


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    # Orbax's threads also log the traceback of every error that they raise.
    with (
        disk_errors(f"saving a checkpoint to {folder} (earlier checkpoints are intact)"),
        quiet_orbax(logging.CRITICAL),
    ):
        yield
