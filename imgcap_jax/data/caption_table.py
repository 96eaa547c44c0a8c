"""All captions of one or more sources as rows of token ids."""

import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from imgcap_jax.special_tokens import EOS, PAD, UNK

if TYPE_CHECKING:
    from imgcap_jax.data.sources import CaptionSource
    from imgcap_jax.data.vocabulary import Vocabulary


class CaptionTable:
    """The captions of images that are numbered across all sources. Image g has the rows [first[g], first[g + 1]).

    Attributes:
        tokens: int32 [C, T] for C captions, filled up with pad.
        first: [images + 1].
        words: the largest id plus 1.
    """

    def __init__(self, captions: Sequence[Sequence[Sequence[int] | npt.NDArray[np.int32]]], length: int) -> None:
        """Builds the table.

        Args:
            captions: for each image its captions, each at most `length` ids.
            length: number of ids per row, T.
        """
        self.first = np.concatenate([[0], np.cumsum([len(of_image) for of_image in captions])])
        self.tokens = np.full((self.first[-1], length), PAD, np.int32)
        for row, caption in enumerate(chain.from_iterable(captions)):
            self.tokens[row, : len(caption)] = caption
        self.words = int(self.tokens.max(initial=0)) + 1

    @classmethod
    def for_training(cls, sources: "Sequence[CaptionSource]", vocabulary: "Vocabulary", length: int) -> "CaptionTable":
        """Encodes the captions with `Vocabulary.encode`: bos, words, eos.

        Captions are cut to `length` ids. Words outside the vocabulary become unk.
        """
        captions = [
            [vocabulary.encode(caption, length) for caption in source.captions(i)]
            for source in sources
            for i in range(len(source))
        ]
        return cls(captions, length)

    @classmethod
    def as_references(
        cls, sources: "Sequence[CaptionSource]", vocabulary: "Vocabulary", *, eos: bool
    ) -> "CaptionTable":
        """Encodes whole captions as references for scoring on the device: without bos, with eos if `eos` is true.

        Each word outside the vocabulary gets an id of its own above those of the vocabulary, in order of occurrence.
        Such a word counts towards the length of a reference, but no generated word matches it.
        """
        known = {word: number for number, word in enumerate(vocabulary.words) if number > UNK}
        captions = [
            [
                [known.setdefault(word, len(known) + UNK + 1) for word in vocabulary.tokenizer(caption)] + [EOS] * eos
                for caption in source.captions(i)
            ]
            for source in sources
            for i in range(len(source))
        ]
        longest = max((len(caption) for caption in chain.from_iterable(captions)), default=0)
        return cls(captions, max(longest, 1))

    @property
    def fingerprint(self) -> str:
        """A checksum of all tokens, so that a saved state is not resumed with other captions."""
        return f"{zlib.crc32(self.tokens.tobytes()):08x}"

    @property
    def most(self) -> int:
        """The largest number of captions of an image."""
        return int(np.diff(self.first).max(initial=0))

    def count(self, image: int) -> int:
        """The number of captions of an image."""
        return int(self.first[image + 1] - self.first[image])

    def rows(self, image: int, which: npt.ArrayLike, count: int) -> npt.NDArray[np.int32]:
        """The image's captions with indices `which` (at most `count`) as [count, T], filled up with rows of pad."""
        chosen = self.tokens[self.first[image] + np.asarray(which, np.int64)]
        padded = np.full((count, self.tokens.shape[1]), PAD, np.int32)
        padded[: len(chosen)] = chosen
        return padded

    def captions(self) -> Iterator[list[list[int]]]:
        """Yields for each image the ids of its captions, without pad."""
        for start, end in zip(self.first[:-1], self.first[1:], strict=True):
            yield [row[row != PAD].tolist() for row in self.tokens[start:end]]
