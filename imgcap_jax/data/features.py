"""Region features of a frozen encoder, computed once and kept on disk.

A store is a folder named by the hash of everything that its values depend on. If any of that changes, new features are
computed. A build that was killed continues where it stopped.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgcap_jax.data.builders.layout import PREPARE_AGAIN
from imgcap_jax.data.feature_files import (
    DTYPES,
    ENCODER,
    MANIFEST,
    WORKING_FILES,
    Dtype,
    FeatureWriter,
    check_is_of,
    check_row,
    explaining,
    is_finished,
    map_regions,
    read_counts,
    read_digests,
    read_manifest,
)
from imgcap_jax.data.image_files import ImageError, Pixels
from imgcap_jax.data.images import Augmentation, Resize, augment, decode, names_side
from imgcap_jax.errors import UserError
from imgcap_jax.files import json_digest
from imgcap_jax.remote import files_in, pull_tree, push_tree
from imgcap_jax.terminal import working

if TYPE_CHECKING:
    from imgcap_jax.data.regions import ReadyRegions
    from imgcap_jax.data.sources import CaptionExample, CaptionSource

Encode = Callable[[Pixels], npt.ArrayLike]

VIEW_AUGMENTATION = Augmentation(crop_scale_min=0.5, flip=True)
"""The default augmentation of the views from 1 on."""
# Separates the random numbers of the views from those of other uses of (image, view).
_VIEW_STREAM = 0x76696577
# A crash loses at most this many batches per process. Syncing the disk after every batch would be slow.
_BLOCK_BATCHES = 16
_WAIT_SECONDS = 0.5
_BATCH_OF_FILES = 64


class FeatureStore:
    """Features on disk: `store[i, view]` is [N, D], float16 or bfloat16. Picklable; any number of readers.

    Each process checks each row against its digest when it first reads it (0.1 ms for 49 x 1280 features). Training
    reads one random view per image and epoch. With V views, all rows of the first epoch are new, and about 1/e of those
    of epoch V.

    Attributes:
        folder: folder of the store.
        shape: (I, views, N, D).
        views: number of views per image. View 0 is the plain image; `build` describes the others.
        manifest: contents of the manifest, including the key of the features.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a finished store.

        Raises:
            UserError: the folder contains no store, or the store is unfinished or damaged.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.shape: tuple[int, int, int, int] = tuple(self.manifest["shape"])
        self.views = self.shape[1]
        if not is_finished(folder):
            raise UserError(
                f"{folder}: not all of its {self.shape[0] * self.views} feature rows are computed; "
                "run the extraction again to continue"
            )
        self._stored = map_regions(folder, self.manifest)
        self._dtype = DTYPES[self.manifest["dtype"]]
        self._digests = read_digests(folder, self.manifest)
        self._counts = read_counts(folder, self.manifest)
        self._checked = np.zeros(self.shape[:2], np.bool_)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.folder,)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, image_and_view: tuple[int, int]) -> npt.NDArray[Any]:
        """The regions [N, D] of a view of an image.

        Raises:
            UserError: they have changed since they were written.
        """
        stored = self._stored[image_and_view]
        if self._digests is not None and not self._checked[image_and_view]:
            image, view = (range(count)[n] for n, count in zip(image_and_view, self.shape, strict=False))
            check_row(self.folder, self._digests, image * self.views + view, stored)
            self._checked[image_and_view] = True
        return stored.view(self._dtype)

    def read_many(
        self, images: npt.NDArray[np.int64], views: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """The regions [B, N, D] of these views [B] of these images [B], and their mask. See `regions.read_regions`."""
        if self._digests is not None:
            unread = ~self._checked[images, views]
            for image, view in zip(images[unread].tolist(), views[unread].tolist(), strict=True):
                _ = self[image, view]
        mask = None
        if self._counts is not None:
            mask = np.arange(self.shape[2]) < self._counts[images * self.views + views, None]
        return self._stored[images, views].view(self._dtype), mask

    def read(self, i: int, view: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """Implements `RegionSource.read`. The mask is None if all images have N regions."""
        mask = None if self._counts is None else np.arange(self.shape[2]) < self._counts[i * self.views + view]
        return self[i, view], mask

    @staticmethod
    def build(
        source: "CaptionSource",
        encode: Encode,
        *,
        regions: tuple[int, int],
        key: Mapping[str, Any],
        root: Path,
        views: int = 1,
        image_size: int = 224,
        resize: Resize = "squash",
        augmentation: Augmentation = VIEW_AUGMENTATION,
        batch_size: int = 64,
        dtype: Dtype = "float16",
        progress: bool = True,
        images: Sequence[int] | None = None,
    ) -> "FeatureStore | PartOfStore":
        """Computes the missing rows of the store of these features, then opens the store.

        Several processes that build the same store at the same time share the work.

        View 0 is the plain image. View 1 is its mirror image if `augmentation` flips and no caption names a side;
        otherwise it is a random crop. Views from 2 on are random crops, flips and jitter as `augmentation` says. Each
        view depends on (image, view) only.

        Args:
            source: the images.
            encode: uint8 [batch_size, image_size, image_size, 3] -> [batch_size, N, D]; always called with
                this shape.
            regions: (N, D).
            key: everything else that the features depend on: dataset and version, split, encoder, fingerprint of
                its weights.
            root: folder of all stores. This store is root/<hash of the key and of these arguments>.
            views: number of views per image.
            image_size: side length of the images in pixels.
            resize: see `images.decode`.
            augmentation: augmentation of the views from 1 on.
            batch_size: number of images encoded at once.
            dtype: dtype of the stored features.
            progress: whether to show size, rate and remaining time on stderr.
            images: the numbers of the images to compute; the store then has only these. None: all of them.

        Raises:
            UserError: the disk has no space, the store is damaged, an image cannot be decoded, a value does not fit
                the dtype, or `augmentation` has no crop for several views. Finished blocks of rows are kept.
        """
        if views > 1 and augmentation.crop_scale_min >= 1:
            raise UserError(
                f"views={views} needs random crops, by which views differ; set augmentation.crop_scale_min below 1"
            )
        identity = {
            "key": {name: str(value) for name, value in key.items()},
            "images": len(source),
            "captions": _captions_fingerprint(source),
            "image_size": image_size,
            "resize": resize,
            "views": views,
            "augmentation": repr(augmentation) if views > 1 else "none",
            "dtype": dtype,
            "format": 2,
        }

        def view_of(i: int, view: int) -> Pixels:
            example = source[i]
            try:
                return _view(example, i, view, image_size, resize, augmentation)
            except ImageError as error:
                raise UserError(f"{source.name}: {example.filename}: {error}; {PREPARE_AGAIN}") from error

        pixels = np.zeros((batch_size, image_size, image_size, 3), np.uint8)

        def encoded(images: Sequence[Pixels]) -> npt.NDArray[np.float32]:
            for place, image in enumerate(images):
                pixels[place] = image
            # The last batch is padded to the shape of all others, so that encode compiles once.
            pixels[len(images) :] = 0
            return np.asarray(encode(pixels), np.float32)[: len(images)]

        rows = _Rows(view_of, encoded, batch_size, ENCODER, "compiling the encoder")
        return _built(rows, identity, (len(source), views, *regions), dtype, root, images, progress)

    @staticmethod
    def of_regions(
        regions: "ReadyRegions",
        *,
        root: Path,
        dtype: Dtype = "float16",
        progress: bool = True,
        images: Sequence[int] | None = None,
    ) -> "FeatureStore | PartOfStore":
        """Copies ready-made regions into a store, which is read many times as fast as their files.

        Values are rounded to `dtype`. An image with fewer than N regions takes the space of N.

        Args:
            regions: the regions.
            root: folder of all stores. This store is root/<hash of the settings and of the files' names, sizes and
                times>.
            dtype: dtype of the stored regions.
            progress: see `build`.
            images: see `build`.

        Raises:
            UserError: as `build`, and as `ReadyRegions.read`.
        """
        identity = {"key": regions.identity(), "images": len(regions), "dtype": dtype, "format": 2}

        def read(i: int, view: int) -> tuple[npt.NDArray[Any], int]:
            values, mask = regions.read(i, view)
            return values, int(mask.sum())

        source = "ready-made regions", "their files"
        rows = _Rows(read, lambda read: np.stack([values for values, _ in read]), _BATCH_OF_FILES, source, counted=True)
        return _built(rows, identity, (len(regions), 1, *regions.shape), dtype, root, images, progress)


class PartOfStore:
    """A store of some images of a split, which are read by their numbers in the split. See `RegionSource`."""

    def __init__(self, store: FeatureStore, images: Sequence[int], count: int) -> None:
        """Reads nothing yet.

        Args:
            store: the regions of these images only.
            images: their numbers in the split.
            count: the number of images of the split.
        """
        self.store = store
        self.views = store.views
        self.first = images[0]
        self._images = images
        self._places = {image: place for place, image in enumerate(images)}
        self._count = count

    def __reduce__(self) -> tuple[Any, ...]:
        return PartOfStore, (self.store, self._images, self._count)

    def __len__(self) -> int:
        return self._count

    def read(self, i: int, view: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """See `RegionSource`. KeyError: image i is not in this part."""
        return self.store.read(self._places[i], view)

    def read_many(
        self, images: npt.NDArray[np.int64], views: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """See `FeatureStore.read_many`. KeyError: an image is not in this part."""
        return self.store.read_many(np.array([self._places[i] for i in images.tolist()], np.int64), views)


@dataclass(frozen=True)
class _Rows:
    """How the rows of a store are computed.

    read: (image, view) -> what a row is computed from; called in threads. If `counted`, a pair of it and the number of
    regions. compute: a list of at most `batch` of these -> regions [n, N, D]. source: see `FeatureWriter`. compiling:
    what the first call compiles.
    """

    read: Callable[[int, int], Any]
    compute: Callable[[Sequence[Any]], npt.NDArray[np.float32]]
    batch: int
    source: tuple[str, str]
    compiling: str = ""
    counted: bool = False


def _built(
    rows: _Rows,
    identity: Mapping[str, Any],
    shape: tuple[int, int, int, int],
    dtype: Dtype,
    root: Path,
    images: Sequence[int] | None,
    progress: bool,
) -> FeatureStore | PartOfStore:
    """The store [I, views, N, D] of this identity, or its part with these images. Missing rows are computed."""
    fingerprint = json_digest(identity)
    if images is not None and len(images) < shape[0]:
        whole = root / fingerprint[:16]
        of_part = {**identity, "part": json_digest(list(images))}
        part = json_digest(of_part)
        # A part that is here needs no bucket.
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if is_finished(whole) or (not is_finished(root / part[:16]) and _fits(whole, size) and _is_ready(whole)):
            images = None
        else:
            identity, fingerprint, shape = of_part, part, (len(images), *shape[1:])
    else:
        images = None
    folder = root / fingerprint[:16]
    writer = FeatureWriter(folder, identity, fingerprint, shape, dtype, rows.source, counted=rows.counted)
    # A finished store may be on a read-only disk.
    if not _is_ready(folder):
        with explaining(folder):
            with writer.open(_BLOCK_BATCHES * rows.batch):
                _fill(writer, rows, images, progress)
                writer.finish()
            push_tree(folder, MANIFEST, WORKING_FILES)
    store = FeatureStore(folder)
    check_is_of(folder, store.manifest, {"shape": list(shape), "dtype": dtype, "fingerprint": fingerprint})
    return store if images is None else PartOfStore(store, images, int(identity["images"]))


def _fits(folder: Path, size: int) -> bool:
    """Whether a store of this size leaves half of the free space to datasets and checkpoints."""
    there = sum(file.size for file in files_in(folder).values())  # of an interrupted copy
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return 2 * (size - there) <= shutil.disk_usage(place).free


def _is_ready(folder: Path) -> bool:
    """Whether all rows of a store are here. If they are in its bucket only, they are copied."""
    with explaining(folder):
        if not is_finished(folder):
            pull_tree(folder, MANIFEST)
        return is_finished(folder)


def _view(
    example: "CaptionExample", i: int, view: int, size: int, resize: Resize, augmentation: Augmentation
) -> Pixels:
    if view == 0:
        return decode(example.image, size, resize)
    if view == 1 and augmentation.flip and not names_side(example.captions, augmentation.side_words):
        return np.ascontiguousarray(decode(example.image, size, resize)[:, ::-1])
    rng = np.random.default_rng([_VIEW_STREAM, i, view])
    return augment(example.image, example.captions, size, rng, augmentation, resize)


def _fill(writer: FeatureWriter, rows_of: _Rows, images: Sequence[int] | None, progress: bool) -> None:
    """Computes free blocks until none is left, then waits for other processes and takes over blocks they abandon."""

    def batches() -> Iterator[range]:
        for block in writer.free_blocks():
            yield from (block[start : start + rows_of.batch] for start in range(0, len(block), rows_of.batch))

    def read(row: int) -> Any:
        place, view = divmod(row, writer.shape[1])
        return rows_of.read(place if images is None else images[place], view)

    if progress:
        size = f"{writer.rows:,} x {writer.shape[2]} x {writer.shape[3]}, {writer.nbytes / 1e9:.2f} GB"
        print(f"features: {size} in {writer.folder}", file=sys.stderr, flush=True)
    unit = "images" if writer.shape[1] == 1 else "views"
    done, compiled = writer.done, not rows_of.compiling
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        working("features", writer.rows, unit, done=done, shown=progress) as work,
    ):

        def decoded(rows: range | None) -> list[Future[Any]]:
            return [pool.submit(read, row) for row in rows or ()]

        try:
            while writer.done < writer.rows:
                waiting = batches()
                rows = next(waiting, None)
                pending = decoded(rows)
                while rows is not None:
                    found = [future.result() for future in pending]
                    # The next batch is decoded while this one is encoded.
                    following = next(waiting, None)
                    pending = decoded(following)
                    with working(rows_of.compiling, shown=progress and not compiled):
                        regions = rows_of.compute(found)
                    writer.write(rows.start, regions, [count for _, count in found] if rows_of.counted else None)
                    done += len(rows)
                    if following is None or following.start != rows.stop:
                        done = writer.done  # includes the rows of other processes
                    if compiled:
                        work.update(done)
                    else:
                        work.restart(done)
                        compiled = True
                    rows = following
                if writer.done < writer.rows:
                    time.sleep(_WAIT_SECONDS)
                    work.update(writer.done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _captions_fingerprint(source: "CaptionSource") -> str:
    """A hash of the image ids and of the captions, which decide which images may be mirrored."""
    digest = hashlib.sha256()
    for i, image_id in enumerate(source.image_ids()):
        digest.update(json.dumps([int(image_id), *source.captions(i)]).encode())
    return digest.hexdigest()[:16]
