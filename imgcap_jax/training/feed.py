"""What gives a training loop its batches: the host, which sends each of them, or the memory of the devices.

Both feeds draw the same batches (``data/order.py``) and save the same positions, so that a run can change its feed.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array, lax

from imgcap_jax.data.prefetch import device_prefetch
from imgcap_jax.data.regions import RegionSource, read_regions
from imgcap_jax.data.rows import Batch, TrainingRows
from imgcap_jax.special_tokens import PAD
from imgcap_jax.terminal import Say, working
from imgcap_jax.training.parallel import AXIS, DataParallel, Loop, MemberParallel, Step, is_first_process

if TYPE_CHECKING:
    from imgcap_jax.data.pipeline import TrainBatches  # needs Grain

Compiling = Callable[[], AbstractContextManager[None]]
Read = Callable[[Any, Any, Any], dict[str, Array]]
Compiled = TypeVar("Compiled", bound=Callable[..., Any])

_LONGEST = 256  # steps per call of the device feed
_SECONDS = 5.0
"""The longest time of a call, so that a run stops soon after a signal. Cloud machines are taken away after 30 s."""
_SHARE = 0.6  # of a device's free memory, for features; the rest is for the training step
_WIDEST = 2**15
"""Words of a row of a table. The compiler for TPU (libtpu 0.0.52) copies a whole table with wider rows, or with rows
that are not whole tiles, before it reads some of them: ``imgcap plan coco_up_down --topology v5e:2x2`` took 22.1 GB."""
_TILE = 128  # words of a tile of a TPU
_READ = 1024  # rows of features read at a time


class Ran(NamedTuple):
    """Steps that a feed has started.

    steps: their number. metrics: arrays [] or [K], of which the first ``steps`` are of these steps; with a last axis P
    for the members of a population. batches: the number of batches of the run up to here.
    """

    steps: int
    metrics: Mapping[str, Array]
    batches: int


class Feed(Protocol):
    """Runs training steps on its batches."""

    def run(self, state: Any, constants: Any, limit: int) -> tuple[Any, Ran]:
        """Runs at least one step, and at most ``limit``. The buffers of the state are donated."""
        ...

    def __enter__(self) -> "Feed": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class HostFeed:
    """Reads batches on the host and sends them to the devices ahead of time.

    Attributes:
        waited: the seconds that steps have waited for their batches.
    """

    def __init__(
        self,
        step: Step,
        batches: Iterator[Batch],
        put: Callable[[Batch], dict[str, Array]],
        compiling: Compiling = nullcontext,
        *,
        first: int = 0,
    ) -> None:
        """Starts to read.

        Args:
            step: compiled.
            batches: the part of this process.
            put: puts a batch on the devices.
            compiling: entered while the step is compiled.
            first: the number of the first batch.
        """
        self._step, self._next, self.waited = _announced(step, compiling), first, 0.0
        self._batches = device_prefetch(batches, put)

    def run(self, state: Any, constants: Any, limit: int) -> tuple[Any, Ran]:
        """One step. See ``Feed``."""
        start = time.perf_counter()
        batch, _ = next(self._batches)
        self.waited += time.perf_counter() - start
        state, metrics = self._step(state, constants, batch)
        self._next += 1
        return state, Ran(1, metrics, self._next)

    def __enter__(self) -> "HostFeed":
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()


def device_part(batch: Batch) -> Batch:
    """What the step reads of a batch: everything except the ids, and the index of each row in the global batch."""
    part = {name: leaf for name, leaf in batch.items() if name != "image_id"}
    # Rows are numbered as the pipeline deals them to processes, so that dropout does not depend on their number.
    rows = np.arange(len(batch["weight"]), dtype=np.int32)
    part["row"] = rows * jax.process_count() + jax.process_index()
    return part


class PackedRegions:
    """The regions of all images and views as rows of 32-bit words, which devices can add without rounding.

    A row contains the regions [N,D], as they are stored, and the mask [N] if there is one. Rows are filled up to
    whole tiles of a TPU, and wide ones are divided into pieces. Rows are ordered by image and view.

    Attributes:
        rows: the number of rows, all images x views.
        words: the number of words per row, W.
        shape: the shape of a row: (W,) or (pieces, words of each).
    """

    def __init__(self, stores: Sequence[RegionSource]) -> None:
        """Reads one row, for its shape."""
        self._stores = stores
        self.views = stores[0].views
        self.rows = self.views * sum(len(store) for store in stores)
        regions, mask = stores[0].read(_first_image(stores[0]), 0)
        self._shape, self._dtype, self._masked = regions.shape, regions.dtype, mask is not None
        self._region_words = -(-regions.nbytes // 4)
        words = self._region_words + (-(-len(regions) // 4) if self._masked else 0)
        pieces = 1
        while words > pieces * _WIDEST:
            pieces *= 2  # tiles of TPUs have 1, 2, 4 or 8 rows
        width = words if words <= _TILE else -(-words // (pieces * _TILE)) * _TILE
        self.shape = (width,) if pieces == 1 else (pieces, width)
        self.words = math.prod(self.shape)

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """The rows from start to stop as [stop - start,W]; zeros after the last row."""
        packed = np.zeros((stop - start, self.words), np.uint32)
        first = 0
        for store in self._stores:
            count = len(store) * self.views
            for begin in range(max(start, first), min(stop, first + count), _READ):
                numbers = np.arange(begin, min(begin + _READ, stop, first + count)) - first
                images, views = np.divmod(numbers, self.views)
                regions, mask = read_regions(store, images, views.astype(np.int32))
                block = packed[begin - start :][: len(numbers)].view(np.uint8)
                block[:, : self._shape[0] * self._shape[1] * self._dtype.itemsize] = _bytes(regions)
                if mask is not None:
                    block[:, 4 * self._region_words :][:, : self._shape[0]] = mask
            first += count
        return packed

    def unpack(self, words: Array) -> dict[str, Array]:
        """The "regions" [B,N,D], and the "region_mask" [B,N] if there is one, of rows [B,W]."""
        size = self._shape[0] * self._shape[1]
        values = lax.bitcast_convert_type(words[:, : self._region_words], self._dtype).reshape(len(words), -1)
        batch = {"regions": values[:, :size].reshape(-1, *self._shape)}
        if self._masked:
            mask = lax.bitcast_convert_type(words[:, self._region_words :], jnp.uint8).reshape(len(words), -1)
            batch["region_mask"] = mask[:, : self._shape[0]] != 0
        return batch


def _first_image(store: RegionSource) -> int:
    """An image that the store has; a part of a store says its first one."""
    first: int = getattr(store, "first", 0)
    return first


def _bytes(regions: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(regions).reshape(len(regions), -1).view(np.uint8)


class _Pace:
    """The number of steps of the next call of a device feed, so that no call takes much longer than 5 seconds.

    A call returns before its steps are done. The training loop then waits for the results of the call before it. Thus,
    while the device is busy, the time between the starts of two calls is the time of the call before them.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[int, float]] = []  # the steps and the start of the last three calls
        self._busy = [False, False]  # whether the latest call was running when the last two calls were asked for
        self._running: Any = None  # a result of the latest call
        self._per_step: float | None = None

    def steps(self) -> int:
        """The number of steps of the next call."""
        now = time.monotonic()
        self._busy = [self._busy[1], self._running is not None and not self._running.is_ready()]
        if all(self._busy) and len(self._calls) == 3:
            self._per_step = (now - self._calls[-1][1]) / self._calls[-2][0]
        if self._per_step is None:
            return 1
        return max(1, min(8 * self._calls[-1][0], int(_SECONDS / max(self._per_step, 1e-9))))

    def started(self, steps: int, result: Array) -> None:
        """Records a call that was just started. The first call is compiled; the second one is waited for."""
        self._running = result
        self._calls = [*self._calls[-2:], (steps, time.monotonic())]
        if len(self._calls) == 2 and self._per_step is None:
            jax.block_until_ready(result)
            self._per_step = (time.monotonic() - self._calls[-1][1]) / steps


class DeviceFeed:
    """Draws batches from features that stay in the memory of the devices, many steps per call.

    The features are split into shards, as few as fit into memory. Groups of as many devices have all shards. The
    devices of a group add up their rows of the group's part of the batch, and each gets its own part of the sum (a
    reduce-scatter of integers, in which all terms except one are 0). Batches are therefore those of the host, in the
    same order, for any number of shards. Captions are small, and every device has all of them.
    """

    def __init__(
        self,
        compile_loop: Callable[[Read, int], Loop],
        rows: Sequence[TrainingRows],
        parallel: DataParallel | MemberParallel,
        show: Say,
        compiling: Compiling = nullcontext,
        *,
        first: int = 0,
        shards: int = 1,
        longest: int = _LONGEST,
    ) -> None:
        """Reads the features and puts them on the devices.

        Args:
            compile_loop: compiles the loop that reads its batches with a function, of at most a number of steps.
            rows: of a run, or of each member of a population. They differ in their order only.
            parallel: the devices.
            show: receives lines about the progress.
            compiling: entered while the loop is compiled.
            first: the number of the first batch.
            shards: the number of devices that have all features together, a divisor of the number of devices.
            longest: the largest number of steps per call.

        Raises:
            UserError: features are damaged.
        """
        self._orders = [of.order for of in rows]
        self._members, shared = isinstance(parallel, MemberParallel), rows[0]
        assert shared.stores is not None
        self._parallel, self.shards, self._next = parallel, shards, first
        self._most_references = 0 if shared.references is None else shared.references.most
        self._regions = PackedRegions(shared.stores)
        self._rows_per_shard = size = -(-self._regions.rows // shards)

        def read(shard: int) -> npt.NDArray[np.uint32]:
            return self._regions.read(shard * size, (shard + 1) * size).reshape(size, *self._regions.shape)

        with working("putting the features on the devices", shown=is_first_process(), say=show):
            self._table = parallel.put_tables(read, (size, *self._regions.shape), shards)
        show(_in_memory(4 * size * self._regions.words, len(parallel.devices), shards))
        self._text: dict[str, Any] = {"captions": shared.captions.tokens}
        if shared.references is not None:
            self._text |= {"references": shared.references.tokens, "first": shared.references.first.astype(np.int32)}
            if shared.references.norms is not None:
                self._text["reference_norms"] = shared.references.norms
        self._text = parallel.replicate(self._text)
        self._loop = _announced(compile_loop(self._read, longest), compiling)
        self._longest, self._pace = longest, _Pace()
        per_process = np.arange(shared.config.batch_size).reshape(-1, jax.process_count())
        self._order = per_process.T.reshape(-1)  # row r of the global batch belongs to process r % process_count

    def _read(self, text: Mapping[str, Array], table: Array, numbers: Mapping[str, Array]) -> dict[str, Array]:
        """The device's part of a batch, from the numbers of the rows of all devices."""
        count = len(numbers["row"]) // self._parallel.data_devices
        device = lax.axis_index(AXIS)
        own = {name: lax.dynamic_slice_in_dim(of, device * count, count) for name, of in numbers.items()}
        batch = self._regions.unpack(self._words(table, numbers["regions"], count, device))
        batch["tokens"] = _rows_of(text["captions"], own["captions"])
        if "references" in text:
            first, end = text["first"][own["image"]], text["first"][own["image"] + 1]
            which = first[:, None] + jnp.arange(self._most_references)
            which = jnp.where(which < end[:, None], which, -1)
            for name in ("references", "reference_norms"):
                if name in text:
                    batch[name] = _rows_of(text[name], which)
            batch["reference_count"] = (end - first).astype(jnp.float32)
        batch["weight"] = jnp.ones(count, jnp.float32)
        batch["row"], batch["number"] = own["row"], own["image"]
        return batch

    def _words(self, table: Array, wanted: Array, count: int, device: Array) -> Array:
        """The packed rows of this device's part of a batch, from the numbers of the rows of all devices."""
        shards, devices = self.shards, self._parallel.data_devices
        if shards == 1:
            return table[lax.dynamic_slice_in_dim(wanted, device * count, count)].reshape(count, -1)
        in_group = device % shards
        wanted = lax.dynamic_slice_in_dim(wanted, (device - in_group) * count, shards * count)
        local = wanted - in_group * self._rows_per_shard
        here = (local >= 0) & (local < self._rows_per_shard)
        rows = table[jnp.where(here, local, 0)].reshape(len(local), -1)
        words = jnp.where(here[:, None], rows, 0)
        groups = np.arange(devices).reshape(-1, shards).tolist() if shards < devices else None
        return lax.psum_scatter(words, AXIS, axis_index_groups=groups, tiled=True)

    def run(self, state: Any, constants: Any, limit: int) -> tuple[Any, Ran]:
        """As many steps as take at most 5 seconds. See ``Feed``."""
        (count,) = self._parallel.agree(min(self._pace.steps(), self._longest, limit))
        numbers = self._numbers(range(self._next, self._next + count))
        state, metrics = self._loop(state, constants, self._text, self._table, numbers, np.int32(count))
        self._pace.started(count, next(iter(metrics.values())))
        self._next += count
        return state, Ran(count, metrics, self._next)

    def _numbers(self, batches: range) -> dict[str, npt.NDArray[np.int32]]:
        """What ``_read`` reads of these batches, [K,...] or [K,P,...] for a population; zeros after the last one."""
        draws = [[order[batch].of(self._order) for order in self._orders] for batch in batches]
        images, views, captions = (
            np.stack([np.stack([draw[of] for draw in members]) for members in draws]) for of in range(3)
        )
        rows = np.broadcast_to(self._order, images.shape)
        found = {"image": images, "regions": images * self._regions.views + views, "captions": captions, "row": rows}
        missing = self._longest - len(batches)
        return {
            name: np.pad(of if self._members else of[:, 0], [(0, missing)] + [(0, 0)] * (of.ndim - 2 + self._members))
            for name, of in ((name, of.astype(np.int32)) for name, of in found.items())
        }

    def __enter__(self) -> "DeviceFeed":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def _rows_of(table: Array, rows: Array) -> Array:
    """The rows [...] of a table as [...,T]; rows of pad for -1."""
    return jnp.where((rows >= 0)[..., None], table[jnp.maximum(rows, 0)], PAD)


def _announced(function: Compiled, compiling: Compiling) -> Compiled:
    """The step or loop, within ``compiling`` during its first call."""
    compiled = False

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if compiled:
            return function(*arguments)
        compiled = True
        with compiling():
            return jax.block_until_ready(function(*arguments))

    return cast(Compiled, call)


def open_feed(
    step: Step,
    batches: "TrainBatches",
    parallel: DataParallel,
    show: Say,
    compiling: Compiling = nullcontext,
    shards: int | None = None,
    not_stored: str = "",
) -> Feed:
    """The feed that ``data.feed`` asks for.

    Args:
        step: not compiled.
        batches: the batches of the host, at the position of the first batch.
        parallel: the devices.
        show: receives a line about where the batches come from.
        compiling: entered while the step is compiled.
        shards: see ``images_of_devices``, if it has decided which features this process has.
        not_stored: why there are no stored features.
    """
    rows = batches.rows
    first = rows.batches_before(batches.get_state())
    shards = shards or device_shards(rows, parallel, show, not_stored)
    if shards is None:
        put = lambda batch: parallel.put(device_part(batch))  # noqa: E731
        return HostFeed(parallel.compile(step), batches, put, compiling, first=first)
    compile_loop = partial(parallel.compile_loop, step)
    return DeviceFeed(compile_loop, [rows], parallel, show, compiling, first=first, shards=shards)


def device_shards(
    rows: TrainingRows, parallel: DataParallel | MemberParallel, show: Say, not_stored: str = ""
) -> int | None:
    """The number of devices that have all features together; None: the host sends the batches.

    Args:
        rows: with the setting ``data.feed``.
        parallel: the devices.
        show: receives a line if the host sends batches to accelerators, with the reason unless it was asked for.
        not_stored: why there are no stored features.
    """
    wanted, platform = rows.config.feed, parallel.devices[0].platform
    if rows.stores is None or not wants_device(wanted, platform):
        if platform != "cpu":
            show(f"batches from the host{f', because {not_stored}' if wants_device(wanted, platform) else ''}")
        return None
    regions = PackedRegions(rows.stores)
    size = 4 * regions.rows * regions.words
    shards = _shards(size, parallel)
    if shards is None:
        show(too_large(size, parallel.data_devices, _free_memory(parallel)))
    return shards


def wants_device(feed: str, platform: str) -> bool:
    """Whether ``data.feed`` asks for features in the memory of devices of this platform."""
    return feed == "device" or (feed == "auto" and platform != "cpu")


def images_of_devices(
    feed: str, counts: Sequence[int], views: int, row_bytes: int, parallel: DataParallel
) -> tuple[int, list[list[int]]] | None:
    """The images whose features the devices of this process keep, for processes that compute features on their own.

    Args:
        feed: ``data.feed``.
        counts: the number of images of each source.
        views: the number of views of an image.
        row_bytes: the size of the features of a view.
        parallel: the devices.

    Returns:
        The number of shards, for ``open_feed``, and the numbers of the images of each source. None: the host sends the
        batches, and needs all images.
    """
    rows = views * sum(counts)
    wanted = wants_device(feed, parallel.devices[0].platform)
    shards = _shards(rows * row_bytes, parallel) if wanted else None
    if shards is None:
        return None
    size = -(-rows // shards)
    own = [number for number, of in enumerate(parallel.devices) if of.process_index == jax.process_index()]
    starts = {number % shards * size for number in own}
    found: list[list[int]] = []
    first = 0
    for count in counts:
        images: set[int] = set()
        for start in starts:
            begin, end = max(0, start - first), min(start - first + size, count * views)
            images.update(range(begin // views, -(-end // views)))
        found.append(sorted(images) or [0])
        first += count * views
    return shards, found


def _shards(size: int, parallel: DataParallel | MemberParallel) -> int | None:
    """``fewest_shards`` of features of this size, the same on all processes."""
    count = parallel.data_devices
    (shards,) = parallel.agree(fewest_shards(size, count, _free_memory(parallel)) or count + 1)
    return None if shards > count else shards


def fewest_shards(size: int, devices: int, free: float) -> int | None:
    """The smallest number of devices that have room for features of this size; None: all have too little.

    Args:
        size: of the features, in bytes.
        devices: the number of devices.
        free: the free memory of each, in bytes.
    """
    numbers = (shards for shards in range(1, devices + 1) if devices % shards == 0)
    return next((shards for shards in numbers if size / shards <= _SHARE * free), None)


def _free_memory(parallel: DataParallel | MemberParallel) -> float:
    """The free memory in bytes of a device of this process, the smallest of all."""
    local = [device for device in parallel.devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in local]
    if all(found and "bytes_limit" in found for found in stats):
        return min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)
    import psutil

    return psutil.virtual_memory().available / len(local)  # devices of the CPU, which share the memory of the host


def _in_memory(size: int, devices: int, shards: int) -> str:
    """The line for features in the memory of devices, of which each has ``size`` bytes."""
    place = "1 device" if devices == 1 else f"each of {devices} devices"
    split = f", split over {shards}" if shards > 1 else ""
    return f"batches from device memory ({size / 1e9:.3g} GB on {place}{split})"


def too_large(size: int, devices: int, free: float) -> str:
    """The note for features that do not fit. See ``fewest_shards`` for the arguments."""
    each = f"{size / devices / 1e9:,.1f} GB on each of {devices} devices" if devices > 1 else f"{size / 1e9:,.1f} GB"
    return (
        f"note: the features take {each}, more than {_SHARE:.0%} of the {free / 1e9:,.1f} GB that are free there: the "
        f"host sends each batch (data.feed host)"
    )
