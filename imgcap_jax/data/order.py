"""The random order of training: which images, views and captions each batch has.

A batch is a function of the seed and its number. It does not depend on the number of processes or devices, and no batch
before it has to be computed. The numbers of a batch are small. The host reads the rows that they name, or sends the
numbers to devices that have all rows in their memory.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.mixtures import interleave

VERSION = 2
"""Changes with every change of the order. A saved position of another version cannot be continued."""
_EPOCHS, _BATCHES, _ROWS = 0, 1, 2  # streams of random numbers
_KEPT = 8  # batches that several threads read row by row


class Draw(NamedTuple):
    """The numbers of one batch.

    Attributes:
        images: int64 [B], the numbers of the images in the mixture.
        views: int32 [B], a view of each image.
        captions: int32 [B,M], rows of the caption table; -1: the image has fewer than M captions.
    """

    images: npt.NDArray[np.int64]
    views: npt.NDArray[np.int32]
    captions: npt.NDArray[np.int32]

    def of(self, rows: slice | npt.NDArray[np.int64]) -> "Draw":
        """The numbers of these rows."""
        return Draw(self.images[rows], self.views[rows], self.captions[rows])


class Order:
    """The order of a mixture. Picklable, and safe to use from several threads.

    Attributes:
        first: the number of the first image of each source. Images are numbered across the mixture.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rows_per_epoch: Sequence[int],
        captions: CaptionTable,
        *,
        seed: int,
        batch_size: int,
        captions_per_image: int,
        views: int = 1,
    ) -> None:
        """Draws nothing yet.

        Args:
            sizes: the number of images of each source.
            rows_per_epoch: the number of rows that each source provides per epoch.
            captions: the captions of all images.
            seed: determines everything that is drawn.
            batch_size: B.
            captions_per_image: M.
            views: the number of views of each image.
        """
        self.first = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        self._sizes, self._rows_per_epoch, self._captions = list(sizes), list(rows_per_epoch), captions
        self._seed, self._batch_size, self._count, self._views = seed, batch_size, captions_per_image, views
        self._permutations: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        self._batches: dict[int, Draw] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_lock": None, "_permutations": {}, "_batches": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __getitem__(self, batch: int) -> Draw:
        """The numbers of the batch with this number. Every epoch is a new permutation of the images of a source."""
        with self._lock:
            if batch not in self._batches:
                while len(self._batches) >= _KEPT:
                    self._batches.pop(next(iter(self._batches)))
                self._batches[batch] = self._draw(batch)
            return self._batches[batch]

    def _draw(self, batch: int) -> Draw:
        start = batch * self._batch_size
        of, places = interleave(self._rows_per_epoch, np.arange(start, start + self._batch_size))
        images = np.empty(self._batch_size, np.int64)
        for source in np.unique(of).tolist():
            rows = of == source
            images[rows] = self.first[source] + self._shuffled(source, places[rows])
        rng = np.random.default_rng([self._seed, _BATCHES, batch])
        views = rng.integers(self._views, size=self._batch_size, dtype=np.int32)
        keys = rng.random((self._batch_size, self._captions.most), np.float32)
        return Draw(images, views, self._captions.choose(images, keys, self._count))

    def _shuffled(self, source: int, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The images of a source at these places, in ascending order, of its endless sequence of permutations."""
        epochs, within = np.divmod(places, self._sizes[source])
        images = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            images[rows] = self._permutation(source, epoch)[within[rows]]
        return images

    def _permutation(self, source: int, epoch: int) -> npt.NDArray[np.int64]:
        key = source, epoch
        if key not in self._permutations:
            for old in [old for old in self._permutations if old[0] == source and abs(old[1] - epoch) > 1]:
                del self._permutations[old]
            rng = np.random.default_rng([self._seed, _EPOCHS, source, epoch])
            self._permutations[key] = rng.permutation(self._sizes[source])
        return self._permutations[key]

    def rng(self, batch: int, row: int) -> np.random.Generator:
        """The random numbers of a row of a batch, for augmentation."""
        return np.random.default_rng([self._seed, _ROWS, batch, row])
