"""The sizes of a dataset that a plan needs: from the prepared dataset, or else from published figures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.caption_tokens import CaptionTokens, total_counts
from imgcap_jax.data.mixtures import rows_per_epoch
from imgcap_jax.data.sources import (
    CaptionSource,
    default_data_dir,
    find_damaged,
    find_prepared,
    open_source,
    parse_mixture,
)
from imgcap_jax.data.vocabulary import SPECIAL, Vocabulary
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError, counted
from imgcap_jax.experiment import Experiment
from imgcap_jax.metrics.degeneration import BAD_ENDINGS, CONJUNCTIONS, FUNCTION_WORDS
from imgcap_jax.tokenizers import DEFAULT, Tokenizer, tokens_of

CAPTIONS = 5
"""Reference captions per image of the named datasets."""
WORDS = 10.4
"""Words per caption without eos: the mean of COCO 2014 in the package's tokens (``scripts/measuring.py``)."""
_LONGEST = 50  # tokens of the longest reference that stands for those of an unprepared dataset


@dataclass(frozen=True)
class Published:
    """Training images and words of a dataset, and their source."""

    images: int
    vocabulary: int
    source: str


_KARPATHY = "Karpathy and Fei-Fei 2015, arXiv:1412.2306"
PUBLISHED = {
    "coco_captions": Published(113_287, 9_487, f"train + restval of {_KARPATHY}; words from ImageCaptioning.pytorch"),
    "flickr8k": Published(6_000, 2_538, _KARPATHY),
    "flickr30k": Published(29_000, 7_414, _KARPATHY),
}
PUBLISHED_COUNT = 5
"""The words of ``PUBLISHED`` occur at least this number of times in the training captions."""


@dataclass(frozen=True)
class Sizes:
    """What a plan knows about the training data.

    Attributes:
        images: training images per epoch.
        vocabulary: the words of the model.
        stored: different training images, of which a mixture can repeat some.
        captions: their captions.
        sources: the prepared training splits; empty if the dataset is not prepared.
        assumptions: one line per number that is assumed and not read.
    """

    images: int
    vocabulary: Vocabulary
    stored: int
    captions: int
    sources: tuple[CaptionSource, ...]
    assumptions: tuple[str, ...]

    def references(self, experiment: Experiment) -> CaptionTable | None:
        """The references that the objective's batches contain; random ones if the dataset is not prepared."""
        if self.sources or experiment.objective.references((), self.vocabulary) is None:
            return experiment.objective.references(self.sources, self.vocabulary)
        return _random_captions(self.images, len(self.vocabulary))


def sizes_of(experiment: Experiment, images: int | None, vocabulary: int | None) -> Sizes:
    """The sizes of an experiment's training data.

    Args:
        experiment: its dataset and tokeniser are read.
        images: training images per epoch, in place of the dataset's.
        vocabulary: the number of words, in place of the dataset's.

    Raises:
        UserError: the dataset is damaged, or it is neither prepared nor known, and a number is not given.
    """
    data = experiment.data
    mixture = parse_mixture(data.dataset)
    for name, value in (("--images", images), ("--vocabulary", vocabulary)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if images is not None and vocabulary is not None:
        return _assumed(experiment, images, vocabulary, "given", "given")
    sources = _prepared([name for name, _ in mixture], data.data_dir)
    if sources:
        splits = [CaptionTokens.of(source, data.tokenizer) for source in sources]
        weighted = [(source, weight) for source, (_, weight) in zip(sources, mixture, strict=True)]
        rows = sum(rows_per_epoch(weighted))
        words = Vocabulary.from_counts(total_counts(splits), data.min_count, data.tokenizer)
        if images is not None or vocabulary is not None:
            here = f"{data.dataset}, prepared"
            sizes = _assumed(
                experiment,
                images or rows,
                vocabulary or len(words),
                here if images is None else "given",
                here if vocabulary is None else "given",
            )
            return sizes if vocabulary else replace(sizes, vocabulary=words)
        captions = sum(len(split.lengths) for split in splits)
        return Sizes(rows, words, sum(map(len, sources)), captions, tuple(sources), ())
    published = PUBLISHED.get(mixture[0][0]) if len(mixture) == 1 else None
    if published is None:
        raise UserError(
            f"{data.dataset} is not prepared, and its sizes are not known; prepare it, or give --images and "
            f"--vocabulary"
        )
    for field, of_published in (("min_count", PUBLISHED_COUNT), ("tokenizer", DEFAULT)):
        if vocabulary is None and (value := getattr(data, field)) != of_published:
            raise UserError(
                f"data.{field} is {value}, but the known number of words of {data.dataset} is for {of_published}; "
                f"prepare the dataset, or give --vocabulary"
            )
    return _assumed(
        experiment,
        images or published.images,
        vocabulary or published.vocabulary + len(SPECIAL),
        "given" if images else published.source,
        "given" if vocabulary else f"{published.source}; {len(SPECIAL)} special ones included",
    )


def _prepared(names: Sequence[str], data_dir: Path | None) -> list[CaptionSource]:
    """The training splits; empty if one of them is not in the default folder.

    Raises:
        UserError: a dataset is damaged, or it is not in the folder that is given.
    """
    default = default_data_dir()
    if data_dir is None and not all(find_prepared(name, default) or find_damaged(name, default) for name in names):
        return []
    return [open_source(name, "train", data_dir) for name in names]


def _assumed(experiment: Experiment, images: int, vocabulary: int, images_of: str, words_of: str) -> Sizes:
    """Sizes that are not all those of a prepared dataset, and where they come from."""
    assumptions = (
        f"{counted(images, 'training image')} ({images_of})",
        f"{counted(vocabulary, 'word')} ({words_of})",
    )
    words = _vocabulary(vocabulary, experiment.data.tokenizer, experiment.decoding)
    return Sizes(images, words, images, CAPTIONS * images, (), assumptions)


def _vocabulary(size: int, tokenizer: Tokenizer, decoding: Decoding) -> Vocabulary:
    """A vocabulary of this size that contains the words that objectives, rules and the decoding settings name."""
    forms = [form for entry in decoding.must for form in entry.split("|")]
    asked = [word for text in (decoding.prefix, *forms) for word in tokens_of(text, tokenizer)]
    named = [*asked, *sorted({*BAD_ENDINGS, *CONJUNCTIONS, *FUNCTION_WORDS})]
    words = list(dict.fromkeys([*SPECIAL, *named]))[: max(size, len(SPECIAL) + 1)]
    words += [f"word{number}" for number in range(size - len(words))]
    return Vocabulary(tuple(words), (0,) * len(words), tokenizer)


def _random_captions(images: int, vocabulary: int) -> CaptionTable:
    """References in which words are as frequent as in text (Zipf's law), with eos: five per image.

    They stand for the captions of a dataset that is not prepared: batches have their shapes, and document frequencies
    about their size.
    """
    random = np.random.default_rng(0)
    captions = CAPTIONS * images
    lengths = np.clip(random.normal(WORDS, 2.2, captions).round(), 5, _LONGEST - 1).astype(np.int64)
    first = len(SPECIAL)
    share = 1.0 / np.arange(1, vocabulary - first + 1)
    reached = np.cumsum(share / share.sum())
    tokens = np.zeros((captions, _LONGEST), np.int32)
    place = np.arange(_LONGEST)
    drawn = first + np.searchsorted(reached, random.random(int(lengths.sum())), side="right")
    tokens[place < lengths[:, None]] = np.minimum(drawn, vocabulary - 1)
    tokens[np.arange(captions), lengths] = 2  # eos
    return CaptionTable(tokens, np.full(images, CAPTIONS))
