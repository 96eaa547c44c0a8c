"""Tokenised captions and their n-grams, counted once and shared by the metrics.

Letters: I images, C captions (all references of all images), E entries (distinct pairs of a caption and an
n-gram of one order). N-grams are numbered exactly, without hashing: an n-gram is a pair of numbers, that of
its first n-1 words and that of its last word.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from imgcap_jax.text import tokenize

ORDERS = 4  # unigrams to 4-grams
_SHIFT = 32  # bits for the second number of a pair


def pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One integer for each pair of numbers below 2^31, in lexicographic order."""
    return (first << _SHIFT) | second


def unpair(pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two numbers of each pair."""
    return pair >> _SHIFT, pair & ((1 << _SHIFT) - 1)


def expand(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs written out: which run each entry belongs to, and its place ``start[run] + 0, 1, ..., count[run] - 1``."""
    run = np.repeat(np.arange(len(count)), count)
    return run, np.arange(len(run)) - np.repeat(np.cumsum(count) - count - start, count)


def join(wanted: np.ndarray, sorted_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All places where equal keys meet: in `wanted`, in its order, and in `sorted_keys`."""
    start = np.searchsorted(sorted_keys, wanted, "left")
    return expand(start, np.searchsorted(sorted_keys, wanted, "right") - start)


def words_left(lengths: np.ndarray) -> np.ndarray:
    """Of each word of sentences laid end to end, how many are left in its sentence, itself included."""
    return np.repeat(np.cumsum(lengths), lengths) - np.arange(int(lengths.sum()))


def n_grams(
    words: np.ndarray, lengths: np.ndarray, number: Callable[[np.ndarray, int], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All n-grams of sentences laid end to end, an order after the other.

    Args:
        words: the number of each word.
        lengths: words of each sentence.
        number: (pairs of the numbers of an n-gram's first n-1 words and of its last one, n) -> the n-grams' numbers.

    Yields:
        Where the n-grams of each order begin, and their numbers.
    """
    left = words_left(lengths)
    start, grams = np.arange(len(words)), words
    yield start, grams
    for order in range(2, ORDERS + 1):
        whole = left[start] >= order
        start = start[whole]
        grams = number(pairs(grams[whole], words[start + order - 1]), order)
        yield start, grams


@dataclass(frozen=True)
class NGramCounts:
    """The n-grams of one order in a list of captions, ordered by caption and then by n-gram.

    caption [E]: which caption; gram [E]: which n-gram; count [E]: how often it occurs there.
    """

    caption: np.ndarray
    gram: np.ndarray
    count: np.ndarray


class NGramNumbers:
    """Numbers for all n-grams of the captions it is made from, and their counts.

    Attributes:
        counts: of these captions, one item an order. size: how many n-grams there are, one item an order;
        numbers from there on are other captions' n-grams.
    """

    def __init__(self, captions: Sequence[Sequence[str]]) -> None:
        self._words: dict[str, int] = {}
        for caption in captions:
            for word in caption:
                self._words.setdefault(word, len(self._words))
        self.size = [len(self._words)]
        self._known: list[np.ndarray] = []  # an order from 2 on: sorted pairs; an n-gram's number is its place here
        self.counts = self._count(captions, self._learn)

    def count(self, captions: Sequence[Sequence[str]]) -> list[NGramCounts]:
        """Counts of other captions, one item an order. N-grams not seen before are numbered for this call
        only."""
        return self._count(captions, self._look_up)

    def _count(
        self, captions: Sequence[Sequence[str]], number: Callable[[np.ndarray, int], np.ndarray]
    ) -> list[NGramCounts]:
        lengths = np.array([len(caption) for caption in captions], np.int64)
        new: dict[str, int] = {}
        words = np.array(
            [
                self._words[word] if word in self._words else new.setdefault(word, len(self._words) + len(new))
                for caption in captions
                for word in caption
            ],
            np.int64,
        )
        caption_of = np.repeat(np.arange(len(captions)), lengths)
        counts = []
        for start, grams in n_grams(words, lengths, number):
            entries, count = np.unique(pairs(caption_of[start], grams), return_counts=True)
            counts.append(NGramCounts(*unpair(entries), count))
        return counts

    def _learn(self, grams: np.ndarray, order: int) -> np.ndarray:
        known, numbers = np.unique(grams, return_inverse=True)
        self._known.append(known)
        self.size.append(len(known))
        return numbers

    def _look_up(self, grams: np.ndarray, order: int) -> np.ndarray:
        known = self._known[order - 2]
        numbers = np.searchsorted(known, grams)
        new = np.append(known, -1)[numbers] != grams
        numbers[new] = self.size[order - 1] + np.unique(grams[new], return_inverse=True)[1]
        return numbers


@dataclass(frozen=True, eq=False)
class References:
    """References to score against; one equals itself only, so that what was counted of it can be kept.

    image_ids [I]; tokens: of each image, the tokens of each of its references.
    """

    image_ids: tuple[int, ...]
    tokens: tuple[tuple[list[str], ...], ...]

    @classmethod
    def from_captions(cls, captions: Mapping[int, Sequence[str]]) -> "References":
        """Tokenises raw captions."""
        return cls(tuple(captions), tuple(tuple(tokenize(text) for text in texts) for texts in captions.values()))

    @cached_property
    def per_image(self) -> np.ndarray:
        """How many references each image has, [I]."""
        return np.array([len(references) for references in self.tokens], np.int64)

    @cached_property
    def image_of(self) -> np.ndarray:
        """Which image each reference belongs to, [C]."""
        return np.repeat(np.arange(len(self.tokens)), self.per_image)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each reference, [C]."""
        return np.array([len(caption) for references in self.tokens for caption in references], np.int64)

    @cached_property
    def n_grams(self) -> NGramNumbers:
        """N-grams of all references."""
        return NGramNumbers([caption for references in self.tokens for caption in references])


class Candidates:
    """One candidate an image, in the references' order: tokens, lengths [I] and n-grams numbered as the
    references'."""

    def __init__(self, tokens: Sequence[list[str]], references: References) -> None:
        self.tokens = tokens
        self.lengths = np.array([len(caption) for caption in tokens], np.int64)
        self._references = references

    @cached_property
    def counts(self) -> list[NGramCounts]:
        """Counts of the candidates' n-grams, one item an order."""
        return self._references.n_grams.count(self.tokens)


@dataclass(frozen=True)
class MetricScore:
    """A metric of a set of candidates.

    Attributes:
        images: the score of each image, [I].
        corpus: how often each image counts, float [B,I] -> the score of the whole set, [B]; for B samples of images.
    """

    images: np.ndarray
    corpus: Callable[[np.ndarray], np.ndarray]

    @cached_property
    def value(self) -> float:
        """The score of all images, each once."""
        return float(self.corpus(np.ones((1, len(self.images))))[0])


def mean_score(images: np.ndarray) -> MetricScore:
    """A metric whose score of a set is the mean over its images."""
    return MetricScore(images, lambda counts: counts @ images / counts.sum(1))


MetricScores = dict[str, MetricScore]
"""Scores by the metric's name."""
