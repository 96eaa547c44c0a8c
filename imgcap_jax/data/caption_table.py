"""All captions of one or more sources as rows of token ids."""

import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from imgcap_jax.data.caption_tokens import CaptionTokens
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK

if TYPE_CHECKING:
    from imgcap_jax.data.sources import CaptionSource
    from imgcap_jax.data.vocabulary import Vocabulary


class CaptionTable:
    """The captions of images that are numbered across all sources. Image g has the rows [first[g], first[g + 1]).

    Attributes:
        tokens: int32 [C, T] for C captions, filled up with pad.
        first: [images + 1].
        words: the largest id plus 1.
        most: the largest number of captions of an image.
        norms: float32 [C, n], numbers that belong to each caption, or None. Batches of references contain them too.
    """

    def __init__(self, tokens: npt.NDArray[np.int32], per_image: npt.ArrayLike) -> None:
        """Takes rows of ids [C, T], and the number of captions of each image [images]."""
        self.first = np.concatenate([[0], np.cumsum(per_image, dtype=np.int64)])
        self.tokens = tokens
        self.words = int(self.tokens.max(initial=0)) + 1
        self.norms: npt.NDArray[np.float32] | None = None
        self.most = int(np.diff(self.first).max(initial=0))

    @classmethod
    def for_training(cls, sources: "Sequence[CaptionSource]", vocabulary: "Vocabulary", length: int) -> "CaptionTable":
        """Encodes the captions as `Vocabulary.encode` does: bos, words, eos.

        Captions are cut to `length` ids. Words outside the vocabulary become unk.
        """
        splits = [CaptionTokens.of(source, vocabulary.tokenizer) for source in sources]
        return cls._filled(splits, [vocabulary.ids(split.words) for split in splits], length, bos=True, eos=True)

    @classmethod
    def as_references(
        cls, sources: "Sequence[CaptionSource]", vocabulary: "Vocabulary", *, eos: bool
    ) -> "CaptionTable":
        """Encodes whole captions as references for scoring on the device: without bos, with eos if `eos` is true.

        Each word outside the vocabulary gets an id of its own above those of the vocabulary, in order of occurrence.
        Such a word counts towards the length of a reference, but no generated word matches it.
        """
        known = {word: number for number, word in enumerate(vocabulary.words) if number > UNK}
        splits = [CaptionTokens.of(source, vocabulary.tokenizer) for source in sources]
        ids = [[known.setdefault(word, len(known) + UNK + 1) for word in split.words] for split in splits]
        longest = max((int(split.lengths.max(initial=0)) + eos for split in splits if len(split.lengths)), default=0)
        return cls._filled(splits, ids, max(longest, 1), bos=False, eos=eos)

    @classmethod
    def _filled(
        cls, splits: Sequence[CaptionTokens], ids: Sequence[Sequence[int]], length: int, *, bos: bool, eos: bool
    ) -> "CaptionTable":
        """Fills the rows of a table. A caption that does not fit with its bos and eos has no eos and is cut.

        Args:
            splits: the captions.
            ids: the id of each of `words`, for each split.
            length: number of ids per row, T.
            bos, eos: whether captions begin with bos and end with eos.
        """
        tokens = np.full((sum(len(split.lengths) for split in splits), length), PAD, np.int32)
        first = 0
        for split, of_words in zip(splits, ids, strict=True):
            rows = tokens[first : first + len(split.lengths)]
            first += len(rows)
            if bos:
                rows[:, 0] = BOS
            room = length - bos - eos
            column, end = np.arange(length), bos + np.minimum(split.lengths, room)
            kept = split.numbers[split.places < room]
            rows[(column >= bos) & (column < end[:, None])] = np.asarray(of_words, np.int32)[kept]
            if eos:
                (whole,) = np.nonzero(split.lengths <= room)
                rows[whole, split.lengths[whole] + bos] = EOS
        return cls(tokens, np.concatenate([split.per_image for split in splits]) if splits else [])

    @property
    def fingerprint(self) -> str:
        """A checksum of all tokens, so that a saved state is not resumed with other captions."""
        return f"{zlib.crc32(self.tokens.tobytes()):08x}"

    def choose(self, images: npt.NDArray[np.int64], keys: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int32]:
        """Chooses `count` captions of each image without replacement: those with the smallest keys.

        Args:
            images: [B].
            keys: [B, most], a number below 1 for each caption of each image.
            count: M.

        Returns:
            Rows of the table, int32 [B, M]; -1: the image has fewer than M captions.
        """
        first, there = self.first[images], self.counts(images)
        order = np.argsort(np.where(np.arange(self.most) < there[:, None], keys, 1.0), axis=1, kind="stable")[:, :count]
        return self._rows(first, there, order, count)

    def first_rows(self, images: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int32]:
        """The rows of the first `count` captions of each image [B], int32 [B, count]; -1: there are fewer."""
        first, there = self.first[images], self.counts(images)
        return self._rows(first, there, np.broadcast_to(np.arange(count), (len(images), count)), count)

    def _rows(
        self,
        first: npt.NDArray[np.int64],
        there: npt.NDArray[np.int64],
        which: npt.NDArray[np.int64],
        count: int,
    ) -> npt.NDArray[np.int32]:
        rows = np.full((len(first), count), -1, np.int32)
        width = which.shape[1]
        exist = np.arange(width) < there[:, None]
        rows[:, :width][exist] = (first[:, None] + which)[exist]
        return rows

    def read(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The captions in these rows [...] as int32 [..., T]; rows of pad for -1."""
        return np.where(rows[..., None] >= 0, self.tokens[rows], np.int32(PAD))

    def read_norms(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """The norms of the captions in these rows [...] as float32 [..., n]; 0 for -1."""
        assert self.norms is not None
        return np.where(rows[..., None] >= 0, self.norms[rows], np.float32(0))

    def counts(self, images: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The number of captions of each image."""
        return self.first[images + 1] - self.first[images]

    def captions(self) -> Iterator[list[list[int]]]:
        """Yields for each image the ids of its captions, without pad."""
        for start, end in zip(self.first[:-1], self.first[1:], strict=True):
            yield [row[row != PAD].tolist() for row in self.tokens[start:end]]
