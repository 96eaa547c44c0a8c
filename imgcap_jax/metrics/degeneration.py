"""What goes wrong with captions that were trained for a score, measured on the captions alone.

A reward that counts n-grams pays for captions that break off ("a man riding a wave on a"), say a phrase twice, never
end, or shrink to what is certain (bad endings: Guo et al., EMNLP 2018; why: Hu et al. 2023,
https://arxiv.org/abs/2305.12254). No score of the table shows it, so it is measured beside them, and beside what the
people who wrote the references do: they, too, end a caption on "on" now and then.
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
"""Words on which no English caption ends well: articles, possessives, prepositions, conjunctions, auxiliaries."""


@dataclass(frozen=True)
class Degeneration:
    """Of a set of captions: their mean length, and shares of captions, 0 to 1.

    Attributes:
        captions: how many there are.
        length: words a caption.
        bad_endings: captions that end on one of ``BAD_ENDINGS``.
        repetitions: captions that say something twice: a phrase directly after itself ("a man in a man in", "the
            the"), or the same four words at two places.
        unfinished: captions cut at the most words there may be, for they had no end; None: not known.
    """

    captions: int
    length: float
    bad_endings: float
    repetitions: float
    unfinished: float | None = None

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]], unfinished: float | None = None) -> "Degeneration":
        """Measures tokenised captions, at least one."""
        lengths, endings, repetitions = [], [], []
        for words in captions:
            lengths.append(len(words))
            endings.append(bool(words) and words[-1] in BAD_ENDINGS)
            repetitions.append(repeats(words))
        count = len(lengths)
        return cls(count, sum(lengths) / count, sum(endings) / count, sum(repetitions) / count, unfinished)

    def warnings(self, references: "Degeneration") -> tuple[str, ...]:
        """A line for each way in which captions are worse than their references by more than chance."""
        said = []
        if self._above(self.bad_endings, references.bad_endings):
            said.append(
                f"{_percent(self.bad_endings)} of the captions break off on a word such as 'a' or 'with' (references "
                f"{_percent(references.bad_endings)}): imgcap evaluate --decode.forbid-bad-endings true forbids it"
            )
        if self._above(self.repetitions, references.repetitions):
            said.append(
                f"{_percent(self.repetitions)} of the captions repeat a phrase (references "
                f"{_percent(references.repetitions)})"
            )
        if self.unfinished is not None and self._above(self.unfinished, 0.0):
            said.append(f"{_percent(self.unfinished)} of the captions have no end and were cut at the most words")
        if self.length < _SHORTEST * references.length:
            said.append(
                f"the captions have {self.length:.1f} words on average, the references {references.length:.1f}: they "
                f"say less than people do"
            )
        return tuple(said)

    def _above(self, share: float, usual: float) -> bool:
        """Whether a share of these captions is above what is usual by more than chance."""
        return share - usual > max(_MARGIN, 3 * math.sqrt(share * (1 - share) / self.captions))


_MARGIN = 0.02  # above the references' share, whatever the number of captions
_SHORTEST = 0.8  # of the references' length; models trained by cross-entropy have 0.9 or more
_FAR = 4  # words that are a repetition wherever they come again; three are often said twice in good captions


def repeats(words: Sequence[str]) -> bool:
    """Whether a caption says a phrase twice in a row, or four words at two places."""
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
