"""BLEU-1 to BLEU-4 (Papineni et al., 2002) as the COCO caption tools compute it.

It differs from other implementations in two ways. The reference length of an image is the length closest to that of
the candidate (the shorter of two equally close lengths). There is no smoothing; small constants prevent division by
zero if a count is empty.
"""

from collections.abc import Callable

import numpy as np

from imgcap_jax.metrics.corpus import ORDERS, Candidates, MetricScore, MetricScores, References, pairs, unpair

# COCO's constants. With them a candidate without n-grams scores almost 0 instead of being undefined.
TINY, SMALL = 1e-15, 1e-9


def prepare(references: References) -> Callable[[Candidates], MetricScores]:
    """Counts the n-grams of the references once. Returns a function that scores candidates against them."""
    # For each order: pairs of image and n-gram, and the largest count of the n-gram in any reference of the image.
    most = []
    for counts in references.n_grams.counts:
        keys, entry = np.unique(pairs(references.image_of[counts.caption], counts.gram), return_inverse=True)
        highest = np.zeros(len(keys), np.int64)
        np.maximum.at(highest, entry, counts.count)
        most.append((keys, highest))
    first = np.cumsum(references.per_image) - references.per_image  # [I]: the first reference of each image

    def score(candidates: Candidates) -> MetricScores:
        length = candidates.lengths
        distance = np.abs(references.lengths - np.repeat(length, references.per_image))  # [C]
        # Pairs sort by distance, then by length: the minimum is the closest length, the shorter one on a tie.
        closest = unpair(np.minimum.reduceat(pairs(distance, references.lengths), first))[1]

        correct = np.zeros((ORDERS, len(length)))
        for n, (counts, (keys, highest)) in enumerate(zip(candidates.counts, most, strict=True)):
            wanted = pairs(counts.caption, counts.gram)
            place = np.searchsorted(keys, wanted)
            found = np.append(keys, -1)[place] == wanted
            clipped = np.minimum(counts.count[found], highest[place[found]])
            np.add.at(correct[n], counts.caption[found], clipped)
        guessed = np.maximum(length - np.arange(ORDERS)[:, None], 0)

        images = _bleu(correct, guessed, length, closest)

        def corpus(counts: np.ndarray) -> np.ndarray:
            return _bleu(correct @ counts.T, guessed @ counts.T, counts @ length, counts @ closest)

        return {
            f"BLEU-{n + 1}": MetricScore(images[n], lambda counts, n=n: corpus(counts)[n])  # type: ignore[misc]
            for n in range(ORDERS)
        }

    return score


def _bleu(correct: np.ndarray, guessed: np.ndarray, length: np.ndarray, closest: np.ndarray) -> np.ndarray:
    """BLEU of all orders [ORDERS, ...] from n-gram counts [ORDERS, ...] and lengths [...]."""
    orders = np.arange(1, ORDERS + 1).reshape(-1, *[1] * (correct.ndim - 1))
    precision = np.cumprod((correct + TINY) / (guessed + SMALL), axis=0) ** (1 / orders)
    ratio = (length + TINY) / (closest + SMALL)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))
