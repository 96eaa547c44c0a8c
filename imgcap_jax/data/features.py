"""Region features of a frozen encoder, computed once and kept on disk.

A store is a folder named by the hash of everything that its values depend on. If any of that changes, new features are
computed. A build that was killed continues where it stopped.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgcap_jax.data.builders.layout import PREPARE_AGAIN
from imgcap_jax.data.feature_files import (
    DTYPES,
    Dtype,
    FeatureWriter,
    check_is_of,
    check_row,
    explaining,
    is_finished,
    map_regions,
    read_digests,
    read_manifest,
)
from imgcap_jax.data.image_files import ImageError, Pixels
from imgcap_jax.data.images import Augmentation, Resize, augment, decode, names_side
from imgcap_jax.errors import UserError
from imgcap_jax.terminal import working

if TYPE_CHECKING:
    from imgcap_jax.data.sources import CaptionExample, CaptionSource

Encode = Callable[[Pixels], npt.ArrayLike]

VIEW_AUGMENTATION = Augmentation(crop_scale_min=0.5, flip=True)
"""The default augmentation of the views from 1 on."""
# Separates the random numbers of the views from those of other uses of (image, view).
_VIEW_STREAM = 0x76696577
# A crash loses at most this many batches per process. Syncing the disk after every batch would be slow.
_BLOCK_BATCHES = 16
_WAIT_SECONDS = 0.5


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

    def read_many(self, images: npt.NDArray[np.int64], views: npt.NDArray[np.int32]) -> tuple[npt.NDArray[Any], None]:
        """The regions [B, N, D] of these views [B] of these images [B]. See `regions.read_regions`."""
        if self._digests is not None:
            unread = ~self._checked[images, views]
            for image, view in zip(images[unread].tolist(), views[unread].tolist(), strict=True):
                _ = self[image, view]
        return self._stored[images, views].view(self._dtype), None

    def read(self, i: int, view: int) -> tuple[npt.NDArray[Any], None]:
        """Implements `RegionSource.read`. The mask is None, because all regions exist."""
        return self[i, view], None

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
    ) -> "FeatureStore":
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
        fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        folder = root / fingerprint[:16]

        def view_of(row: int) -> Pixels:
            i, view = divmod(row, views)
            example = source[i]
            try:
                return _view(example, i, view, image_size, resize, augmentation)
            except ImageError as error:
                raise UserError(f"{source.name}: {example.filename}: {error}; {PREPARE_AGAIN}") from error

        shape = (len(source), views, *regions)
        writer = FeatureWriter(folder, identity, fingerprint, shape, dtype)
        with explaining(folder):
            # A finished store may be on a read-only disk.
            if not is_finished(folder):
                with writer.open(_BLOCK_BATCHES * batch_size):
                    _fill(writer, view_of, encode, image_size, batch_size, progress)
                    writer.finish()
        store = FeatureStore(folder)
        check_is_of(folder, store.manifest, {"shape": list(shape), "dtype": dtype, "fingerprint": fingerprint})
        return store


def _view(
    example: "CaptionExample", i: int, view: int, size: int, resize: Resize, augmentation: Augmentation
) -> Pixels:
    if view == 0:
        return decode(example.image, size, resize)
    if view == 1 and augmentation.flip and not names_side(example.captions, augmentation.side_words):
        return np.ascontiguousarray(decode(example.image, size, resize)[:, ::-1])
    rng = np.random.default_rng([_VIEW_STREAM, i, view])
    return augment(example.image, example.captions, size, rng, augmentation, resize)


def _fill(
    writer: FeatureWriter,
    view_of: Callable[[int], Pixels],
    encode: Encode,
    image_size: int,
    batch_size: int,
    progress: bool,
) -> None:
    """Computes free blocks until none is left, then waits for other processes and takes over blocks they abandon."""

    def batches() -> Iterator[range]:
        for block in writer.free_blocks():
            yield from (block[start : start + batch_size] for start in range(0, len(block), batch_size))

    images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
    if progress:
        size = f"{writer.rows:,} x {writer.shape[2]} x {writer.shape[3]}, {writer.nbytes / 1e9:.2f} GB"
        print(f"features: {size} in {writer.folder}", file=sys.stderr, flush=True)
    unit = "images" if writer.shape[1] == 1 else "views"
    done, compiled = writer.done, False
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        working("features", writer.rows, unit, done=done, shown=progress) as work,
    ):

        def decoded(rows: range | None) -> list[Future[Pixels]]:
            return [pool.submit(view_of, row) for row in rows or ()]

        try:
            while writer.done < writer.rows:
                waiting = batches()
                rows = next(waiting, None)
                pending = decoded(rows)
                while rows is not None:
                    for place, future in enumerate(pending):
                        images[place] = future.result()
                    # The last batch is padded to the shape of all others, so that encode compiles once.
                    images[len(rows) :] = 0
                    # The next batch is decoded while this one is encoded.
                    following = next(waiting, None)
                    pending = decoded(following)
                    with working("compiling the encoder", shown=progress and not compiled):
                        regions = np.asarray(encode(images), np.float32)
                    writer.write(rows.start, regions[: len(rows)])
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
