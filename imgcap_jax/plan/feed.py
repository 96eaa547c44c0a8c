"""The feed of a planned training step: the one of training, whose loop is compiled in place of being run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.order import Draw
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.training.feed import DeviceFeed, PackedRegions, fewest_shards, too_large, wants_device
from imgcap_jax.training.parallel import DataParallel, Step

ArrayShape = tuple[tuple[int, ...], Any]
"""The shape and the dtype of an array."""


@dataclass(frozen=True)
class FeedPlan:
    """What gives the devices their batches.

    Attributes:
        shards: the number of devices that have all features together; None: the host sends the batches.
        bytes: of the features of all images and views; 0 if none are stored.
        devices: the number of devices.
        note: why the host sends the batches, if ``data.feed`` asks for the memory of the devices; otherwise "".
    """

    shards: int | None
    bytes: int
    devices: int
    note: str = ""

    @property
    def resident(self) -> float:
        """Bytes of features in the memory of each device."""
        return self.bytes / self.shards if self.shards else 0.0


class AbstractParallel(DataParallel):
    """Data parallelism over devices that need not be present: what would be put on them keeps its shape only."""

    def replicate(self, tree: Any) -> Any:
        """The shapes of a tree, placed on all devices."""
        return super().replicate(jax.tree.map(shape_of, tree))

    def put_tables(self, read: Callable[[int], np.ndarray], shape: tuple[int, ...], shards: int) -> Any:
        """The shape of a table, of which nothing is read."""
        whole = (len(self.devices) * shape[0], *shape[1:])
        return jax.ShapeDtypeStruct(whole, np.uint32, sharding=self._cut)


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf of a pytree."""
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


class _Regions:
    """Regions of a number of images, all of them zero."""

    def __init__(self, images: int, views: int, regions: ArrayShape, masked: bool) -> None:
        self._images, self.views, self._regions = images, views, regions
        self._mask = np.zeros(regions[0][0], np.bool_) if masked else None

    def __len__(self) -> int:
        return self._images

    def read(self, i: int, view: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        return np.zeros(*self._regions), self._mask


class _Order:
    """An order in which each row is the first one. Only its shapes matter."""

    def __init__(self, images: int, captions: int) -> None:
        self._images, self._captions = images, captions

    def __getitem__(self, batch: int) -> Draw:
        images = np.zeros(self._images, np.int64)
        return Draw(images, images.astype(np.int32), np.zeros((self._images, self._captions), np.int32))


class PlannedRows:
    """What a ``DeviceFeed`` reads of ``TrainingRows``, in the sizes of data that need not be prepared."""

    def __init__(
        self,
        config: CaptionData,
        inputs: Mapping[str, ArrayShape],
        *,
        batch: int,
        images: int,
        captions: int,
        references: CaptionTable | None,
    ) -> None:
        """Makes shapes.

        Args:
            config: settings.
            inputs: the "regions" of an image, and its "region_mask" if the number of regions varies.
            batch: the global batch size.
            images: the number of different images.
            captions: the number of their captions.
            references: the references that batches contain.
        """
        self.config = SimpleNamespace(batch_size=batch)
        self.stores = [_Regions(images, config.views, inputs["regions"], "region_mask" in inputs)]
        self.order = _Order(batch, config.captions_per_image)
        self.captions = SimpleNamespace(tokens=np.broadcast_to(np.int32(0), (captions, config.max_words + 2)))
        self.references = references

    def feed(self, wanted: str, parallel: DataParallel, free: float) -> FeedPlan:
        """The feed that training would choose.

        Args:
            wanted: ``data.feed``.
            parallel: the devices.
            free: bytes of memory of a device that the state of training leaves.
        """
        packed = PackedRegions(self.stores)
        size, devices = 4 * packed.rows * packed.words, parallel.data_devices
        if not wants_device(wanted, parallel.devices[0].platform):
            return FeedPlan(None, size, devices)
        shards = fewest_shards(size, devices, free)
        return FeedPlan(shards, size, devices, too_large(size, devices, free) if shards is None else "")


def device_loop(
    step: Step, rows: PlannedRows, parallel: AbstractParallel, shards: int, state: Any, constants: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    """The loop of a ``DeviceFeed``.

    Args:
        step: not compiled.
        rows: the data.
        parallel: the devices.
        shards: the number of devices that have all features together.
        state, constants: the shapes of what the step reads.

    Returns:
        The loop, the shapes of its arguments, and the bytes that the host sends to each device per step.
    """
    called: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    sent = 0

    def compile_loop(read: Callable[..., Any], longest: int) -> Any:
        loop = parallel.compile_loop(step, read, longest)

        def record(*arguments: Any) -> tuple[None, dict[str, np.ndarray]]:
            nonlocal sent
            *shapes, numbers, count = arguments
            sent = sum(leaf.nbytes for leaf in jax.tree.leaves(numbers)) // longest
            called.append((loop, (*shapes, *map(parallel.replicate, (numbers, count)))))
            return None, {"": np.zeros(longest)}

        return record

    known: Any = rows
    with DeviceFeed(compile_loop, [known], parallel, lambda line: None, shards=shards) as feed:
        feed.run(state, constants, 1)
    ((loop, arguments),) = called
    return loop, arguments, sent
