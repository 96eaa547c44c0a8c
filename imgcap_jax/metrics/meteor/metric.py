"""The METEOR score of an alignment: weighted precision and recall with a fragmentation penalty.

P and R are the shares of matched words in the candidate and in the reference. Each match has the weight w_i of its
matcher. Content words have the weight delta, function words 1 - delta (Denkowski and Lavie, 2014):

    F = 1 / ((1 - alpha) / P + alpha / R)
    score = F (1 - gamma (chunks / matched words) ^ beta)

The score of an image is that of its best reference. The score of the corpus is not the mean over images: the formula is
applied to the sums of the counts of the best references. The parameters are those of the official tool for English
(ranking task).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from imgcap_jax.metrics.corpus import Candidates, MetricScore, MetricScores, References, expand
from imgcap_jax.metrics.meteor.alignment import align
from imgcap_jax.metrics.meteor.matching import MATCHERS, Matches, Sentences, Words, find_matches
from imgcap_jax.metrics.meteor.normalize import normalize
from imgcap_jax.metrics.meteor.tables import Tables

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase
_IMAGES_AT_A_TIME = 1000  # the matches of all 40,504 images of COCO at once would take gigabytes


def prepare(references: References) -> Callable[[Candidates], MetricScores]:
    """Returns a function that scores candidates against these references.

    Raises:
        UserError: METEOR's tables are not installed or cannot be compiled.
    """
    words = Words(Tables.load())
    begins = range(0, len(references.tokens), _IMAGES_AT_A_TIME)
    groups = [_sentences(references.tokens[begin : begin + _IMAGES_AT_A_TIME], words) for begin in begins]

    def score(candidates: Candidates) -> MetricScores:
        # All words are added before the first group is scored, so that the graphs between words are computed once.
        ours = [
            _sentences([(tokens,) for tokens in candidates.tokens[begin : begin + _IMAGES_AT_A_TIME]], words)
            for begin in begins
        ]
        counts = _Counts.together(
            [_best(_count(*pair, words), pair[1].image) for pair in zip(ours, groups, strict=True)]
        )
        return {"METEOR": MetricScore(counts.score(), lambda times: counts.totals(times).score())}

    return score


def _sentences(texts: Sequence[Sequence[list[str]]], words: Words) -> Sentences:
    """Normalises the sentences of each image and converts them to word ids."""
    normalized = [normalize(tokens) for of_image in texts for tokens in of_image]
    lengths = np.array([len(text) for text in normalized], np.int64)
    image = np.repeat(np.arange(len(texts)), [len(of_image) for of_image in texts])
    return Sentences(words.numbers(normalized), lengths, image)


def _best(counts: "_Counts", image: np.ndarray) -> "_Counts":
    """The counts of the reference with the highest score of each image, the first one on a tie."""
    order = np.lexsort((-counts.score(), image))
    return counts.take(order[np.unique(image[order], return_index=True)[1]])


@dataclass(frozen=True)
class _Counts:
    """The counts that the score is computed from, for C pairs. Axis 0 of size 2: candidate, reference.

    Attributes:
        length: the number of words, [2,C].
        function: the number of function words, [2,C].
        matched: the number of words matched by each matcher, [2,MATCHERS,C].
        matched_function: the number of function words matched by each matcher, [2,MATCHERS,C].
        chunks: the number of chunks, [C]. It is 0 if one chunk covers both sentences, because such an alignment is not
            fragmented. Sums over pairs also count it as 0.
    """

    length: np.ndarray
    function: np.ndarray
    matched: np.ndarray
    matched_function: np.ndarray
    chunks: np.ndarray

    def take(self, pairs: np.ndarray) -> "_Counts":
        return _Counts(*(values[..., pairs] for values in vars(self).values()))

    @classmethod
    def together(cls, parts: Sequence["_Counts"]) -> "_Counts":
        return cls(
            *(np.concatenate(values, -1) for values in zip(*(vars(part).values() for part in parts), strict=True))
        )

    def totals(self, times: np.ndarray) -> "_Counts":
        """B sums over the pairs, in place of the pairs. `times` [B,C] is the number of times that each pair counts."""
        return _Counts(*(values @ times.T for values in vars(self).values()))

    def score(self) -> np.ndarray:
        """METEOR of each pair, [C]."""

        def weighted(words: np.ndarray, function: np.ndarray) -> np.ndarray:
            return DELTA * (words - function) + (1 - DELTA) * function

        matched = np.einsum("m,smc->sc", np.array(WEIGHTS), weighted(self.matched, self.matched_function))
        whole = weighted(self.length, self.function)
        precision, recall = matched / np.where(whole > 0, whole, 1)
        both = (precision > 0) & (recall > 0)
        mean = np.where(both, 1 / ((1 - ALPHA) / np.where(both, precision, 1) + ALPHA / np.where(both, recall, 1)), 0)
        fragmentation = self.chunks / np.maximum(self.matched.sum(1).mean(0), 1)
        return mean * (1 - GAMMA * fragmentation**BETA)


def _count(ours: Sentences, theirs: Sentences, words: Words) -> _Counts:
    """Aligns the candidate of each image with its references and counts words, matches and chunks."""
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
    length = np.stack([our_lengths, theirs.lengths])
    chunks = _chunks(taken, pairs)
    chunks[(matched.sum(1) == length).all(0) & (chunks == 1)] = 0
    function = np.stack([functions(ours)[theirs.image], functions(theirs)])
    return _Counts(length, function, matched, matched_function, chunks)


def _chunks(taken: Matches, pairs: int) -> np.ndarray:
    """The number of runs of matches that are contiguous in both sentences, for each pair, [C]."""
    begins = np.ones(len(taken.pair), bool)
    begins[1:] = (
        (taken.pair[1:] != taken.pair[:-1])
        | (taken.start[1:] != (taken.start + taken.length)[:-1])
        | (taken.other_start[1:] != (taken.other_start + taken.other_length)[:-1])
    )
    return np.bincount(taken.pair[begins], minlength=pairs)
