"""Running one per-device step on all devices: ``jax.pmap``, or the same step under ``jax.shard_map``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from imgcap_jax.errors import UserError

AXIS = "devices"
Step = Callable[[Any, Any, Mapping[str, Array]], tuple[Any, Any]]


def join_processes(where: str) -> None:
    """Makes this process one of several that train together; before anything else is computed.

    Args:
        where: "auto" where JAX knows the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes), else
            "HOST:PORT,COUNT,INDEX": where process 0 listens, how many processes, which one this is.

    Raises:
        UserError: `where` is malformed, or the processes don't find each other.
    """
    match where.split(","):
        case ["auto"]:
            options: dict[str, Any] = {}
        case [address, count, index] if count.isdigit() and index.isdigit() and int(index) < int(count):
            options = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        case _:
            raise UserError(f"--distributed {where!r}: give HOST:PORT,COUNT,INDEX as in 10.0.0.1:8476,4,0, or nothing")
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--distributed {where}: {reason}; give HOST:PORT,COUNT,INDEX on each host") from error


def is_first_process() -> bool:
    """Whether this process speaks for all."""
    return jax.process_index() == 0


class DataParallel:
    """Data parallelism over every device of every process.

    The state is replicated and has no device axis; batches are cut along their first axis, and each process gives
    its own part of the batch.
    """

    def __init__(
        self, mode: Literal["pmap", "shard_map"] = "pmap", devices: Sequence[jax.Device] | None = None
    ) -> None:
        self.mode = mode
        self.devices = list(devices if devices is not None else jax.devices())
        mesh = Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))
        self._mesh = mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._cut = NamedSharding(mesh, PartitionSpec(AXIS))

    def check_batch_size(self, batch_size: int, accumulate: int) -> None:
        """Raises UserError unless the global batch divides into devices x microbatches."""
        parts = len(self.devices) * accumulate
        if batch_size % parts:
            raise UserError(
                f"data.batch_size {batch_size} does not divide into {len(self.devices)} devices x "
                f"{accumulate} microbatches; choose a multiple of {parts}"
            )

    def replicate(self, tree: Any) -> Any:
        """Puts a tree, the same on every process, on all devices.

        The state has to start there: placed otherwise, the second call of the step would compile again.
        """

        def put(leaf: Any) -> Array:
            # What one process holds can't be put on another's devices but by way of the host.
            local = jax.process_count() > 1 and isinstance(leaf, Array) and leaf.is_fully_addressable
            return jax.device_put(np.asarray(leaf) if local else leaf, self._replicated)

        return jax.tree.map(put, tree)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Puts this process's rows of a batch on its devices."""
        return {name: self._put_leaf(np.asarray(leaf)) for name, leaf in batch.items()}

    def _put_leaf(self, leaf: np.ndarray) -> Array:
        if self.mode == "pmap":
            local = len(self.devices) // jax.process_count()
            leaf = leaf.reshape(local, leaf.shape[0] // local, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(self._cut, leaf)

    def put_rows(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Cuts a batch that every process holds whole over all devices; for functions under ``jax.jit``."""

        def put(leaf: np.ndarray) -> Array:
            return jax.make_array_from_callback(leaf.shape, self._cut, lambda index: leaf[index])

        return {name: put(np.asarray(leaf)) for name, leaf in batch.items()}

    def _of_all_processes(self, leaf: Array) -> Array:
        """What pmap gives is each process's own; the same buffers, seen as one array on all devices."""
        buffers = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, self._replicated, buffers)

    def fetch(self, leaf: Array) -> np.ndarray:
        """A whole array on the host, also where other processes hold parts of it."""
        if leaf.is_fully_addressable:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    def broadcast(self, number: int) -> int:
        """The first process's number, on all of them."""
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))

    def agree(self, *wishes: int) -> tuple[int, ...]:
        """The largest of each number over all processes, which so decide alike; waits for all of them."""
        if jax.process_count() == 1:
            return wishes
        gathered = multihost_utils.process_allgather(np.array(wishes, np.int32))
        return tuple(int(wish) for wish in gathered.max(axis=0))

    def compile(self, step: Step) -> Step:
        """Compiles ``step(state, constants, batch part) -> (state, metrics)``, run once on each device.

        The step must reduce whatever it returns over ``AXIS``: what comes back is one device's value.
        The state's buffers are donated.
        """
        if self.mode == "pmap":
            mapped = jax.pmap(
                step,
                axis_name=AXIS,
                in_axes=(None, None, 0),
                out_axes=None,
                devices=self.devices if jax.process_count() == 1 else None,
                donate_argnums=(0,),
            )
            if jax.process_count() == 1:
                return mapped
            return lambda *arguments: jax.tree.map(self._of_all_processes, mapped(*arguments))
        whole, cut = PartitionSpec(), PartitionSpec(AXIS)
        mapped = jax.shard_map(
            step,
            mesh=self._mesh,
            in_specs=(whole, whole, cut),
            out_specs=(whole, whole),
            check_vma=False,  # else a psum of gradients counts every device once more
        )
        return jax.jit(mapped, donate_argnums=(0,))
