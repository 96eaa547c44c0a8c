"""CIDEr-D, and CIDEr as it was first defined (Vedantam, Zitnick and Parikh, 2015).

Captions are tf-idf vectors of their n-grams, and a candidate's score is the mean similarity of its vector with those of
the references, averaged over n = 1..4, times 10. CIDEr takes the cosine; CIDEr-D clips the candidate's weights and
damps by the difference in length, so that repeating words doesn't pay. The COCO caption tools compute CIDEr-D and call
it CIDEr; every published "CIDEr" that came from them is CIDEr-D. CIDEr is as in the authors' code
(github.com/vrama91/cider), which takes it times 10 and, unlike the paper, does not stem.

Document frequencies come from the references of the evaluated images themselves, so that scores depend on the split,
and a single image scores 0; or from another corpus, as in self-critical training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from imgcap_jax.metrics.corpus import (
    Candidates,
    MetricScores,
    NGramCounts,
    NGramNumbers,
    References,
    join,
    mean_score,
    pairs,
    unpair,
)

SIGMA = 6.0  # of the Gaussian penalty on the difference in length, in words
Corpus = Sequence[Sequence[list[str]]]
"""Tokenised captions of each image, as the source of document frequencies."""


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


def inverse_document_frequency(image: np.ndarray, gram: np.ndarray, *, images: int, grams: int) -> np.ndarray:
    """log(images / images that have it) of each n-gram, [grams]; of one that none has, as if one had.

    Args:
        image, gram: of each occurrence, any number of times.
        images, grams: how many there are of each.
    """
    documents = unpair(np.unique(pairs(image, gram)))[1]
    return np.log(images) - np.log(np.maximum(1, np.bincount(documents, minlength=grams)))


class Vectors:
    """The references' tf-idf vectors.

    Args:
        references: what candidates are compared with.
        corpus: where document frequencies come from; None: the references.
    """

    def __init__(self, references: References, corpus: Corpus | None) -> None:
        self.references = references
        captions = len(references.image_of)
        if corpus is None:
            self.numbers, image_of, images = references.n_grams, references.image_of, len(references.tokens)
        else:
            self.numbers = NGramNumbers([*chain(*references.tokens), *chain(*corpus)])
            image_of = np.concatenate(
                [np.full(captions, -1), np.repeat(np.arange(len(corpus)), [len(texts) for texts in corpus])]
            )
            images = len(corpus)
        self.orders = []
        for counts, size in zip(self.numbers.counts, self.numbers.size, strict=True):
            image = image_of[counts.caption]
            idf = inverse_document_frequency(image[image >= 0], counts.gram[image >= 0], images=images, grams=size)
            own = counts.caption < captions
            gram, caption = counts.gram[own], counts.caption[own]
            weight = counts.count[own] * idf[gram]
            norm = np.sqrt(np.bincount(caption, weight**2, minlength=captions))
            key = pairs(references.image_of[caption], gram)
            order = np.argsort(key, kind="stable")
            self.orders.append(_Order(idf, key[order], caption[order], weight[order], norm))
        self.unseen = np.log(images)  # idf of an n-gram that is nowhere

    def similarities(self, candidates: Candidates, *, clip: bool) -> np.ndarray:
        """Cosine similarity of each reference with the candidate of its image, of each order, [ORDERS, C]."""
        own = self.numbers is self.references.n_grams
        counts = candidates.counts if own else self.numbers.count(candidates.tokens)
        return np.stack([self._cosines(*order, clip) for order in zip(self.orders, counts, strict=True)])

    def _cosines(self, reference: _Order, counts: NGramCounts, clip: bool) -> np.ndarray:
        image_of = self.references.image_of
        images = int(image_of[-1]) + 1
        known = counts.gram < len(reference.idf)
        idf = np.where(known, np.append(reference.idf, 0)[np.where(known, counts.gram, 0)], self.unseen)
        weight = counts.count * idf
        norm = np.sqrt(np.bincount(counts.caption, weight**2, minlength=images))

        # Each candidate n-gram meets the run of entries of the same image and n-gram, one a reference that has
        # it.
        own, entry = join(pairs(counts.caption, counts.gram), reference.key)
        ours, theirs = weight[own], reference.weight[entry]
        product = (np.minimum(ours, theirs) if clip else ours) * theirs
        dot = np.bincount(reference.caption[entry], product, minlength=len(image_of))

        scale = norm[image_of] * reference.norm
        # A zero norm (words that every image has) leaves the dot product, which is then 0 as well.
        return dot / np.where(scale > 0, scale, 1)


def score_clipped(vectors: Vectors) -> Callable[[Candidates], MetricScores]:
    """A function that gives candidates' CIDEr-D."""
    references = vectors.references

    def score(candidates: Candidates) -> MetricScores:
        similarity = vectors.similarities(candidates, clip=True).mean(0)
        # The official code counts bigrams as the length, which differs from words for empty captions only.
        words = np.maximum(candidates.lengths - 1, 0)[references.image_of]
        difference = words - np.maximum(references.lengths - 1, 0)
        similarity = similarity * np.exp(-(difference**2) / (2 * SIGMA**2))
        return {"CIDEr-D": mean_score(_mean_over_references(similarity, references))}

    return score


def score_original(vectors: Vectors) -> Callable[[Candidates], MetricScores]:
    """A function that gives candidates' CIDEr of the paper, neither clipped nor damped."""

    def score(candidates: Candidates) -> MetricScores:
        similarity = vectors.similarities(candidates, clip=False).mean(0)
        return {"CIDEr (original)": mean_score(_mean_over_references(similarity, vectors.references))}

    return score


def _mean_over_references(similarity: np.ndarray, references: References) -> np.ndarray:
    images = len(references.tokens)
    return 10 * np.bincount(references.image_of, similarity, minlength=images) / references.per_image
