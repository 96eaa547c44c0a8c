"""Diversity of captions: over a whole file, and among several captions of the same image."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgcap_jax.metrics.cider import Vectors
from imgcap_jax.metrics.corpus import Candidates, References
from imgcap_jax.tokenizers import DEFAULT, Tokenizer, tokens_of


@dataclass(frozen=True)
class Diversity:
    """Diversity of a file with one caption per image.

    Attributes:
        vocabulary: the number of different words.
        length: the mean number of words per caption.
        distinct: the number of different n-grams divided by the number of words, n = 1 and 2 (Li et al., 2016).
        unique: the share of captions that no other image has.
        novel: the share of captions that do not occur in the training captions; None if those were not given.
    """

    vocabulary: int
    length: float
    distinct: tuple[float, float]
    unique: float
    novel: float | None


@dataclass(frozen=True)
class SetDiversity:
    """Diversity of a file with several captions per image, as means over the images with at least two captions.

    Attributes:
        images: the number of images with at least two captions.
        captions: the mean number of captions per image.
        distinct: the number of different n-grams in an image's captions divided by the number of words, n = 1 and 2
            (Div-1 and Div-2 of Shetty et al., 2017).
        self_cider: self-CIDEr (Wang and Chan, 2019). It is 0 if the captions of an image are identical and 1 if they
            have at least four words each and no n-grams in common. It is nan if no caption has a word with a positive
            idf.
    """

    images: int
    captions: float
    distinct: tuple[float, float]
    self_cider: float


def diversity(
    captions: Iterable[str], training: Iterable[str] | None = None, tokenizer: Tokenizer = DEFAULT
) -> Diversity:
    """Diversity of one caption per image, for at least one image.

    Captions are compared as tokens, without case and punctuation.
    """
    tokens = [tuple(tokens_of(caption, tokenizer)) for caption in captions]
    often = Counter(tokens)
    words = sum(map(len, tokens))
    novel = None
    if training is not None:
        seen = {tuple(tokens_of(caption, tokenizer)) for caption in training}
        novel = sum(caption not in seen for caption in tokens) / len(tokens)
    return Diversity(
        len({word for caption in tokens for word in caption}),
        words / len(tokens),
        (len(_grams_of(tokens, 1)) / max(1, words), len(_grams_of(tokens, 2)) / max(1, words)),
        sum(often[caption] == 1 for caption in tokens) / len(tokens),
        novel,
    )


def set_diversity(
    sets: Mapping[int, Sequence[str]], references: Mapping[int, Sequence[str]], tokenizer: Tokenizer = DEFAULT
) -> SetDiversity | None:
    """Diversity of several captions per image; None if no image has at least two.

    Args:
        sets: image id -> raw captions.
        references: image id -> raw captions, from which self-CIDEr's document frequencies are computed.
        tokenizer: splits both.
    """
    several = {image: [tokens_of(caption, tokenizer) for caption in captions] for image, captions in sets.items()}
    several = {image: captions for image, captions in several.items() if len(captions) > 1}
    if not several:
        return None
    words = [max(1, sum(map(len, captions))) for captions in several.values()]
    distinct = [
        float(
            np.mean(
                [len(_grams_of(captions, n)) / total for captions, total in zip(several.values(), words, strict=True)]
            )
        )
        for n in (1, 2)
    ]
    self_cider = [_self_cider(kernel) for kernel in _kernels(several, References.from_captions(references, tokenizer))]
    return SetDiversity(
        len(several),
        float(np.mean([len(captions) for captions in several.values()])),
        (distinct[0], distinct[1]),
        float(np.mean([value for value in self_cider if not math.isnan(value)] or [math.nan])),
    )


def _grams_of(captions: Iterable[Sequence[str]], n: int) -> set[tuple[str, ...]]:
    return {tuple(caption[i : i + n]) for caption in captions for i in range(len(caption) - n + 1)}


def _kernels(sets: Mapping[int, list[list[str]]], references: References) -> Iterator[np.ndarray]:
    """For each image, the CIDEr similarity between its m captions, from 0 to 1, [m,m]."""
    captions = References(tuple(sets), tuple(map(tuple, sets.values())))
    vectors = Vectors(captions, references.tokens)
    # Round k compares caption k of each image with all captions of the image. An image with fewer captions uses its
    # last caption again; the slice below drops that row.
    rounds = range(int(captions.per_image.max()))
    similarity = np.stack(
        [
            vectors.similarities(
                Candidates([found[min(number, len(found) - 1)] for found in captions.tokens], captions), clip=False
            ).mean(0)
            for number in rounds
        ]
    )
    for end, m in zip(np.cumsum(captions.per_image), captions.per_image, strict=True):
        yield similarity[:m, end - m : end]


def _self_cider(kernel: np.ndarray) -> float:
    """-log_m(r), where r is the largest square root of an eigenvalue divided by the sum of all; kernel [m,m]."""
    eigenvalues = np.linalg.eigvalsh(kernel)
    # Rounding leaves eigenvalues of 0 at some 1e-17, whose square roots would count.
    noise = len(kernel) * np.finfo(kernel.dtype).eps * eigenvalues.max()
    roots = np.sqrt(np.where(eigenvalues > noise, eigenvalues, 0.0))
    if not roots.sum():
        return math.nan
    return -math.log(roots.max() / roots.sum(), len(kernel))
