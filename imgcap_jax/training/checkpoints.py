"""Checkpoints with Orbax: the newest, to resume from, and the best, to caption with."""

import json
import logging
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array
from orbax.checkpoint import checkpoint_managers

from imgcap_jax.errors import UserError
from imgcap_jax.files import damages, disk_errors, read_digests, reason, write_digests

CHECKPOINTS = "checkpoints"  # folder in a run's folder
_PATTERN = re.compile(r"[\[\]*?\\]")  # characters that make a path a pattern
_KEPT = 2  # checkpoints: if the newest is damaged, the one before it remains


@dataclass(frozen=True)
class Progress:
    """What a resumed run needs in addition to the state.

    step: the number of steps done. data: the state of the data iterator after the batch of that step.
    best: the highest validation CIDEr-D so far; None before the first validation. best_step: the step of the best
    parameters. best_ties: their BLEU-4 and negative teacher-forced loss, which decide between equal CIDEr-D.
    misses: the number of validations since the last better one. seconds: those of training so far.
    """

    step: int
    data: Any
    best: float | None = None
    best_step: int | None = None
    best_ties: tuple[float, ...] = ()
    misses: int = 0
    seconds: float = 0.0


class Checkpoints:
    """``newest``, ``best`` and ``start`` in ``<run>/checkpoints``. ``start`` contains the initial parameters, for a KL
    penalty.

    Orbax writes into a temporary folder and renames it. If the process is killed, the previous checkpoint remains. The
    two latest checkpoints of ``newest`` and of ``best`` are kept, each with the digests of its files. They are checked
    before a checkpoint is restored.
    """

    def __init__(self, run: Path, *, writing: bool = False) -> None:
        """Opens the checkpoints of a run.

        ``writing`` is for the process that trains the run. Another writing process could disturb a save.
        """
        self.folder = run.absolute() / CHECKPOINTS
        self._writing = writing
        self._link: Path | None = None
        self._managers: dict[str, ocp.CheckpointManager] = {}

    @property
    def step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return latest_step(self.folder / "newest")

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint; None if there is none."""
        return latest_step(self.folder / "best")

    def save(self, state: Any, progress: Progress) -> None:
        """Saves the training state; returns when it is on disk.

        Raises:
            UserError: the disk is full or failing. Earlier checkpoints are kept.
        """
        if progress.step == self.step:
            return
        text = json.dumps(asdict(progress))
        items = ocp.args.Composite(state=ocp.args.StandardSave(_raw(state)), progress=ocp.args.JsonSave({"json": text}))
        self._write("newest", progress.step, items)

    def save_best(self, step: int, params: Any) -> None:
        """Saves these parameters as the best."""
        if self.best_step is not None and self.best_step >= step:
            # The run was killed between this and its next checkpoint. It computes the same parameters again.
            self._complete("best", self.best_step)
            return
        self._write("best", step, ocp.args.StandardSave(_raw(params)))

    def keep_start(self, params: Any) -> None:
        """Saves the initial parameters. Those of a run that was killed before its first checkpoint are replaced."""
        if latest_step(self.folder / "start") is not None:
            self._manager("start").delete(0)
        self._write("start", 0, ocp.args.StandardSave(_raw(params)))

    def restore_start(self, template: Any) -> Any:
        """The parameters that ``keep_start`` saved, placed as ``template`` is.

        Raises:
            UserError: they are missing or damaged, or do not fit the experiment.
        """
        if latest_step(self.folder / "start") is None:
            raise UserError(
                f"{self.folder / 'start'} (the parameters that training started from) is missing; "
                f"train again in another --run"
            )
        return self._read("start", 0, template)

    def restore(self, template: Any) -> tuple[Any, Progress]:
        """The newest state, placed as ``template`` is, and its progress.

        Raises:
            UserError: the checkpoint is damaged or does not fit the experiment, or the best checkpoint is damaged.
        """
        step = self.step
        assert step is not None
        if self.best_step is not None:
            self._check("best", self.best_step)  # which could remain the best one until the end
        state = self._read("newest", step, template)
        with self._explaining("newest", step):
            items = ocp.args.Composite(progress=ocp.args.JsonRestore())
            progress = Progress(**json.loads(self._manager("newest").restore(step, args=items)["progress"]["json"]))
        self._complete("newest", step)
        return state, replace(progress, best_ties=tuple(progress.best_ties))

    def restore_best(self, template: Any) -> Any:
        """The best parameters, placed as ``template`` is.

        Raises:
            UserError: there are none yet, they are damaged, or they do not fit the experiment.
        """
        step = self.best_step
        if step is None:
            raise UserError(
                f"{self.folder.parent} has no best parameters, because no validation is finished or {self.folder} has "
                f"lost them; give its training command again"
            )
        return self._read("best", step, template)

    def close(self) -> None:
        """Stops the threads of Orbax."""
        for manager in self._managers.values():
            manager.close()

    def _path(self, kind: str) -> Path:
        """The folder of a kind of checkpoint, under a name that Orbax can read.

        Orbax and TensorStore expand patterns in paths: below a folder called ``a[1]`` they find nothing. There, the
        folder gets another path by a temporary symbolic link.
        """
        if _PATTERN.search(str(self.folder)) is None:
            return self.folder / kind
        if jax.process_count() > 1:
            raise UserError(
                f"{self.folder.parent}: with several processes, --run must not contain any of [ ] * ? \\; rename it"
            )
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

    def _manager(self, kind: str) -> ocp.CheckpointManager:
        """Orbax's manager of a kind of checkpoint. It reads files of checkpoints as soon as it is made."""
        if kind not in self._managers:
            self._managers[kind] = _manager(self._path(kind), self._writing)
        return self._managers[kind]

    def _write(self, kind: str, step: int, items: Any) -> None:
        """Saves a checkpoint and the digests of its files; returns when both are on disk."""
        with _saving(self.folder):
            manager = self._manager(kind)
            manager.save(step, args=items)
            manager.wait_until_finished()
            if jax.process_index() == 0:
                write_digests(self.folder / kind / str(step))

    def _read(self, kind: str, step: int, template: Any) -> Any:
        """Restores the arrays of a checkpoint, placed as ``template`` is.

        The files and the shapes are checked first. When Orbax fails, it leaves half-read arrays to its threads.
        """
        self._check(kind, step)
        with self._explaining(kind, step):
            args = ocp.args.StandardRestore(_raw(_abstract(template)))
            name = "state" if kind == "newest" else "default"
            saved = ocp.PyTreeCheckpointHandler().metadata(self._path(kind) / str(step) / name).tree
            _check_shapes(_raw(template), saved)
            restored = self._manager(kind).restore(
                step, args=ocp.args.Composite(state=args) if name == "state" else args
            )
            return _like(template, restored["state"] if name == "state" else restored)

    def _complete(self, kind: str, step: int) -> None:
        """Writes the digests of a checkpoint that has none, because the process was killed after saving it."""
        folder = self.folder / kind / str(step)
        if self._writing and jax.process_index() == 0 and read_digests(folder) is None:
            with _saving(self.folder):
                write_digests(folder)

    def _check(self, kind: str, step: int) -> None:
        """Raises UserError if a file of a checkpoint has changed since it was written."""
        found = damages(self.folder / kind / str(step))
        if found:
            raise self._damaged(kind, step, found[0])

    def _damaged(self, kind: str, step: int, what: str) -> UserError:
        """The error for a damaged checkpoint, with what can be used instead."""
        folder = self.folder / kind
        others = [other for other in _steps(folder) if other != step]
        intact = [other for other in others if read_digests(folder / str(other)) and not damages(folder / str(other))]
        if intact:
            advice = f"{folder / str(intact[-1])} is intact: move the damaged folder away to continue from that one"
        elif kind == "newest" and self.best_step is not None:
            advice = (
                f"restore it from a backup, or train again in another --run with --init-from {self.folder.parent}, "
                f"which starts from its best parameters"
            )
        elif kind == "best" and self.step is not None:
            advice = "move it away and give the training command again, which puts the newest parameters in its place"
        else:
            advice = "restore it from a backup, or train again in another --run"
        return UserError(f"the checkpoint {folder / str(step)} is damaged ({what}); {advice}")

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
                raise UserError(f"the checkpoint {folder} can't be read ({reason(error)})") from error
            else:
                cause = "it was written by another experiment or version"
            raise UserError(
                f"the checkpoint {folder} does not fit this experiment ({reason(error)}); {cause}: choose another --run"
            ) from error


def _check_shapes(wanted: Mapping[str, Array], saved: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first difference, unless the saved arrays have the shapes of ``wanted``."""
    for name in [*wanted, *saved]:
        ours = list(wanted[name].shape) if name in wanted else "missing"
        theirs = list(saved[name].shape) if name in saved else "missing"
        if ours != theirs:
            raise ValueError(f"{name} is {ours} here and {theirs} in the checkpoint")


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


def restore_best(run: Path, template: Any) -> tuple[Any, int]:
    """The best parameters of a run, placed as ``template`` is, and their step.

    Raises:
        UserError: see ``Checkpoints.restore_best``.
    """
    checkpoints = Checkpoints(run)
    try:
        params = checkpoints.restore_best(template)
        assert checkpoints.best_step is not None
        return params, checkpoints.best_step
    finally:
        checkpoints.close()


def _manager(folder: Path, writing: bool) -> ocp.CheckpointManager:
    # Orbax warns three times that a read-only manager is read-only.
    with _quiet_orbax(logging.ERROR):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(n=_KEPT),
            enable_async_checkpointing=False,
            create=writing,
            cleanup_tmp_directories=writing,
            read_only=not writing,
        )
        return ocp.CheckpointManager(folder, options=options)


@contextmanager
def _quiet_orbax(level: int) -> Iterator[None]:
    """Suppresses the log messages of Orbax below a level."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _raw(tree: Any) -> dict[str, Any]:
    """Leaves by path, so that checkpoints do not depend on the tree classes that Flax uses."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _like(template: Any, raw: dict[str, Any]) -> Any:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(template)]
    return jax.tree.unflatten(jax.tree.structure(template), [raw[path] for path in paths])


def _abstract(tree: Any) -> Any:
    """The shapes, types and placement of a tree. Leaves without a placement go to the default device."""
    default = jnp.zeros(()).sharding

    def abstract(leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)

    return jax.tree.map(abstract, tree)


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    # Orbax's threads also log the traceback of every error that they raise.
    with (
        disk_errors(f"saving a checkpoint to {folder} (earlier checkpoints are intact)"),
        _quiet_orbax(logging.CRITICAL),
    ):
        yield
