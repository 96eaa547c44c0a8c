"""The tokens of all captions of a split, as numbers.

Vocabulary, notes and tables of captions need the same tokens. A process tokenises the captions of a source once.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from imgcap_jax.tokenizers import Tokenizer, tokens_of

if TYPE_CHECKING:
    from imgcap_jax.data.sources import CaptionSource


@dataclass(frozen=True, eq=False)
class CaptionTokens:
    """The tokens of C captions of I images: 4 bytes per token, 24 MB for COCO's training captions.

    Attributes:
        tokenizer: what split the captions.
        words: the different tokens, in the order of their first occurrence.
        numbers: the index in ``words`` of each token of each caption, one caption after another, int32.
        lengths: the number of tokens of each caption, int32 [C].
        per_image: the number of captions of each image, int32 [I].
        characters: the number of characters of all captions, without blanks.
    """

    tokenizer: Tokenizer
    words: tuple[str, ...]
    numbers: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    per_image: npt.NDArray[np.int32]
    characters: int

    @classmethod
    def of(cls, source: "CaptionSource", tokenizer: Tokenizer) -> "CaptionTokens":
        """The tokens of a source. They are kept as long as the source.

        Raises:
            UserError: see ``tokens_of``.
        """
        kept = _KEPT.get(source)
        if kept is None or kept.tokenizer != tokenizer:
            kept = _KEPT[source] = cls.of_images((source.captions(i) for i in range(len(source))), tokenizer)
        return kept

    @classmethod
    def of_images(cls, images: Iterable[Sequence[str]], tokenizer: Tokenizer) -> "CaptionTokens":
        """The tokens of the captions of each image. Raises as ``of``."""
        known: dict[str, int] = {}
        numbers, lengths, per_image, characters = array("i"), array("i"), array("i"), 0
        for captions in images:
            per_image.append(len(captions))
            for caption in captions:
                tokens = tokens_of(caption, tokenizer)
                numbers.extend([known.setdefault(token, len(known)) for token in tokens])
                lengths.append(len(tokens))
                characters += len(caption) - caption.count(" ")
        return cls(
            tokenizer,
            tuple(known),
            np.array(numbers, np.int32),
            np.array(lengths, np.int32),
            np.array(per_image, np.int32),
            characters,
        )

    def counts(self) -> Counter[str]:
        """The number of occurrences of each word."""
        count = np.bincount(self.numbers, minlength=len(self.words))
        return Counter(dict(zip(self.words, count.tolist(), strict=True)))

    @property
    def places(self) -> npt.NDArray[np.int32]:
        """The index in its caption of each token."""
        starts = np.cumsum(self.lengths, dtype=np.int32) - self.lengths
        return np.arange(len(self.numbers), dtype=np.int32) - np.repeat(starts, self.lengths)


_KEPT: "WeakKeyDictionary[CaptionSource, CaptionTokens]" = WeakKeyDictionary()


def total_counts(splits: Iterable[CaptionTokens]) -> Counter[str]:
    """The number of occurrences of each word in several splits together."""
    total: Counter[str] = Counter()
    for split in splits:
        total.update(split.counts())
    return total
