"""Lengths and words of captions, compared with their references."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imgcap_jax.tokenizers import Tokenizer, tokens_of

_RARE = 5  # words in fewer images, of captions and of references, are not compared


@dataclass(frozen=True)
class WordUse:
    """How often a word is used.

    Attributes:
        word: the word.
        captions: the share of captions with the word.
        references: the share of reference captions with the word, averaged per image first.
    """

    word: str
    captions: float
    references: float


@dataclass(frozen=True)
class Wording:
    """Lengths and words of the captions of a split.

    Attributes:
        lengths: number of words -> share of the captions; reference_lengths: of the reference captions.
        mean_length, reference_length: mean numbers of words.
        different: the number of different captions; captions: of all captions.
        words: the number of different words in the captions; reference_words: in the reference captions.
        overused, underused: the words with the largest differences between captions and references, largest first.
    """

    lengths: dict[int, float]
    reference_lengths: dict[int, float]
    mean_length: float
    reference_length: float
    different: int
    captions: int
    words: int
    reference_words: int
    overused: tuple[WordUse, ...]
    underused: tuple[WordUse, ...]


def wording(
    captions: Mapping[int, str], references: Mapping[int, Sequence[str]], tokenizer: Tokenizer, *, most: int = 12
) -> Wording:
    """Compares captions with their references.

    Args:
        captions: image id -> caption.
        references: image id -> reference captions, at least one per image.
        tokenizer: splits captions into words.
        most: the number of overused and of underused words.
    """
    ours = {image: tokens_of(caption, tokenizer) for image, caption in captions.items()}
    theirs = {image: [tokens_of(text, tokenizer) for text in references[image]] for image in captions}
    own: Counter[str] = Counter()
    other: Counter[str] = Counter()  # of images
    shares: dict[str, float] = defaultdict(float)
    for image, words in ours.items():
        own.update(set(words))
        found = Counter(word for text in theirs[image] for word in set(text))
        other.update(found.keys())
        for word, count in found.items():
            shares[word] += count / len(theirs[image])
    count = len(ours)
    uses = [
        WordUse(word, own[word] / count, shares[word] / count)
        for word in own.keys() | other.keys()
        if max(own[word], other[word]) >= _RARE
    ]
    uses.sort(key=lambda use: (use.captions - use.references, use.word))
    lengths = Counter(map(len, ours.values()))
    reference_lengths = Counter(len(text) for texts in theirs.values() for text in texts)
    return Wording(
        _shares(lengths),
        _shares(reference_lengths),
        _mean(lengths),
        _mean(reference_lengths),
        len(set(map(tuple, ours.values()))),
        count,
        len(own),
        len({word for texts in theirs.values() for text in texts for word in text}),
        tuple(use for use in reversed(uses[-most:]) if use.captions > use.references),
        tuple(use for use in uses[:most] if use.captions < use.references),
    )


def _shares(counts: Counter[int]) -> dict[int, float]:
    total = counts.total()
    return {value: counts[value] / total for value in sorted(counts)}


def _mean(counts: Counter[int]) -> float:
    return sum(value * count for value, count in counts.items()) / counts.total()
