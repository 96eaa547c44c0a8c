"""Degeneration of captions: bad endings, repetitions, missing ends and short captions.

Training on a reward that counts n-grams can produce captions that break off ("a man riding a wave on a"), repeat a
phrase, never end, or are too short (bad endings: Guo et al., EMNLP 2018; their cause: Hu et al. 2023,
https://arxiv.org/abs/2305.12254). The usual metrics do not show this, so it is measured separately. The values are
compared with those of the references, because people also end a caption on a word like "on" from time to time.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BAD_ENDINGS = frozenset(
    {
        *("a", "an", "the", "this", "that", "these", "those", "his", "her", "its", "their", "my", "your", "our"),
        *("of", "in", "on", "at", "to", "for", "from", "with", "by", "into", "onto", "over", "under", "near", "behind"),
        *("and", "or", "but", "while", "as", "is", "are", "was", "were", "very"),
    }
)
"""Words that should not end an English caption: articles, possessives, prepositions, conjunctions, auxiliaries."""


@dataclass(frozen=True)
class Degeneration:
    """The mean length of a set of captions, and the shares of degenerate captions, 0 to 1.

    Attributes:
        captions: the number of captions.
        length: words per caption.
        bad_endings: share of captions that end with one of ``BAD_ENDINGS``.
        repetitions: share of captions with a repetition: a phrase directly after itself ("a man in a man in", "the
            the"), or the same four words at two positions.
        unfinished: share of captions that reached the maximum number of words without an end; None: unknown.
    """

    captions: int
    length: float
    bad_endings: float
    repetitions: float
    unfinished: float | None = None

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]], unfinished: float | None = None) -> "Degeneration":
        """Measures tokenised captions. There must be at least one."""
        lengths, endings, repetitions = [], [], []
        for words in captions:
            lengths.append(len(words))
            endings.append(bool(words) and words[-1] in BAD_ENDINGS)
            repetitions.append(repeats(words))
        count = len(lengths)
        return cls(count, sum(lengths) / count, sum(endings) / count, sum(repetitions) / count, unfinished)

    def warnings(self, references: "Degeneration") -> tuple[str, ...]:
        """One line for each value that is worse than that of the references by more than chance."""
        said = []
        if self._above(self.bad_endings, references.bad_endings):
            said.append(
                f"{_percent(self.bad_endings)} of the captions end with a word such as 'a' or 'with' (references "
                f"{_percent(references.bad_endings)}); imgcap evaluate --decode.forbid-bad-endings true prevents this"
            )
        if self._above(self.repetitions, references.repetitions):
            said.append(
                f"{_percent(self.repetitions)} of the captions repeat a phrase (references "
                f"{_percent(references.repetitions)})"
            )
        if self.unfinished is not None and self._above(self.unfinished, 0.0):
            said.append(f"{_percent(self.unfinished)} of the captions have no end and were cut at the maximum length")
        if self.length < _SHORTEST * references.length:
            said.append(
                f"the captions are shorter than the references: {self.length:.1f} words on average, references "
                f"{references.length:.1f}"
            )
        return tuple(said)

    def _above(self, share: float, usual: float) -> bool:
        """Whether a share of these captions exceeds the usual share by more than chance."""
        return share - usual > max(_MARGIN, 3 * math.sqrt(share * (1 - share) / self.captions))


_MARGIN = 0.02  # the smallest excess over the references' share, for any number of captions
_SHORTEST = 0.8  # the smallest ratio to the references' length; models trained by cross-entropy reach at least 0.9
_FAR = 4  # words that count as a repetition at any distance; good captions often repeat three words


def repeats(words: Sequence[str]) -> bool:
    """Whether a caption contains a phrase twice in a row, or the same four words at two positions."""
    for size in range(1, len(words) // 2 + 1):
        run = 0
        for place in range(size, len(words)):
            run = run + 1 if words[place] == words[place - size] else 0
            if run == size:
                return True
    phrases = [tuple(words[i : i + _FAR]) for i in range(len(words) - _FAR + 1)]
    return len(set(phrases)) < len(phrases)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
