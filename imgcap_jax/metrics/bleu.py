"""BLEU-1 to BLEU-4 (Papineni et al., 2002) as the COCO caption tools compute it.

Against other implementations: the reference length of an image is the one closest to the candidate's (the
shorter of two equally close), and instead of smoothing, small constants keep empty counts from dividing by
zero.
"""

from collections.abc import Callable

import numpy as np

from imgcap_jax.metrics.corpus import ORDERS, Candidates, MetricScore, MetricScores, References, pairs, unpair

# COCO's constants: a candidate without any n-gram scores (almost) 0 rather than being undefined.
TINY, SMALL = 1e-15, 1e-9


def prepare(references: References) -> Callable[[Candidates], MetricScores]:
    """A function that scores candidates against these references, which are counted here, once."""
    # Of each order, how often each n-gram of an image occurs in that reference which has it most often.
    most = []
    for counts in references.n_grams.counts:
        keys, entry = np.unique(pairs(references.image_of[counts.caption], counts.gram), return_inverse=True)
        highest = np.zeros(len(keys), np.int64)
        np.maximum.at(highest, entry, counts.count)
        most.append((keys, highest))
    first = np.cumsum(references.per_image) - references.per_image  # [I] first reference of each image

    def score(candidates: Candidates) -> MetricScores:
        length = candidates.lengths
        distance = np.abs(references.lengths - np.repeat(length, references.per_image))  # [C]
        # The least pair is the closest length, and the shorter one of two.
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
