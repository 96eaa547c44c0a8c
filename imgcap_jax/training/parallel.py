"""Data parallelism: runs a per-device step on all devices, with ``jax.pmap`` or ``jax.shard_map``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from imgcap_jax.errors import UserError
from imgcap_jax.files import reason

AXIS = "devices"
Step = Callable[[Any, Any, Mapping[str, Array]], tuple[Any, Any]]


def join_processes(where: str) -> None:
    """Joins the processes that train together. Must be called before any other computation.

    Args:
        where: "auto" if JAX can detect the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes). Otherwise
            "HOST:PORT,COUNT,INDEX": the address of process 0, the number of processes, the index of this one.

    Raises:
        UserError: ``where`` is malformed, or the processes cannot connect to each other.
    """
    match where.split(","):
        case ["auto"]:
            options: dict[str, Any] = {}
        case [address, count, index] if count.isdigit() and index.isdigit() and int(index) < int(count):
            options = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        case _:
            raise UserError(
                f"--distributed {where!r} is malformed; use HOST:PORT,COUNT,INDEX, for example 10.0.0.1:8476,4,0, "
                f"or no value"
            )
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed {where}: {reason(error)}; use HOST:PORT,COUNT,INDEX on each host") from error


def is_first_process() -> bool:
    """Whether this is process 0, the one that prints and writes files."""
    return jax.process_index() == 0


class DataParallel:
    """Data parallelism over all devices of all processes.

    The state is replicated and has no device axis. Batches are split along their first axis, and each process provides
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
        """Raises UserError unless the global batch size is a multiple of devices x microbatches."""
        parts = len(self.devices) * accumulate
        if batch_size % parts:
            raise UserError(
                f"data.batch_size is {batch_size}, which cannot be divided among {len(self.devices)} devices x "
                f"{accumulate} microbatches; choose a multiple of {parts}"
            )

    def replicate(self, tree: Any) -> Any:
        """Puts a tree, which is the same on every process, on all devices.

        The initial state must be placed like this. Otherwise the second call of the step compiles again. A
        ``jax.ShapeDtypeStruct`` gets the placement, for a checkpoint to fill.
        """

        def put(leaf: Any) -> Array | jax.ShapeDtypeStruct:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._replicated)
            # An array of one process can reach the devices of another process only through the host.
            local = jax.process_count() > 1 and isinstance(leaf, Array) and leaf.is_fully_addressable
            return jax.device_put(np.asarray(leaf) if local else leaf, self._replicated)

        return jax.tree.map(put, tree)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Puts the rows that this process has of a batch on its devices."""
        return {name: self._put_leaf(np.asarray(leaf)) for name, leaf in batch.items()}

    def _put_leaf(self, leaf: np.ndarray) -> Array:
        if self.mode == "pmap":
            local = len(self.devices) // jax.process_count()
            leaf = leaf.reshape(local, leaf.shape[0] // local, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(self._cut, leaf)

    def rows(self, count: int) -> np.ndarray:
        """The rows of a batch of ``count`` rows that the devices of this process compute, in ascending order."""
        places = self._cut.addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([np.arange(count)[place] for place in places if place is not None]))

    def put_rows(self, batch: Mapping[str, np.ndarray], count: int) -> dict[str, Array]:
        """Puts the ``rows`` that this process has of a batch of ``count`` rows on its devices, for ``map_rows``."""
        rows = self.rows(count)

        def put(leaf: np.ndarray) -> Array:
            def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                return leaf[slice(*np.searchsorted(rows, index[0].indices(count)[:2]))]

            return jax.make_array_from_callback((count, *leaf.shape[1:]), self._cut, of_device)

        return {name: put(np.asarray(leaf)) for name, leaf in batch.items()}

    def map_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles ``function(*constants, rows)``, which runs on each device with its own part of the rows.

        No device waits for another. Constants are placed by ``replicate`` and rows by ``put_rows``. Each result has
        the rows of all devices along its first axis; a scalar becomes an array with one value per device.
        """

        def of_device(*arguments: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[None] if leaf.ndim == 0 else leaf, function(*arguments))

        @jax.jit
        def mapped(*arguments: Any) -> Any:
            if len(self.devices) == 1:
                return of_device(*arguments)
            whole, cut = PartitionSpec(), PartitionSpec(AXIS)
            specs = (*[whole] * (len(arguments) - 1), cut)
            return jax.shard_map(of_device, mesh=self._mesh, in_specs=specs, out_specs=cut, check_vma=False)(*arguments)

        return mapped

    def own(self, tree: Any) -> Any:
        """What the devices of this process computed with ``map_rows``, on the host, in ascending order."""

        def fetch(leaf: Array) -> np.ndarray:
            if leaf.is_fully_addressable:
                return np.asarray(leaf)
            shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            return np.concatenate([np.asarray(shard.data) for shard in shards])

        return jax.tree.map(fetch, tree)

    def gather(self, tree: Any) -> Any:
        """Joins arrays of all processes, which have the same shape on each, along their first axis, on every host."""
        if jax.process_count() == 1:
            return tree
        return jax.tree.map(np.concatenate, multihost_utils.process_allgather(tree))

    def _of_all_processes(self, leaf: Array) -> Array:
        """Makes the local result of ``pmap`` a global array on all devices, with the same buffers."""
        buffers = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, self._replicated, buffers)

    def broadcast(self, number: int) -> int:
        """The number that process 0 passes, on all processes."""
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))

    def agree(self, *wishes: int) -> tuple[int, ...]:
        """The elementwise maximum over all processes, so that all of them make the same decision.

        Waits for all processes.
        """
        if jax.process_count() == 1:
            return wishes
        gathered = multihost_utils.process_allgather(np.array(wishes, np.int32))
        return tuple(int(wish) for wish in gathered.max(axis=0))

    def wait(self) -> None:
        """Waits until all processes are here."""
        self.agree(0)

    def compile(self, step: Step) -> Step:
        """Compiles ``step(state, constants, part of the batch) -> (state, metrics)``, which runs on each device.

        The step must reduce everything that it returns over ``AXIS``, because the result is the value of one device.
        The buffers of the state are donated.
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
            check_vma=False,  # otherwise gradients are summed over the devices twice
        )
        return jax.jit(mapped, donate_argnums=(0,))
