"""How varied captions are: of a whole file, and of several captions of the same image."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgcap_jax.metrics.cider import Vectors
from imgcap_jax.metrics.corpus import Candidates, References
from imgcap_jax.text import tokenize


@dataclass(frozen=True)
class Diversity:
    """Of a file with one caption an image.

    Attributes:
        vocabulary: different words used. length: words a caption, on average.
        distinct: different n-grams for each word there is, n = 1 and 2 (Li et al., 2016).
        unique: share of captions that no other image has.
        novel: share of captions that are not among the training captions; None where those were not given.
    """

    vocabulary: int
    length: float
    distinct: tuple[float, float]
    unique: float
    novel: float | None


@dataclass(frozen=True)
class SetDiversity:
    """Of a file with several captions an image; means over the images with two or more.

    Attributes:
        images: how many those are. captions: captions an image.
        distinct: different n-grams of an image's captions as a share of its words, n = 1 and 2 (Div-1 and Div-2 of
            Shetty et al., 2017).
        self_cider: 0 where an image's captions say the same, 1 where captions of four words or more have nothing in
            common, nan where no caption has a word with an idf (Wang and Chan, 2019).
    """

    images: int
    captions: float
    distinct: tuple[float, float]
    self_cider: float


def diversity(captions: Iterable[str], training: Iterable[str] | None = None) -> Diversity:
    """Diversity of one caption an image, of one image at least; compared as tokens, without case and punctuation."""
    tokens = [tuple(tokenize(caption)) for caption in captions]
    often = Counter(tokens)
    words = sum(map(len, tokens))
    novel = None
    if training is not None:
        seen = {tuple(tokenize(caption)) for caption in training}
        novel = sum(caption not in seen for caption in tokens) / len(tokens)
    return Diversity(
        len({word for caption in tokens for word in caption}),
        words / len(tokens),
        (len(_grams_of(tokens, 1)) / max(1, words), len(_grams_of(tokens, 2)) / max(1, words)),
        sum(often[caption] == 1 for caption in tokens) / len(tokens),
        novel,
    )


def set_diversity(sets: Mapping[int, Sequence[str]], references: Mapping[int, Sequence[str]]) -> SetDiversity | None:
    """Diversity of several captions an image; None where no image has two.

    Args:
        sets: image id -> its captions.
        references: image id -> raw captions, the source of the document frequencies of self-CIDEr.
    """
    several = {image: [tokenize(caption) for caption in captions] for image, captions in sets.items()}
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
    self_cider = [_self_cider(kernel) for kernel in _kernels(several, references)]
    return SetDiversity(
        len(several),
        float(np.mean([len(captions) for captions in several.values()])),
        (distinct[0], distinct[1]),
        float(np.mean([value for value in self_cider if not math.isnan(value)] or [math.nan])),
    )


def _grams_of(captions: Iterable[Sequence[str]], n: int) -> set[tuple[str, ...]]:
    return {tuple(caption[i : i + n]) for caption in captions for i in range(len(caption) - n + 1)}


def _kernels(sets: Mapping[int, list[list[str]]], references: Mapping[int, Sequence[str]]) -> Iterator[np.ndarray]:
    """The CIDEr of each image's captions with each other, from 0 to 1, [m,m] for each image."""
    captions = References(tuple(sets), tuple(map(tuple, sets.values())))
    vectors = Vectors(captions, References.from_captions(references).tokens)
    # The first caption of each image with all of its image, then the second, ...; the last again where there are fewer.
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
    """-log_m(r), with r the share of the largest of the square roots of the kernel's eigenvalues; kernel [m,m]."""
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(kernel), 0, None))
    if not roots.sum():
        return math.nan
    return -math.log(roots.max() / roots.sum(), len(kernel))
