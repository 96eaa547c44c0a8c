"""The vocabulary: words and their ids."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from imgcap_jax.data.caption_tokens import CaptionTokens
from imgcap_jax.errors import UserError, counted
from imgcap_jax.files import json_digest, read_json, write_text
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK
from imgcap_jax.tokenizers import DEFAULT, Tokenizer, text_of, tokens_of

__all__ = ["BOS", "EOS", "PAD", "UNK", "Vocabulary"]

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@dataclass(frozen=True)
class Vocabulary:
    """The words of a model. The id of a word is its index.

    Attributes:
        words: `<pad> <bos> <eos> <unk>`, then the words by descending count; ties are in alphabetical order.
        counts: the number of occurrences of each word in the captions that the vocabulary was built from. The count of
            `<unk>` is that of all rarer words; the counts of the other special tokens are 0.
        tokenizer: splits captions into words, and joins words into captions.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]
    tokenizer: Tokenizer = DEFAULT

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 5, tokenizer: Tokenizer = DEFAULT) -> "Vocabulary":
        """Builds a vocabulary of the words that occur at least `min_count` times in the captions.

        Raises:
            UserError: no word occurs that often; see also `tokens_of`.
        """
        counts = CaptionTokens.of_images(([caption] for caption in captions), tokenizer).counts()
        return cls.from_counts(counts, min_count, tokenizer)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_count: int, tokenizer: Tokenizer) -> "Vocabulary":
        """Builds a vocabulary of the words that occur at least `min_count` times, from the count of each word.

        Raises:
            UserError: no word occurs that often.
        """
        # The text "<unk>" in a caption is one token. It must not become a second unknown word.
        rare = sum(counts.get(token, 0) for token in SPECIAL)
        ordered = sorted(
            ((word, count) for word, count in counts.items() if word not in SPECIAL),
            key=lambda item: (-item[1], item[0]),
        )
        known = [(word, count) for word, count in ordered if count >= min_count]
        if not known:
            most = "there are none"
            if ordered:
                most = f"the most frequent one, {ordered[0][0]!r}, {counted(ordered[0][1], 'time')}"
            raise UserError(
                f"no word occurs {counted(min_count, 'time')} in the training captions ({most}): use a lower "
                f"min-count, or the tokenizer characters if there are no blanks between words"
            )
        rare += sum(count for _, count in ordered[len(known) :])
        words = SPECIAL + tuple(word for word, _ in known)
        return cls(words, (0, 0, 0, rare, *(count for _, count in known)), tokenizer)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words) if index >= len(SPECIAL)}

    def ids(self, words: Iterable[str]) -> tuple[int, ...]:
        """The id of each word; unk for words that are not in the vocabulary."""
        return tuple(self._ids.get(word, UNK) for word in words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def known_ids(self, words: Iterable[str]) -> tuple[int, ...]:
        """The ids of those words that are in the vocabulary, in ascending order."""
        return tuple(sorted(self._ids[word] for word in words if word in self._ids))

    def encode(self, caption: str, length: int) -> np.ndarray:
        """The ids of a caption, int32 [length]: bos, words, eos, pad.

        A caption of more than `length - 2` words is cut and has no eos, so that a model does not learn to stop in the
        middle of a sentence.

        Raises:
            ValueError: `length` is below 3.
        """
        if length < 3:
            raise ValueError(f"length {length} leaves no room for bos, a word and eos")
        words = self.ids(tokens_of(caption, self.tokenizer))
        tokens = [BOS, *words, EOS] if len(words) <= length - 2 else [BOS, *words[: length - 2]]
        encoded = np.full(length, PAD, np.int32)
        encoded[: len(tokens)] = tokens
        return encoded

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids [T] up to the first eos, without bos and pad."""
        return text_of(self.decode_words(ids), self.tokenizer)

    def decode_words(self, ids: ArrayLike) -> list[str]:
        """The words of token ids [T] up to the first eos, without bos and pad."""
        words: list[str] = []
        for index in np.asarray(ids).tolist():
            if index == EOS:
                break
            if index not in (BOS, PAD):
                words.append(self.words[index])
        return words

    def extended(self, other: "Vocabulary") -> "Vocabulary":
        """A vocabulary of these words with their ids, then the new words of `other`. Counts are added.

        Raises:
            UserError: the two have different tokenisers.
        """
        if self.tokenizer != other.tokenizer:
            raise UserError(
                f"the run to start from has another tokenizer ({self.tokenizer.label}, here "
                f"{other.tokenizer.label}): use the same data.tokenizer, or train from scratch"
            )
        theirs = dict(zip(other.words, other.counts, strict=True))
        known = set(self.words)
        new = [word for word in other.words if word not in known]
        counts = [count + theirs.get(word, 0) for word, count in zip(self.words, self.counts, strict=True)]
        return Vocabulary((*self.words, *new), (*counts, *(theirs[word] for word in new)), self.tokenizer)

    def save(self, path: Path) -> None:
        """Writes the vocabulary as JSON."""
        document = {"tokenizer": self.tokenizer.label, "words": self.words, "counts": self.counts}
        document["sha256"] = _digest(self.words, self.counts)
        write_text(path, json.dumps(document, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer = DEFAULT) -> "Vocabulary":
        """Reads a vocabulary that `save` wrote.

        Raises:
            UserError: the file is missing, is not a vocabulary, or was built with another tokeniser.
        """
        hint = "restore it from a backup or from a run of the same experiment"
        document = read_json(path, hint)
        fields = document if isinstance(document, dict) else {}
        words, counts = fields.get("words"), fields.get("counts")
        if not (
            isinstance(words, list)
            and isinstance(counts, list)
            and tuple(words[:4]) == SPECIAL
            and all(isinstance(word, str) for word in words)
            and all(type(count) is int and count >= 0 for count in counts)
            and len(words) == len(counts) == len(set(words))
        ):
            raise UserError(
                f"{path} is not a vocabulary ('words' must be distinct and begin with {' '.join(SPECIAL)}; 'counts' "
                f"must have one number per word): {hint}"
            )
        if fields.get("sha256", _digest(words, counts)) != _digest(words, counts):  # older versions wrote none
            raise UserError(f"{path} is damaged (its digest has changed): {hint}")
        label = fields.get("tokenizer", DEFAULT.label)
        if label != tokenizer.label:
            raise UserError(
                f"{path} was built with the tokenizer {label!r}, but that of the experiment is {tokenizer.label!r}; "
                f"use the experiment of this run, with its fields and code"
            )
        return cls(tuple(words), tuple(counts), tokenizer)


def _digest(words: Sequence[str], counts: Sequence[int]) -> str:
    """A digest of a vocabulary: other words would be other captions, without an error."""
    return json_digest([*zip(words, counts, strict=True)])
