"""Notes on captions that a vocabulary or a training setting does not fit, for people who prepare data or train."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imgcap_jax.data.caption_tokens import CaptionTokens, total_counts
from imgcap_jax.data.sources import CaptionSource
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError, counted
from imgcap_jax.tokenizers import DEFAULT, LONGEST_MEAN, Characters, looks_english, why_unsegmented

LOWEST_COVERAGE = 0.8
_FEW = 20  # captions; fewer show no pattern


@dataclass(frozen=True)
class CaptionCounts:
    """What the notes depend on.

    Attributes:
        captions: the number of captions.
        lengths: lengths[n] is the number of captions with n words.
        words, known: the number of words, and of those in the vocabulary.
        unsegmented: why the text does not seem to be separated into words; "" if it does.
        english: whether the captions seem to be English.
    """

    captions: int
    lengths: tuple[int, ...]
    words: int
    known: int
    unsegmented: str
    english: bool

    @classmethod
    def of(cls, splits: Sequence[CaptionTokens], vocabulary: Vocabulary | None) -> "CaptionCounts":
        """Counts the words of captions. Without a vocabulary, none is known."""
        counts = total_counts(splits)
        lengths = np.bincount(np.concatenate([split.lengths for split in splits]), minlength=1)
        captions, words = int(lengths.sum()), sum(counts.values())
        unsegmented = why_unsegmented(counts, captions, splits[0].tokenizer)
        # Characters that the tokeniser drops count here, such as emoji.
        long = sum(split.characters for split in splits) > LONGEST_MEAN * words
        own = isinstance(splits[0].tokenizer, Characters)
        if not unsegmented and not own and long and captions >= _FEW and 2 * sum(lengths[:2]) > captions:
            unsegmented = "most of them have one word or none"
        return cls(
            captions,
            tuple(map(int, lengths)),
            words,
            0 if vocabulary is None else sum(count for word, count in counts.items() if word in vocabulary),
            unsegmented,
            looks_english(counts),
        )

    @property
    def coverage(self) -> float:
        """The share of the words that are in the vocabulary; 1 if there are no words."""
        return self.known / self.words if self.words else 1.0

    def share_longer(self, words: int) -> float:
        """The share of captions with more than `words` words."""
        return sum(self.lengths[words + 1 :]) / max(1, self.captions)


def vocabulary_notes(
    training: CaptionCounts, validation: CaptionCounts | None, vocabulary: Vocabulary | None, min_count: int
) -> list[str]:
    """Notes on words: text that is not separated into words, captions without words, and low coverage.

    Args:
        training, validation: the captions of the two splits; None: there is no validation split. The coverage of fewer
            than 20 validation captions is not reported.
        vocabulary: None if no word occurs ``min_count`` times.
        min_count: the smallest count of a word of the vocabulary.
    """
    notes = []
    if training.unsegmented:
        notes.append(
            f"the captions do not seem to be separated into words ({training.unsegmented}); use "
            f"--data.tokenizer characters, or put blanks between words"
        )
    if training.lengths[0]:
        notes.append(
            f"{training.lengths[0]} of {training.captions} training captions have no words, so the model learns only "
            f"to stop; remove them, or use another --data.tokenizer if it drops their characters"
        )
    if vocabulary is None:
        often = counted(min_count, "time")
        return [*notes, f"no word occurs {often} in the training captions; train with a smaller --data.min-count"]
    counts = {"training": training, "validation": validation if validation and validation.captions >= _FEW else None}
    low = {name: split.coverage for name, split in counts.items() if split and split.coverage < LOWEST_COVERAGE}
    if low:
        shares = " and ".join(f"{100 * coverage:.0f} % of the {name} words" for name, coverage in low.items())
        which = "of the training captions" if min_count == 1 else f"that occur at least {min_count} times"
        smaller = "more training captions" if min_count == 1 else "a smaller --data.min-count"
        notes.append(
            f"the words {which} are only {shares}; the others become <unk>: use {smaller}, or "
            f"--data.tokenizer characters if there are no blanks between words"
        )
    return notes


def prepared_notes(training: CaptionSource, validation: CaptionSource | None) -> list[str]:
    """The notes on a prepared dataset, with the default tokeniser and min_count."""
    min_count = 5
    tokens = CaptionTokens.of(training, DEFAULT)
    try:
        vocabulary = Vocabulary.from_counts(tokens.counts(), min_count, DEFAULT)
    except UserError:
        vocabulary = None
    theirs = None
    if validation is not None and validation.split != training.split:
        theirs = CaptionCounts.of([CaptionTokens.of(validation, DEFAULT)], vocabulary)
    return vocabulary_notes(CaptionCounts.of([tokens], vocabulary), theirs, vocabulary, min_count)
