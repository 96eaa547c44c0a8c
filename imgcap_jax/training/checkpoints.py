"""Checkpoints with Orbax: the newest, to resume from, and the best, to caption with."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.files import disk_errors


@dataclass(frozen=True)
class Progress:
    """What a resumed run needs in addition to the state.

    step: the number of steps done. data: the state of the data iterator after the batch of that step.
    best: the highest validation CIDEr-D so far; None before the first validation. best_step: its step.
    misses: the number of validations since then.
    """

    step: int
    data: Any
    best: float | None = None
    best_step: int | None = None
    misses: int = 0


class Checkpoints:
    """``newest``, ``best`` and ``start`` in ``<run>/checkpoints``. ``start`` contains the initial parameters, for a KL
    penalty.

    Orbax writes into a temporary folder and renames it. If the process is killed, the previous checkpoint remains.
    """

    def __init__(self, run: Path, *, writing: bool = False) -> None:
        """Opens the checkpoints of a run.

        ``writing`` is for the process that trains the run. Another writing process could disturb a save.
        """
        self.folder = run.absolute() / "checkpoints"
        self._newest = _manager(self.folder / "newest", writing)
        self._best = _manager(self.folder / "best", writing)
        self._writing = writing

    @property
    def step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._newest.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint; None if there is none."""
        return self._best.latest_step()

    def save(self, state: Any, progress: Progress) -> None:
        """Saves the training state; returns when it is on disk.

        Raises:
            UserError: the disk is full. Earlier checkpoints are kept.
        """
        if progress.step == self.step:
            return
        text = json.dumps(asdict(progress))
        items = ocp.args.Composite(state=ocp.args.StandardSave(_raw(state)), progress=ocp.args.JsonSave({"json": text}))
        with _saving(self.folder):
            self._newest.save(progress.step, args=items)
            self._newest.wait_until_finished()

    def save_best(self, step: int, params: Any) -> None:
        """Saves these parameters as the best."""
        with _saving(self.folder):
            if self.best_step is not None and self.best_step >= step:
                # The run was killed between this and its next checkpoint. It computes the same parameters again.
                return
            self._best.save(step, args=ocp.args.StandardSave(_raw(params)))
            self._best.wait_until_finished()

    def keep_start(self, params: Any) -> None:
        """Saves the initial parameters."""
        manager = _manager(self.folder / "start", self._writing)
        with _saving(self.folder):
            manager.save(0, args=ocp.args.StandardSave(_raw(params)))
            manager.wait_until_finished()
        manager.close()

    def restore_start(self, template: Any) -> Any:
        """The parameters that ``keep_start`` saved, placed as ``template`` is.

        Raises:
            UserError: they are missing or do not fit the experiment.
        """
        manager = _manager(self.folder / "start", self._writing)
        if manager.latest_step() is None:
            raise UserError(
                f"{self.folder / 'start'} (the parameters that training started from) is missing; "
                f"train again in another --run"
            )
        with _shape_errors(self.folder / "start"):
            restored = manager.restore(0, args=ocp.args.StandardRestore(_raw(_abstract(template))))
        manager.close()
        return _like(template, restored)

    def restore(self, template: Any) -> tuple[Any, Progress]:
        """The newest state, placed as ``template`` is, and its progress.

        Raises:
            UserError: the checkpoint does not fit the experiment.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(_raw(_abstract(template))), progress=ocp.args.JsonRestore()
        )
        with _shape_errors(self.folder / "newest"):
            restored = self._newest.restore(self._newest.latest_step(), args=items)
            return _like(template, restored["state"]), Progress(**json.loads(restored["progress"]["json"]))

    def restore_best(self, template: Any) -> Any:
        """The best parameters, placed as ``template`` is.

        Raises:
            UserError: there are none yet, or they do not fit the experiment.
        """
        step = self._best.latest_step()
        if step is None:
            raise UserError(f"{self.folder.parent} has no finished validation yet; train it longer first")
        with _shape_errors(self.folder / "best"):
            args = ocp.args.StandardRestore(_raw(_abstract(template)))
            return _like(template, self._best.restore(step, args=args))

    def close(self) -> None:
        """Stops the threads of Orbax."""
        self._newest.close()
        self._best.close()


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
            max_to_keep=1,
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
    def abstract(leaf: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(abstract, tree)


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    # Orbax's threads also log the traceback of every error that they raise.
    with (
        disk_errors(f"saving a checkpoint to {folder} (earlier checkpoints are intact)"),
        _quiet_orbax(logging.CRITICAL),
    ):
        yield


@contextmanager
def _shape_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the checkpoint in {folder} does not fit this experiment ({reason[:200]}); it was written by "
            f"another experiment or version: choose another --run"
        ) from error
