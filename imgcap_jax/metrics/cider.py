"""CIDEr-D and the original CIDEr (Vedantam, Zitnick and Parikh, 2015).

A caption is represented by the tf-idf vector of its n-grams. The score of a candidate is 10 times the mean similarity
of its vector with those of the references, averaged over n = 1..4. The original CIDEr uses cosine similarity. CIDEr-D
also clips the candidate's weights and applies a penalty on the difference in length, so that repeating words does not
raise the score. The COCO caption tools compute CIDEr-D and call it CIDEr; every published "CIDEr" that was computed
with them is CIDEr-D. The original CIDEr follows the authors' code (github.com/vrama91/cider), which multiplies by 10
and, unlike the paper, does not stem.

By default, document frequencies come from the references of the evaluated images. Scores then depend on the split, and
a single image scores 0. They can also come from another corpus, as in self-critical training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from imgcap_jax.metrics.corpus import (
    Candidates,
    MetricScores,
    NGramCounts,
    NGramNumbers,
    References,
    distinct,
    join,
    mean_score,
    pairs,
    unpair,
)

SIGMA = 6.0  # standard deviation of the Gaussian length penalty, in words
Corpus = Sequence[Sequence[list[str]]]
"""The tokenised captions of each image, from which document frequencies are computed."""


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order in the references, sorted by image and n-gram.

    Attributes:
        idf: the idf of each n-gram.
        key: the pair of image and n-gram of each entry, [E].
        caption: the reference that contains the n-gram, [E].
        weight: the tf-idf weight of the n-gram in that reference, [E].
        norm: the norm of each reference's vector, [C].
    """

    idf: np.ndarray
    key: np.ndarray
    caption: np.ndarray
    weight: np.ndarray
    norm: np.ndarray


def inverse_document_frequency(image: np.ndarray, gram: np.ndarray, *, images: int, grams: int) -> np.ndarray:
    """The idf of each n-gram: log(number of images / number of images that contain it).

    Args:
        image, gram: the image and the n-gram of each occurrence. Repetitions do not matter.
        images, grams: the number of images and of different n-grams.

    Returns:
        The idf, [grams]. An n-gram that no image contains gets the idf of an n-gram that one image contains.
    """
    documents = unpair(distinct(pairs(image, gram)))[1]
    return np.log(images) - np.log(np.maximum(1, np.bincount(documents, minlength=grams)))


class Vectors:
    """The tf-idf vectors of the references.

    Args:
        references: the captions that candidates are compared with.
        corpus: the captions that document frequencies are computed from. None uses the references.
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
        self.unseen = np.log(images)  # the idf of an n-gram that occurs nowhere

    @cached_property
    def flat(self) -> np.ndarray:
        """Whether every n-gram of an image's references has an idf of 0, so that each caption of it scores 0, [I]."""
        weight = np.sum([order.norm for order in self.orders], axis=0)  # [C]
        return np.bincount(self.references.image_of, weight, minlength=len(self.references.tokens)) == 0

    def similarities(self, candidates: Candidates, *, clip: bool) -> np.ndarray:
        """The cosine similarity of each reference with the candidate of its image, for each order.

        Args:
            candidates: one candidate per image.
            clip: clips the candidate's weights to those of the reference, as CIDEr-D does.

        Returns:
            The similarities, [ORDERS, C].
        """
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

        # Each n-gram of a candidate is joined with one entry for each reference of its image that contains it.
        own, entry = join(pairs(counts.caption, counts.gram), reference.key)
        ours, theirs = weight[own], reference.weight[entry]
        product = (np.minimum(ours, theirs) if clip else ours) * theirs
        dot = np.bincount(reference.caption[entry], product, minlength=len(image_of))

        scale = norm[image_of] * reference.norm
        # A norm is 0 if every image contains all of the words. The dot product is then 0 as well.
        return dot / np.where(scale > 0, scale, 1)


@dataclass(frozen=True)
class ClippedScorer:
    """Computes the CIDEr-D of candidates."""

    vectors: Vectors

    def __call__(self, candidates: Candidates) -> MetricScores:
        """The scores of one candidate per image."""
        references = self.vectors.references
        similarity = self.vectors.similarities(candidates, clip=True).mean(0)
        # The official code uses the number of bigrams as the length. Only for empty captions does this change the
        # difference in length.
        words = np.maximum(candidates.lengths - 1, 0)[references.image_of]
        difference = words - np.maximum(references.lengths - 1, 0)
        similarity = similarity * np.exp(-(difference**2) / (2 * SIGMA**2))
        return {"CIDEr-D": mean_score(_mean_over_references(similarity, references))}

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line if CIDEr-D is 0 for every caption of some images that have references with words."""
        references = self.vectors.references
        has_words = np.array([any(texts) for texts in references.tokens])
        stuck = self.vectors.flat & has_words
        if not stuck.any():
            return ()
        if self.vectors.unseen == 0:
            return ("CIDEr-D is 0 for every caption, because there is one image, so that every idf is 0: add images",)
        reason = "n-gram of the references occurs in all images that document frequencies come from"
        if stuck.sum() == has_words.sum():
            return (f"CIDEr-D is 0 for every caption, because each {reason}: add images with other captions",)
        first = references.image_ids[int(np.argmax(stuck))]
        return (
            f"CIDEr-D is 0 for every caption of {stuck.sum()} of {len(stuck)} images (first: image {first}), because "
            f"each {reason}",
        )


def score_original(vectors: Vectors) -> Callable[[Candidates], MetricScores]:
    """Returns a function that computes the original CIDEr of candidates, without clipping and length penalty."""

    def score(candidates: Candidates) -> MetricScores:
        similarity = vectors.similarities(candidates, clip=False).mean(0)
        return {"CIDEr (original)": mean_score(_mean_over_references(similarity, vectors.references))}

    return score


def _mean_over_references(similarity: np.ndarray, references: References) -> np.ndarray:
    images = len(references.tokens)
    return 10 * np.bincount(references.image_of, similarity, minlength=images) / references.per_image
