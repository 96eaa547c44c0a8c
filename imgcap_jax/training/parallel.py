"""Data parallelism: runs a per-device step on all devices, with ``jax.pmap`` or ``jax.shard_map``."""

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from imgcap_jax.errors import UserError
from imgcap_jax.files import reason, write_text
from imgcap_jax.loops import named_loop
from imgcap_jax.models.members import POPULATION

AXIS = "devices"
_MEMBERS = "members"
_ERROR_BYTES = 2000  # of an error that is raised on all processes
Step = Callable[[Any, Any, Mapping[str, Array]], tuple[Any, Any]]
Loop = Callable[[Any, Any, Any, Any, Any, np.int32], tuple[Any, Any]]
Mode = Literal["auto", "pmap", "shard_map"]


def join_processes(where: str) -> None:
    """Joins the processes that train together. Must be called before any other computation.

    Args:
        where: "auto" if JAX can detect the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes). Otherwise
            "HOST:PORT,COUNT,INDEX": the address of process 0, the number of processes, the index of this one.

    Raises:
        UserError: ``where`` is malformed, or the processes cannot connect to each other.
    """
    options = {} if where == "auto" else _place_of_process(where)
    given = "--distributed" if where == "auto" else f"--distributed {where}"
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        if where == "auto" and re.search("(should|must) be defined", str(error)):
            raise UserError(
                "--distributed: no cluster was recognised (Cloud TPU, Slurm, Open MPI, Kubernetes); use --distributed "
                "HOST:PORT,COUNT,INDEX"
            ) from None
        raise UserError(f"{given}: {reason(error)}; use HOST:PORT,COUNT,INDEX on each host") from error


def _place_of_process(where: str) -> dict[str, Any]:
    """The arguments of JAX for HOST:PORT,COUNT,INDEX. Raises UserError if it is malformed."""
    found = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", where, re.ASCII)
    if found is None:
        raise UserError(
            f"--distributed {where!r} is malformed; use HOST:PORT,COUNT,INDEX, for example 10.0.0.1:8476,4,0, or no "
            f"value"
        )
    count, index = int(found[2]), int(found[3])
    if count < 1:
        raise UserError(f"--distributed {where}: COUNT is {count}; it must be at least 1")
    if index >= count:
        allowed = {1: "0", 2: "0 or 1"}.get(count, f"0 to {count - 1}")
        raise UserError(f"--distributed {where}: INDEX is {index}; with COUNT {count} it must be {allowed}")
    return {"coordinator_address": found[1], "num_processes": count, "process_id": index}


def is_first_process() -> bool:
    """Whether this is process 0, the one that prints and writes files."""
    return jax.process_index() == 0


def _described(error: Exception) -> str:
    """An error of this process, for the others; never empty."""
    if isinstance(error, UserError):
        return str(error) or type(error).__name__
    place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return f"process {jax.process_index()} has failed ({place}{reason(error)})"


class DataParallel:
    """Data parallelism over all devices of all processes.

    The state is replicated and has no device axis. Batches are split along their first axis, and each process provides
    its own part of the batch.
    """

    def __init__(self, mode: Mode = "auto", devices: Sequence[jax.Device] | None = None) -> None:
        """Args: mode: auto is pmap for one process and shard_map for several. devices: None for all devices."""
        if mode == "auto":
            mode = "pmap" if jax.process_count() == 1 else "shard_map"
        self.mode = mode
        self.devices = list(devices if devices is not None else jax.devices())
        mesh = Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))
        self._mesh = mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._cut = NamedSharding(mesh, PartitionSpec(AXIS))

    @property
    def data_devices(self) -> int:
        """The number of devices that share a batch."""
        return len(self.devices)

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

    def shapes_of_rows(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a global batch, placed as ``put_rows`` does. For a step that is compiled and not run."""
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._cut) for name, leaf in batch.items()}

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
        return self.broadcast_all([number])[0]

    def broadcast_all(self, numbers: Sequence[int]) -> list[int]:
        """The numbers that process 0 passes, on all processes. All of them pass equally many."""
        shared: list[int] = multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32)).tolist()
        return shared

    def agree(self, *wishes: int) -> tuple[int, ...]:
        """The elementwise maximum over all processes, so that all of them make the same decision.

        Waits for all processes.
        """
        if jax.process_count() == 1:
            return wishes
        gathered = multihost_utils.process_allgather(np.array(wishes, np.int32))
        return tuple(int(wish) for wish in gathered.max(axis=0))

    def same(self, value: object) -> bool:
        """Whether all processes pass values with the same ``repr``. Waits for all processes."""
        digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:4], "big") >> 1
        largest, smallest = self.agree(digest, -digest)
        return largest == -smallest

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A context that all processes leave together. An error of one of them ends it on all of them.

        A UserError is raised on all processes. Another error is raised where it occurred, and a UserError elsewhere.
        Nothing within the context may wait for another process.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:
                raise
            failure = error
        if jax.process_count() > 1:
            self._raise_on_all(failure)

    def _raise_on_all(self, failure: Exception | None) -> None:
        """Raises the error of the first process that has one on all processes. Waits for all processes."""
        text = np.zeros(_ERROR_BYTES, np.uint8)
        own = b"" if failure is None else _described(failure).encode(errors="backslashreplace")[:_ERROR_BYTES]
        text[: len(own)] = np.frombuffer(own, np.uint8)
        gathered = multihost_utils.process_allgather(text)
        if failure is not None and not isinstance(failure, UserError):
            raise failure  # with its traceback
        for of_process in gathered:
            if of_process.any():
                raise UserError(of_process.tobytes().rstrip(b"\0").decode(errors="replace")) from failure

    def share(self, folder: Path) -> bool:
        """Whether a folder is the same one on the hosts of all processes, and can be written. It is made if missing."""
        if jax.process_count() == 1:
            return True
        note = folder / f".process_{self.broadcast(secrets.randbits(31))}"
        try:
            if is_first_process():
                with suppress(UserError):  # read-only: the processes can't work together there
                    write_text(note, "")
            self.wait()  # until it is written
            (missing,) = self.agree(not note.is_file())
            return not missing
        finally:
            if is_first_process():
                note.unlink(missing_ok=True)

    def wait(self) -> None:
        """Waits until all processes are here."""
        self.agree(0)

    def compile(self, step: Step) -> Step:
        """Compiles ``step(state, constants, part of the batch) -> (state, metrics)``, which runs on each device.

        The step must reduce everything that it returns over ``AXIS``, because the result is the value of one device.
        The buffers of the state are donated.
        """
        return self._on_each_device(step, split=(False, False, True))

    def compile_loop(self, step: Step, read: Callable[[Any, Any, Any], dict[str, Array]], longest: int) -> Loop:
        """Compiles a loop over steps whose batches are read from tables in the memory of the devices.

        Args:
            step: see ``compile``.
            read: (shared tables, tables of the device, numbers of one step) -> the device's part of a batch.
            longest: K, the largest number of steps of one call.

        Returns:
            ``loop(state, constants, shared, tables, numbers, count) -> (state, metrics)``. ``shared`` is replicated,
            ``tables`` come from ``put_tables``. ``numbers`` is a pytree of arrays [K,...], the same on all processes,
            of which the first ``count`` (int32 []) are used. The metrics are [K], and 0 after the first ``count``. The
            buffers of the state are donated.
        """

        loop = _loop(step, read, longest)
        return self._on_each_device(loop, split=(False, False, False, True, False, False))

    def put_tables(self, read: Callable[[int], np.ndarray], shape: tuple[int, ...], shards: int) -> Array:
        """Puts a shard of a table on each device, for ``compile_loop``. Device d gets shard d % shards.

        Args:
            read: the number of a shard -> the shard, of this shape. Called once for each shard of this process, so that
                the host has one shard at a time.
            shape: the shape of a shard.
            shards: the number of shards, a divisor of the number of devices.
        """
        mapped = self.mode == "pmap"
        count = len(self.devices)
        whole = (count, *shape) if mapped else (count * shape[0], *shape[1:])
        own = {
            number: device for number, device in enumerate(self.devices) if device.process_index == jax.process_index()
        }
        buffers: dict[int, Array] = {}
        for shard in sorted({number % shards for number in own}):
            values = read(shard)
            for number, device in own.items():
                if number % shards == shard:
                    buffers[number] = jax.device_put(values[None] if mapped else values, device)
            jax.block_until_ready(list(buffers.values()))  # before the host reads the next shard
        return jax.make_array_from_single_device_arrays(whole, self._cut, [buffers[number] for number in own])

    def _on_each_device(self, function: Callable[..., Any], split: tuple[bool, ...]) -> Callable[..., Any]:
        """Compiles a function that runs on each device. Its first argument is donated, and its result is replicated.

        Args:
            function: the function of the device's parts.
            split: for each argument, whether it is split along its first axis. The others are replicated.
        """
        if self.mode == "pmap":
            mapped = jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=tuple(0 if is_split else None for is_split in split),
                out_axes=None,
                devices=self.devices if jax.process_count() == 1 else None,
                donate_argnums=(0,),
            )
            if jax.process_count() == 1:
                return mapped
            return lambda *arguments: jax.tree.map(self._of_all_processes, mapped(*arguments))
        whole, cut = PartitionSpec(), PartitionSpec(AXIS)
        mapped = jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=tuple(cut if is_split else whole for is_split in split),
            out_specs=whole,
            check_vma=False,  # otherwise gradients are summed over the devices twice
        )
        return jax.jit(mapped, donate_argnums=(0,))


def _loop(step: Step, read: Callable[[Any, Any, Any], Any], longest: int) -> Callable[..., tuple[Any, Any]]:
    """The loop of ``DataParallel.compile_loop``, not compiled."""

    def loop(state: Any, constants: Any, shared: Any, tables: Any, numbers: Any, count: Array) -> tuple[Any, Any]:
        def one_step(state: Any, number: Array | int) -> tuple[Any, Any]:
            of_step = jax.tree.map(lambda leaf: leaf[number], numbers)
            return step(state, constants, read(shared, tables, of_step))

        def add(number: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, metrics = carry
            state, new = one_step(state, number)
            return state, jax.tree.map(lambda kept, one: kept.at[number].set(one), metrics, new)

        shapes = jax.eval_shape(one_step, state, 0)[1]
        metrics = jax.tree.map(lambda leaf: jnp.zeros((longest, *leaf.shape), leaf.dtype), shapes)
        with named_loop("training_steps"):
            result: tuple[Any, Any] = jax.lax.fori_loop(0, count, add, (state, metrics))
        return result

    return loop


class MemberParallel:
    """Trains P models at once, the members of a population. Each device has some of them, with their whole batches.

    All arrays of members have P as their first axis. The devices are those of one process, as many as divide P.
    """

    def __init__(self, members: int, devices: Sequence[jax.Device] | None = None) -> None:
        available = list(devices if devices is not None else jax.devices())
        count = max(number for number in range(1, len(available) + 1) if members % number == 0)
        self.devices = available[:count]
        # A step reduces over AXIS, which is the device itself.
        self._mesh = Mesh(np.array(self.devices).reshape(-1, 1), (_MEMBERS, AXIS), axis_types=(AxisType.Auto,) * 2)
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        self._by_member = NamedSharding(self._mesh, PartitionSpec(_MEMBERS))
        self._one = jax.jit(lambda tree, member: jax.tree.map(lambda leaf: leaf[member], tree))

    @property
    def data_devices(self) -> int:
        """The number of devices that share a batch."""
        return 1

    def replicate(self, tree: Any) -> Any:
        """Puts a tree on all devices."""
        return jax.device_put(tree, self._replicated)

    def stack(self, trees: Sequence[Any]) -> Any:
        """Puts one tree per member on the devices, as one tree with an axis for the members."""
        return jax.tree.map(lambda *leaves: jax.device_put(jnp.stack(leaves), self._by_member), *trees)

    def put(self, batches: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Puts the batches of all members [P,B,...] on the devices."""
        return {name: jax.device_put(leaf, self._by_member) for name, leaf in batches.items()}

    def member(self, tree: Any, member: int) -> Any:
        """The tree of one member."""
        return self._one(tree, member)

    def put_tables(self, read: Callable[[int], np.ndarray], shape: tuple[int, ...], shards: int) -> Array:
        """Puts the only shard of a table on all devices; see ``DataParallel.put_tables``."""
        assert shards == 1
        return self.replicate(read(0))

    def agree(self, *wishes: int) -> tuple[int, ...]:
        """The wishes of the only process."""
        return wishes

    def compile(self, step: Step, shared: Any) -> Step:
        """Compiles a step of one member for all of them.

        Args:
            step: (state, constants, batch) -> (state, metrics), as for ``DataParallel.compile``.
            shared: a tree like the constants, of bools: whether all members have the same leaf, without an axis P.

        Returns:
            The step of all members. The buffers of the states are donated.
        """
        specs = PartitionSpec(_MEMBERS), self._specs(shared), PartitionSpec(_MEMBERS)
        return self._compiled(self._of_members(step, shared), specs, PartitionSpec(_MEMBERS))

    def compile_loop(
        self, step: Step, read: Callable[[Any, Any, Any], dict[str, Array]], longest: int, shared: Any
    ) -> Loop:
        """``DataParallel.compile_loop`` for all members. Numbers and metrics are [K,P,...]."""
        whole, of_steps = PartitionSpec(), PartitionSpec(None, _MEMBERS)
        loop = _loop(self._of_members(step, shared), jax.vmap(read, in_axes=(None, None, 0)), longest)
        specs = PartitionSpec(_MEMBERS), self._specs(shared), whole, whole, of_steps, whole
        return self._compiled(loop, specs, (PartitionSpec(_MEMBERS), of_steps))

    def _of_members(self, step: Step, shared: Any) -> Step:
        axes = jax.tree.map(lambda is_shared: None if is_shared else 0, shared)
        return jax.vmap(step, in_axes=(0, axes, 0), axis_name=POPULATION)

    def _specs(self, shared: Any) -> Any:
        return jax.tree.map(lambda is_shared: PartitionSpec() if is_shared else PartitionSpec(_MEMBERS), shared)

    def _compiled(self, function: Callable[..., Any], specs: Any, results: Any) -> Callable[..., Any]:
        mapped = jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=results, check_vma=False)
        return jax.jit(mapped, donate_argnums=(0,))
