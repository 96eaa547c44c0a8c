"""CIDEr-D (Vedantam, Zitnick and Parikh, 2015) as the COCO caption tools compute it under the name CIDEr.

Captions are tf-idf vectors of their n-grams. A candidate's score is its mean clipped cosine similarity with
the references, damped by the difference in length, averaged over n = 1..4, times 10. Document frequencies
come from the references of the evaluated images themselves, so that scores depend on the split, and a single
image scores 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from imgcap_jax.metrics.corpus import ORDERS, Candidates, MetricScores, NGramCounts, References, pairs

SIGMA = 6.0  # of the Gaussian penalty on the difference in length, in words


@dataclass(frozen=True)
class _Order:
    """References' n-grams of one order, sorted by image and n-gram.

    idf: of each n-gram; key [E]: pair of image and n-gram; caption, weight [E]: tf-idf; norm [C].
    """

    idf: np.ndarray
    key: np.ndarray
    caption: np.ndarray
    weight: np.ndarray
    norm: np.ndarray


def prepare(references: References) -> Callable[[Candidates], MetricScores]:
    """A function that scores candidates against these references, which are weighted here, once."""
    images, captions = len(references.tokens), len(references.image_of)
    orders = []
    for counts, size in zip(references.n_grams.counts, references.n_grams.size, strict=True):
        key = pairs(references.image_of[counts.caption], counts.gram)
        grams_of_images = np.unique(key) & 0xFFFFFFFF
        document_frequency = np.bincount(grams_of_images, minlength=size)
        idf = np.log(images) - np.log(np.maximum(1, document_frequency))
        weight = counts.count * idf[counts.gram]
        norm = np.sqrt(np.bincount(counts.caption, weight**2, minlength=captions))
        order = np.argsort(key, kind="stable")
        orders.append(_Order(idf, key[order], counts.caption[order], weight[order], norm))
    unseen = np.log(images)  # idf of an n-gram that no reference has

    def score(candidates: Candidates) -> MetricScores:
        similarity = np.zeros(captions)
        for reference, counts in zip(orders, candidates.counts, strict=True):
            similarity += _cosines(reference, counts, unseen, references.image_of)
        # The official code counts bigrams as the length, which differs from words for empty captions only.
        words = np.maximum(candidates.lengths - 1, 0)[references.image_of]
        difference = words - np.maximum(references.lengths - 1, 0)
        similarity *= np.exp(-(difference**2) / (2 * SIGMA**2)) / ORDERS
        scores = 10 * np.bincount(references.image_of, similarity, minlength=images) / references.per_image
        return {"CIDEr-D": (float(scores.mean()), scores)}

    return score


def _cosines(reference: _Order, counts: NGramCounts, unseen: float, image_of: np.ndarray) -> np.ndarray:
    """Clipped cosine similarity of each reference with the candidate of its image, for one order, [C]."""
    images = int(image_of[-1]) + 1
    known = counts.gram < len(reference.idf)
    idf = np.where(known, np.append(reference.idf, 0)[np.where(known, counts.gram, 0)], unseen)
    weight = counts.count * idf
    norm = np.sqrt(np.bincount(counts.caption, weight**2, minlength=images))

    # Each candidate n-gram meets the run of entries of the same image and n-gram, one a reference that has
    # it.
    key = pairs(counts.caption, counts.gram)
    begin = np.searchsorted(reference.key, key, "left")
    runs = np.searchsorted(reference.key, key, "right") - begin
    entry = np.repeat(begin - (np.cumsum(runs) - runs), runs) + np.arange(runs.sum())
    theirs = reference.weight[entry]
    product = np.minimum(np.repeat(weight, runs), theirs) * theirs
    dot = np.bincount(reference.caption[entry], product, minlength=len(image_of))

    scale = norm[image_of] * reference.norm
    # A zero norm (words that every image has) leaves the dot product, which is then 0 as well.
    return dot / np.where(scale > 0, scale, 1)
