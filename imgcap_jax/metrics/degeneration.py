"""Degeneration of captions: bad endings, repetitions, missing ends and short captions.

Training on a reward that counts n-grams can produce captions that break off ("a man riding a wave on a"), repeat a
phrase or a word ("a man sits on a car in a car"), never end, or are too short (bad endings: Guo et al., EMNLP 2018;
their cause: Hu et al. 2023, https://arxiv.org/abs/2305.12254). The usual metrics do not show this, so it is measured
separately. The values are compared with those of the references, because people also end a caption on a word like "on"
from time to time.
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

CONJUNCTIONS = frozenset({"and", "or", "but", "while", "whilst", "as", "when", "because"})
"""English words that begin a clause."""

FUNCTION_WORDS = (
    BAD_ENDINGS
    | CONJUNCTIONS
    | frozenset(
        {
            *("he", "she", "it", "they", "him", "them", "himself", "herself", "itself", "themselves", "i", "you", "we"),
            *("who", "whom", "whose", "which", "what", "there", "here", "some", "any", "each", "every", "both", "all"),
            *("off", "out", "up", "down", "through", "across", "around", "along", "against", "above", "below"),
            *("beside", "between", "among", "during", "after", "before", "towards", "toward", "inside", "outside"),
            *("past", "about"),
            *("within", "without", "underneath", "beneath", "beyond", "atop", "upon", "like", "than"),
            *("front", "next", "side"),
            *("be", "been", "being", "am", "has", "have", "had", "having", "do", "does", "did", "can", "could", "will"),
            *("would", "so", "then", "where", "if", "until", "since", "also", "just", "too", "not", "no"),
            *("'s", "'re", "'m", "'ve", "'ll", "'d", "n't"),
        }
    )
)
"""English words without a content of their own, with the nouns of "in front of", "next to" and "side by side".

"another" and "other" are left out, because they introduce a second thing: "a man and another man".
"""


@dataclass(frozen=True)
class Degeneration:
    """The mean length of a set of captions, and the shares of degenerate captions, 0 to 1.

    Attributes:
        captions: the number of captions.
        length: words per caption.
        bad_endings: share of captions that end with one of ``BAD_ENDINGS``.
        repetitions: share of captions with a repetition: a phrase directly after itself ("a man in a man in", "the
            the"), or the same four words at two positions.
        repeated_words: share of captions with a repeated content word ("a man sits on a car in a car"; see
            ``repeated_words``). 0 if no caption has one of the ``FUNCTION_WORDS``, because the list is English.
        unfinished: share of captions that reached the maximum number of words without an end; None: unknown.
    """

    captions: int
    length: float
    bad_endings: float
    repetitions: float
    repeated_words: float
    unfinished: float | None = None

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]], unfinished: float | None = None) -> "Degeneration":
        """Measures tokenised captions. There must be at least one."""
        lengths, endings, repetitions, repeated, english = [], [], [], [], False
        for words in captions:
            lengths.append(len(words))
            endings.append(bool(words) and words[-1] in BAD_ENDINGS)
            repetitions.append(repeats(words))
            repeated.append(repeated_words(words) > 0)
            english = english or not FUNCTION_WORDS.isdisjoint(words)
        count = len(lengths)
        return cls(
            captions=count,
            length=sum(lengths) / count,
            bad_endings=sum(endings) / count,
            repetitions=sum(repetitions) / count,
            repeated_words=sum(repeated) / count if english else 0.0,
            unfinished=unfinished,
        )

    def warnings(self, references: "Degeneration") -> tuple[str, ...]:
        """One line for each value that is worse than that of the references by more than chance."""
        said, worse = [], self._worse(references)
        if "bad endings" in worse:
            said.append(
                f"{_percent(self.bad_endings)} of the captions end with a word such as 'a' or 'with' (references "
                f"{_percent(references.bad_endings)}); imgcap evaluate --decode.forbid-bad-endings true prevents this"
            )
        if "repeated phrases" in worse:
            said.append(
                f"{_percent(self.repetitions)} of the captions repeat a phrase (references "
                f"{_percent(references.repetitions)})"
            )
        if "repeated words" in worse:
            said.append(
                f"{_percent(self.repeated_words)} of the captions repeat a word as in 'a car in a car' (references "
                f"{_percent(references.repeated_words)}); imgcap evaluate --decode.forbid-repeated-words true prevents "
                f"this"
            )
        if "unfinished" in worse:
            said.append(
                f"{_percent(worse['unfinished'])} of the captions have no end and were cut at the maximum length"
            )
        if self.length < _SHORTEST * references.length:
            said.append(
                f"the captions are shorter than the references: {self.length:.1f} words on average, references "
                f"{references.length:.1f}"
            )
        return tuple(said)

    def summary(self, references: "Degeneration") -> str:
        """The shares that are worse than those of the references by more than chance, in one line; "" if none is."""
        said = [f"{name} {100 * share:.0f} %" for name, share in self._worse(references).items()]
        if self.length < _SHORTEST * references.length:
            said.append(f"{self.length:.1f} words on average (references {references.length:.1f})")
        return f"captions: {', '.join(said)}" if said else ""

    def _worse(self, references: "Degeneration") -> dict[str, float]:
        """The shares that are worse than those of the references by more than chance, by their names."""
        shares = {
            "bad endings": (self.bad_endings, references.bad_endings),
            "repeated phrases": (self.repetitions, references.repetitions),
            "repeated words": (self.repeated_words, references.repeated_words),
            "unfinished": (self.unfinished or 0.0, 0.0),
        }
        return {name: share for name, (share, usual) in shares.items() if self._above(share, usual)}

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


def repeated_words(words: Sequence[str]) -> int:
    """The number of repeated content words: words that are no ``FUNCTION_WORDS`` and complete a repetition.

    There are two kinds of repetition:

    - A word or phrase directly follows itself if the function words are left out: "a car in a car", "a red hat and a
      red hat".
    - A phrase occurs twice in a clause: "a baby is playing with a baby". A phrase is what function words enclose. Each
      of the ``CONJUNCTIONS`` begins a clause.

    Singular and plural are different words. These have no repetition: "a black dog and a white dog", "a man and another
    man", "a man in a red shirt and a woman in a red shirt", "a soccer player is playing soccer".

    A noun counts as repeated although it belongs to the next noun: "playing tennis on a tennis court", "a train at a
    train station". The logit rule, which sees only the words so far, could not distinguish them. Compare the share with
    that of the references, which have such phrases too.
    """
    repeated, content = 0, list[str]()
    phrase, phrases = list[str](), list[list[str]]()  # the current one, and the earlier ones of the clause
    for word in words:
        if word in FUNCTION_WORDS:
            phrases = [] if word in CONJUNCTIONS else [*phrases, phrase]
            phrase = []
        else:
            content.append(word)
            phrase = [*phrase, word]
            directly = any(content[-n:] == content[-2 * n : -n] for n in range(1, len(content) // 2 + 1))
            repeated += directly or phrase in phrases
    return repeated


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
