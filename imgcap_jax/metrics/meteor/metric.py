"""METEOR's score: weighted precision and recall of an alignment, less for fragments (Denkowski and Lavie, 2014).

With P and R the shares of the candidate's and the reference's words that are matched, each match counted with its
matcher's weight w_i and content words with delta against function words with 1 - delta:

    F = 1 / ((1 - alpha) / P + alpha / R)
    score = F (1 - gamma (chunks / matched words) ^ beta)

An image's score is that of its best reference. The corpus's score is the formula on the sums of their counts, not the
mean. Parameters are those of the tool's English ranking task.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from imgcap_jax.metrics.corpus import Candidates, MetricScores, References
from imgcap_jax.metrics.meteor.alignment import align
from imgcap_jax.metrics.meteor.matching import MATCHERS, Matches, Sentences, Words, expand, find_matches
from imgcap_jax.metrics.meteor.normalize import normalize
from imgcap_jax.metrics.meteor.tables import Tables

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase


def prepare(references: References) -> Callable[[Candidates], MetricScores]:
    """A function that scores candidates against these references.

    Raises:
        ModuleNotFoundError: METEOR's tables are not installed.
    """
    words = Words(Tables.load())
    texts = [normalize(tokens) for of_image in references.tokens for tokens in of_image]
    theirs = _sentences(texts, references.image_of, words)
    first = np.cumsum(references.per_image) - references.per_image  # [I] first reference of each image

    def score(candidates: Candidates) -> MetricScores:
        ours = _sentences([normalize(tokens) for tokens in candidates.tokens], np.arange(len(first)), words)
        counts = _count(ours, theirs, words)
        of_pairs = counts.score()
        # Of equally good references the first.
        best = _first_best(of_pairs, references.image_of, first)
        corpus = counts.take(best).total().score()
        return {"METEOR": (float(corpus[0]), of_pairs[best])}

    return score


def _sentences(texts: list[list[str]], image: np.ndarray, words: Words) -> Sentences:
    return Sentences(words.numbers(texts), np.array([len(text) for text in texts], np.int64), image)


def _first_best(scores: np.ndarray, image_of: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Of each image, the number of the reference with the highest score."""
    highest = np.maximum.reduceat(scores, first)
    is_best = np.flatnonzero(scores == highest[image_of])
    return is_best[np.searchsorted(image_of[is_best], np.arange(len(first)))]


@dataclass(frozen=True)
class _Counts:
    """What the score is made of, each for candidate and reference [2, C]; C pairs.

    length, function: words, and function words among them; matched, matched_function: the same of each matcher
    [2, MATCHERS, C]; chunks [C].
    """

    length: np.ndarray
    function: np.ndarray
    matched: np.ndarray
    matched_function: np.ndarray
    chunks: np.ndarray

    def take(self, pairs: np.ndarray) -> "_Counts":
        return _Counts(*(values[..., pairs] for values in vars(self).values()))

    def total(self) -> "_Counts":
        return _Counts(*(values.sum(-1, keepdims=True) for values in vars(self).values()))

    def score(self) -> np.ndarray:
        """METEOR of each pair, [C]."""

        def weighted(words: np.ndarray, function: np.ndarray) -> np.ndarray:
            return DELTA * (words - function) + (1 - DELTA) * function

        matched = np.einsum("m,smc->sc", np.array(WEIGHTS), weighted(self.matched, self.matched_function))
        whole = weighted(self.length, self.function)
        precision, recall = matched / np.where(whole > 0, whole, 1)
        both = (precision > 0) & (recall > 0)
        mean = np.where(both, 1 / ((1 - ALPHA) / np.where(both, precision, 1) + ALPHA / np.where(both, recall, 1)), 0)
        covered = self.matched.sum(1)
        # One chunk that holds everything is no fragment.
        whole_chunk = (covered == self.length).all(0) & (self.chunks == 1)
        fragmentation = np.where(whole_chunk, 0, self.chunks / np.maximum(covered.mean(0), 1))
        return mean * (1 - GAMMA * fragmentation**BETA)


def _count(ours: Sentences, theirs: Sentences, words: Words) -> _Counts:
    """Aligns the candidate of each image with its references, and counts."""
    matches = find_matches(ours, theirs, words)
    our_lengths = ours.lengths[theirs.image]
    taken = matches.take(align(matches, our_lengths, theirs.lengths))
    pairs = len(theirs.lengths)
    is_function = words.function

    def functions(sentences: Sentences) -> np.ndarray:
        return np.bincount(sentences.sentence, is_function[sentences.words], minlength=len(sentences.lengths))

    matched = np.zeros((2, MATCHERS, pairs))
    matched_function = np.zeros((2, MATCHERS, pairs))
    for side, begin, length, sentences in (
        (0, ours.first[theirs.image[taken.pair]] + taken.other_start, taken.other_length, ours),
        (1, theirs.first[taken.pair] + taken.start, taken.length, theirs),
    ):
        match, word = expand(begin, length)
        cell = taken.module[match] * pairs + taken.pair[match]
        matched[side] = np.bincount(cell, minlength=MATCHERS * pairs).reshape(MATCHERS, pairs)
        weights = is_function[sentences.words[word]]
        matched_function[side] = np.bincount(cell, weights, MATCHERS * pairs).reshape(MATCHERS, pairs)
    return _Counts(
        np.stack([our_lengths, theirs.lengths]),
        np.stack([functions(ours)[theirs.image], functions(theirs)]),
        matched,
        matched_function,
        _chunks(taken, pairs),
    )


def _chunks(taken: Matches, pairs: int) -> np.ndarray:
    """Runs of matches that are contiguous in both sentences, of each pair."""
    begins = np.ones(len(taken.pair), bool)
    begins[1:] = (
        (taken.pair[1:] != taken.pair[:-1])
        | (taken.start[1:] != (taken.start + taken.length)[:-1])
        | (taken.other_start[1:] != (taken.other_start + taken.other_length)[:-1])
    )
    return np.bincount(taken.pair[begins], minlength=pairs)
