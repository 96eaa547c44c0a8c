"""Statistics of a prepared dataset: counts, caption lengths and vocabulary coverage."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imgcap_jax.data.caption_checks import CaptionCounts, vocabulary_notes
from imgcap_jax.data.caption_tokens import CaptionTokens
from imgcap_jax.data.sources import CaptionSource, DatasetDescription, describe, open_source
from imgcap_jax.data.vocabulary import SPECIAL, Vocabulary
from imgcap_jax.errors import UserError, counted
from imgcap_jax.tokenizers import DEFAULT, Tokenizer


@dataclass(frozen=True)
class SplitStatistics:
    """Statistics of one split. Lengths are in words of the tokeniser.

    `word_counts[n]` is the number of captions with n words. `known` is the share of words, including repetitions, that
    are in the vocabulary of the training captions; None: there is no vocabulary.
    """

    images: int
    captions: int
    captions_per_image: tuple[int, float, int]  # fewest, mean, most
    word_counts: tuple[int, ...]
    known: float | None

    @property
    def mean_words(self) -> float:
        return float(np.average(np.arange(len(self.word_counts)), weights=self.word_counts))

    def percentile_words(self, percent: float) -> int:
        """The smallest length that at least `percent` % of the captions do not exceed."""
        shares = np.cumsum(self.word_counts) / self.captions
        return int(np.searchsorted(shares, percent / 100 - 1e-12))

    def share_longer(self, words: int) -> float:
        """The share of captions with more than `words` words."""
        return sum(self.word_counts[words + 1 :]) / self.captions


@dataclass(frozen=True)
class Inspection:
    """Statistics of a prepared dataset.

    `training` is the split that the vocabulary is built from. `vocabulary_size` includes the special tokens; it is None
    if no word occurs `min_count` times. `notes` are warnings.
    """

    dataset: DatasetDescription
    splits: dict[str, SplitStatistics]
    training: str
    vocabulary_size: int | None
    min_count: int
    tokenizer: Tokenizer = DEFAULT
    notes: tuple[str, ...] = ()

    def lines(self, *, show_skipped: int = 10) -> list[str]:
        """The report as lines of text."""
        dataset = self.dataset
        which = f" with at least {counted(self.min_count, 'occurrence')}"
        words = "no word" if self.vocabulary_size is None else counted(self.vocabulary_size - len(SPECIAL), "word")
        lines = [
            f"{dataset.name}  ({dataset.folder})",
            f"source   {dataset.source}",
            f"licence  {dataset.licence or 'not stated'}",
            f"vocabulary of the {self.training} captions: {words}{which} (tokenizer {self.tokenizer.label})",
            "",
            f"{'split':<20}{'images':>9}{'captions':>10}{'per image':>11}{'words':>7}{'median':>8}{'99 %':>6}"
            f"{'> 20':>8}{'known':>8}",
        ]
        for name, split in self.splits.items():
            lines.append(
                f"{name:<20}{split.images:>9,}{split.captions:>10,}{split.captions_per_image[1]:>11.2f}"
                f"{split.mean_words:>7.1f}{split.percentile_words(50):>8}{split.percentile_words(99):>6}"
                f"{split.share_longer(20):>8.2%}{'-' if split.known is None else f'{split.known:.2%}':>8}"
            )
        lines += [
            "words, median, 99 %: mean, median and 99th percentile of the words per caption; > 20: captions of more",
            "than 20 words; known: words that are in the vocabulary",
        ]
        lines += [f"note: {note}" for note in self.notes]
        lines += ["", f"skipped: {len(dataset.skipped)}"]
        lines += [f"  {entry.name}: {entry.reason}" for entry in dataset.skipped[:show_skipped]]
        if len(dataset.skipped) > show_skipped:
            lines.append(f"  ... full list: {dataset.folder / 'skipped.json'}")
        return lines


def inspect(
    name: str, data_dir: Path | None = None, *, min_count: int = 5, tokenizer: Tokenizer = DEFAULT
) -> Inspection:
    """Computes the statistics of a prepared dataset.

    The vocabulary is built from `train`, or from the first split if there is no `train`.

    Raises:
        UserError: the dataset is not prepared.
    """
    dataset = describe(name, data_dir)
    sources = {split: open_source(name, split, data_dir) for split in dataset.splits}
    training = sources.get("train") or next(iter(sources.values()))
    tokens = {split: CaptionTokens.of(source, tokenizer) for split, source in sources.items()}
    try:
        vocabulary = Vocabulary.from_counts(tokens[training.split].counts(), min_count, tokenizer)
    except UserError:  # no word occurs that often, which is a note
        vocabulary = None
    counts = {split: CaptionCounts.of([of_split], vocabulary) for split, of_split in tokens.items()}
    statistics = {
        split: _statistics(source, counts[split], covered=vocabulary is not None) for split, source in sources.items()
    }
    validation = counts.get("val") if training.split != "val" else None
    notes = [f"there is no split {name}, which training needs" for name in ("train", "val") if name not in sources]
    notes += vocabulary_notes(counts[training.split], validation, vocabulary, min_count)
    size = None if vocabulary is None else len(vocabulary)
    return Inspection(dataset, statistics, training.split, size, min_count, tokenizer, tuple(notes))


def _statistics(source: CaptionSource, counts: CaptionCounts, *, covered: bool) -> SplitStatistics:
    per_image = [len(source.captions(i)) for i in range(len(source))]
    return SplitStatistics(
        images=len(source),
        captions=counts.captions,
        captions_per_image=(min(per_image), counts.captions / len(source), max(per_image)),
        word_counts=counts.lengths,
        known=counts.coverage if covered else None,
    )
