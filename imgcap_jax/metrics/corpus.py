"""Tokenised captions and their n-grams, counted once and shared by the metrics.

Letters: I images, C captions (all references of all images), E entries (distinct pairs of a caption and an n-gram of
one order).

Each different n-gram has an integer id. Ids are exact, without hashing: an n-gram is identified by the pair of the id
of its first n-1 words and the id of its last word.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from imgcap_jax.tokenizers import DEFAULT, Tokenizer, tokens_of

ORDERS = 4  # unigrams to 4-grams
_SHIFT = 32  # bits of the second number of a pair


def pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Packs pairs of numbers below 2^31 into integers with the same (lexicographic) order."""
    return (first << _SHIFT) | second


def unpair(pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two numbers of each pair."""
    return pair >> _SHIFT, pair & ((1 << _SHIFT) - 1)


def changes(values: np.ndarray) -> np.ndarray:
    """Whether each value differs from the one before it. The first value does."""
    found = np.ones(len(values), bool)
    found[1:] = values[1:] != values[:-1]
    return found


def distinct(values: np.ndarray) -> np.ndarray:
    """The different values, sorted. numpy.unique is 20 times as slow for pairs, which collide in its hash table."""
    ordered = np.sort(values)
    return ordered[changes(ordered)]


def expand(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expands runs of consecutive integers.

    Args:
        start: the first integer of each run.
        count: the length of each run.

    Returns:
        The run that each entry belongs to, and its value: ``start[run] + 0, 1, ..., count[run] - 1``.
    """
    run = np.repeat(np.arange(len(count)), count)
    return run, np.arange(len(run)) - np.repeat(np.cumsum(count) - count - start, count)


def join(wanted: np.ndarray, sorted_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of equal keys, as positions in `wanted` (in ascending order) and positions in `sorted_keys`."""
    start = np.searchsorted(sorted_keys, wanted, "left")
    return expand(start, np.searchsorted(sorted_keys, wanted, "right") - start)


def words_left(lengths: np.ndarray) -> np.ndarray:
    """The number of words from each word to the end of its sentence, itself included, in concatenated sentences."""
    return np.repeat(np.cumsum(lengths), lengths) - np.arange(int(lengths.sum()))


def n_grams(
    words: np.ndarray, lengths: np.ndarray, number: Callable[[np.ndarray, int], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All n-grams of concatenated sentences, one order after another.

    Args:
        words: the id of each word.
        lengths: the number of words in each sentence.
        number: (pairs of the id of an n-gram's first n-1 words and the id of its last word, n) -> ids of the n-grams.

    Yields:
        For each order: the positions in `words` at which the n-grams begin, and the ids of the n-grams.
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
    """The n-grams of one order in a list of captions, sorted by caption and then by n-gram.

    Attributes:
        caption: the position of the caption in the list, [E].
        gram: the id of the n-gram, [E].
        count: the number of times that the n-gram occurs in the caption, [E].
    """

    caption: np.ndarray
    gram: np.ndarray
    count: np.ndarray


class NGramNumbers:
    """Ids for all n-grams of a list of captions, and the counts of these n-grams.

    Attributes:
        counts: the n-gram counts of these captions, one item per order.
        size: the number of different n-grams, one item per order. Ids from `size` on denote n-grams that occur only in
            other captions.
    """

    def __init__(self, captions: Sequence[Sequence[str]]) -> None:
        self._words: dict[str, int] = {}
        for caption in captions:
            for word in caption:
                self._words.setdefault(word, len(self._words))
        self.size = [len(self._words)]
        self._known: list[np.ndarray] = []  # per order from 2 on: sorted pairs; the position of a pair is its id
        self.counts = self._count(captions, self._learn)

    def count(self, captions: Sequence[Sequence[str]]) -> list[NGramCounts]:
        """The n-gram counts of other captions, one item per order.

        The ids of n-grams that do not occur in the original captions are valid for this call only.
        """
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
    """Tokenised references. They are compared by identity, so that results computed from them can be cached.

    Attributes:
        image_ids: the image ids, [I].
        tokens: for each image, the tokens of each of its references.
    """

    image_ids: tuple[int, ...]
    tokens: tuple[tuple[list[str], ...], ...]

    @classmethod
    def from_captions(cls, captions: Mapping[int, Sequence[str]], tokenizer: Tokenizer = DEFAULT) -> "References":
        """Tokenises raw captions: image id -> captions. Raises UserError as ``tokens_of``."""
        split = (tuple(tokens_of(text, tokenizer) for text in texts) for texts in captions.values())
        return cls(tuple(captions), tuple(split))

    @cached_property
    def per_image(self) -> np.ndarray:
        """The number of references of each image, [I]."""
        return np.array([len(references) for references in self.tokens], np.int64)

    @cached_property
    def image_of(self) -> np.ndarray:
        """The position of the image that each reference belongs to, [C]."""
        return np.repeat(np.arange(len(self.tokens)), self.per_image)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens in each reference, [C]."""
        return np.array([len(caption) for references in self.tokens for caption in references], np.int64)

    @cached_property
    def n_grams(self) -> NGramNumbers:
        """The ids and counts of the n-grams of all references."""
        return NGramNumbers([caption for references in self.tokens for caption in references])


class Candidates:
    """One tokenised candidate per image, in the order of the references.

    Attributes:
        tokens: the tokens of each candidate.
        lengths: the number of tokens in each candidate, [I].
    """

    def __init__(self, tokens: Sequence[list[str]], references: References) -> None:
        self.tokens = tokens
        self.lengths = np.array([len(caption) for caption in tokens], np.int64)
        self._references = references

    @cached_property
    def counts(self) -> list[NGramCounts]:
        """The n-gram counts of the candidates, one item per order, with the ids of ``References.n_grams``."""
        return self._references.n_grams.count(self.tokens)


@dataclass(frozen=True)
class MetricScore:
    """The scores of a set of candidates in one metric.

    Attributes:
        images: the score of each image, [I].
        corpus: computes the score of the whole set for B samples of the images. It maps the number of times that each
            image occurs in each sample, float [B,I], to the scores, [B].
    """

    images: np.ndarray
    corpus: Callable[[np.ndarray], np.ndarray]

    @cached_property
    def value(self) -> float:
        """The score of the whole set, in which each image occurs once."""
        return float(self.corpus(np.ones((1, len(self.images))))[0])


def mean_score(images: np.ndarray) -> MetricScore:
    """Scores of a metric whose score of a set is the mean over its images; images [I]."""
    return MetricScore(images, lambda counts: counts @ images / counts.sum(1))


MetricScores = dict[str, MetricScore]
"""Name of the metric -> its scores."""
