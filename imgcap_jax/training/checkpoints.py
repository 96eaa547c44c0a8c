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
from imgcap_jax.files import disk_full


@dataclass(frozen=True)
class Progress:
    """What a resumed run has to know beside the state.

    step: steps done. data: state of the data iterator after the batch of that step.
    best: best validation CIDEr-D so far (None: not validated), best_step: when, misses: validations since.
    """

    step: int
    data: Any
    best: float | None = None
    best_step: int | None = None
    misses: int = 0


class Checkpoints:
    """``<run>/checkpoints/newest`` and ``best``; and ``start``, for a penalty on straying from it.

    Orbax writes into a temporary folder and renames it: a kill at any moment leaves the one before.
    """

    def __init__(self, run: Path, *, writing: bool = False) -> None:
        """Opens the checkpoints of a run; only who trains it may be ``writing``, others could disturb a save."""
        self.folder = run.absolute() / "checkpoints"
        self._newest = _manager(self.folder / "newest", writing)
        self._best = _manager(self.folder / "best", writing)
        self._writing = writing

    @property
    def step(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return self._newest.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint; None where there is none."""
        return self._best.latest_step()

    def save(self, state: Any, progress: Progress) -> None:
        """Saves the training state and returns when it is on disk.

        Raises:
            UserError: the disk is full. Earlier checkpoints remain.
        """
        if progress.step == self.step:
            return
        text = json.dumps(asdict(progress))
        items = ocp.args.Composite(state=ocp.args.StandardSave(_raw(state)), progress=ocp.args.JsonSave({"json": text}))
        with _disk_errors(self.folder):
            self._newest.save(progress.step, args=items)
            self._newest.wait_until_finished()

    def save_best(self, step: int, params: Any) -> None:
        """Keeps these parameters as the best."""
        with _disk_errors(self.folder):
            if self.best_step is not None and self.best_step >= step:
                # Left by this run when it was killed between this and its checkpoint. It will get there again, to
                # the same parameters.
                return
            self._best.save(step, args=ocp.args.StandardSave(_raw(params)))
            self._best.wait_until_finished()

    def keep_start(self, params: Any) -> None:
        """Keeps the parameters that training starts with."""
        manager = _manager(self.folder / "start", self._writing)
        with _disk_errors(self.folder):
            manager.save(0, args=ocp.args.StandardSave(_raw(params)))
            manager.wait_until_finished()
        manager.close()

    def restore_start(self, template: Any) -> Any:
        """What ``keep_start`` kept, placed as ``template`` is. Raises UserError where it is missing or does not fit."""
        manager = _manager(self.folder / "start", self._writing)
        if manager.latest_step() is None:
            raise UserError(f"{self.folder / 'start'}, the weights that training began with, is missing; start anew")
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
            raise UserError(f"{self.folder.parent} has no finished validation yet; train it further first")
        with _shape_errors(self.folder / "best"):
            args = ocp.args.StandardRestore(_raw(_abstract(template)))
            return _like(template, self._best.restore(step, args=args))

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._newest.close()
        self._best.close()


def _manager(folder: Path, writing: bool) -> ocp.CheckpointManager:
    # It warns three times that what is read only is read only.
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
    """Drops what Orbax logs below a level."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _raw(tree: Any) -> dict[str, Any]:
    """Leaves by path: what is stored doesn't depend on which tree classes flax uses."""
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
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        # Its threads log whole tracebacks of what they raise as well.
        with _quiet_orbax(logging.CRITICAL):
            yield
    except Exception as error:
        if disk_full(error):
            raise UserError(
                f"disk full while saving a checkpoint to {folder}; earlier checkpoints are intact: "
                f"free some space and give the same command again"
            ) from error
        raise


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
