"""ROUGE-L (Lin, 2004) as the COCO caption tools compute it."""

from collections.abc import Callable

import numpy as np

from imgcap_jax.metrics.corpus import Candidates, MetricScores, References, mean_score

BETA = 1.2  # weight of recall relative to precision


def prepare(references: References) -> Callable[[Candidates], MetricScores]:
    """Returns a function that scores candidates against these references."""

    def score(candidates: Candidates) -> MetricScores:
        scores = np.array([_rouge(*pair) for pair in zip(candidates.tokens, references.tokens, strict=True)])
        return {"ROUGE-L": mean_score(scores)}

    return score


def _rouge(candidate: list[str], references: tuple[list[str], ...]) -> float:
    # The official code splits "" into one empty word.
    candidate = candidate or [""]
    positions: dict[str, int] = {}
    for place, word in enumerate(candidate):
        positions[word] = positions.get(word, 0) | (1 << place)
    precision = recall = 0.0
    for reference in references:
        common = _longest_common_subsequence(positions, len(candidate), reference or [""])
        precision = max(precision, common / len(candidate))
        recall = max(recall, common / max(len(reference), 1))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(positions: dict[str, int], length: int, other: list[str]) -> int:
    """Length of the longest common subsequence of `other` and a text of `length` words.

    `positions` maps each word of the text to its positions, stored as the bits of an integer. Each column of the
    dynamic programme is one integer, in which a 0 bit stands for an increase by 1 (Hyyrö, 2004).
    """
    everything = column = (1 << length) - 1
    for word in other:
        matches = column & positions.get(word, 0)
        column = (column + matches) | (column - matches)
    return length - (column & everything).bit_count()
