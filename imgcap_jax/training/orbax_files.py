"""Arrays of one checkpoint, between host memory and Orbax's files. No call waits for another process."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from orbax.checkpoint import checkpoint_managers

_PROGRESS = "progress"  # Orbax's item of JSON values


def snapshot(tree: Any) -> dict[str, np.ndarray]:
    """A copy of a tree in host memory: leaf by path, so that no file depends on Flax's tree classes.

    Leaves are replicated, or all of their parts are on devices of this process. Returns when everything is copied, so
    that a training step can then donate the buffers.
    """
    leaves = {
        name: leaf.addressable_data(0) if isinstance(leaf, Array) and leaf.is_fully_replicated else leaf
        for name, leaf in _raw(tree).items()
    }
    for leaf in leaves.values():
        if isinstance(leaf, Array):
            leaf.copy_to_host_async()
    return {name: _on_host(leaf) for name, leaf in leaves.items()}


def _on_host(leaf: Array | np.ndarray) -> np.ndarray:
    if isinstance(leaf, Array) and all(device.platform != "cpu" for device in leaf.devices()):
        return np.asarray(leaf)
    return np.array(leaf)  # on a CPU, np.asarray would be the buffer of the device itself


class Writer:
    """Writes the checkpoints of one kind, as ``<folder>/<step>``, and deletes those that are too many.

    Only one process may write.
    """

    def __init__(self, folder: Path, *, kept: int) -> None:
        """Deletes what a killed process has left of an unfinished checkpoint."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with quiet_orbax(logging.ERROR):
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(n=kept),
                enable_async_checkpointing=False,
                create=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=_alone(),
            )
            self._manager = ocp.CheckpointManager(folder, options=options)

    def write(self, step: int, arrays: Mapping[str, np.ndarray], progress: str | None = None) -> None:
        """Writes one checkpoint: a temporary folder, which is then renamed.

        Args:
            step: a later checkpoint, or one of the same step, must not exist.
            arrays: what ``snapshot`` returned.
            progress: a text to keep in the checkpoint.
        """
        saved = ocp.args.StandardSave(dict(arrays))
        items: Any = saved
        if progress is not None:
            items = ocp.args.Composite(state=saved, progress=ocp.args.JsonSave({"json": progress}))
        if not self._manager.save(step, args=items):
            raise RuntimeError(f"Orbax refused to write the checkpoint of step {step}")

    def delete_from(self, step: int) -> None:
        """Deletes the checkpoints of this step and of later ones."""
        for other in self._manager.all_steps():
            if other >= step:
                self._manager.delete(other)

    def close(self) -> None:
        """Stops the threads of Orbax."""
        self._manager.close()


def read_arrays(folder: Path, template: Any) -> Any:
    """The arrays of a checkpoint, of the types of ``template``, and on its devices.

    The shapes are checked first: if Orbax fails, it leaves half-read arrays to its threads.

    Args:
        folder: the folder of a step.
        template: arrays, or ``jax.ShapeDtypeStruct``; leaves without a placement go to the default device.

    Raises:
        ValueError: the arrays have other names or shapes.
        Exception: of almost any type, if files are damaged.
    """
    place = folder / ("state" if (folder / "state").is_dir() else "default")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    wanted = _raw(template)
    _check_shapes(wanted, handler.metadata(place).tree)
    # Read into host memory: the devices of the processes that wrote it need not exist.
    arguments = ocp.args.PyTreeRestore(
        item=dict.fromkeys(wanted, 0),
        restore_args={
            name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype) for name, leaf in wanted.items()
        },
    )
    found = handler.restore(place, args=arguments)
    placed = [placed_as(found[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), placed)


def placed_as(value: np.ndarray, leaf: Any) -> Array:
    """The array on the devices of ``leaf``, or on the default device if it has none."""
    sharding = leaf.sharding or jnp.zeros(()).sharding
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding, may_alias=False)  # a step could not take the buffer of NumPy
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def read_progress(folder: Path) -> str:
    """The text that was written with the checkpoint of a step. Raises almost any exception if it is damaged."""
    found = ocp.JsonCheckpointHandler(multiprocessing_options=_alone()).restore(folder / _PROGRESS)
    text: str = found["json"]
    return text


@contextmanager
def quiet_orbax(level: int) -> Iterator[None]:
    """Suppresses the log messages of Orbax below a level, in all threads."""
    logger = logging.getLogger("absl")

    def loud(record: logging.LogRecord) -> bool:
        return record.levelno >= level

    logger.addFilter(loud)
    try:
        yield
    finally:
        logger.removeFilter(loud)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Options with which this process neither waits for other ones nor leaves anything to them."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )


def _check_shapes(wanted: Mapping[str, Array], saved: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first difference, unless the saved arrays have the shapes of ``wanted``."""
    for name in [*wanted, *saved]:
        ours = list(wanted[name].shape) if name in wanted else "missing"
        theirs = list(saved[name].shape) if name in saved else "missing"
        if ours != theirs:
            raise ValueError(f"{name} is {ours} here and {theirs} in the checkpoint")


def _raw(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
