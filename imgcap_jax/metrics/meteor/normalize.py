"""The text that METEOR sees: its option ``-norm``, on tokens that are in lower case already.

The official COCO tools tokenise captions as Penn Treebank does and hand them to METEOR, which tokenises them once more
in its own way: hyphens join nothing (``t-shirt`` are two words), abbreviations lose their full stops (``u.s.``),
symbols stand alone. The rules describe what the tool does with text, established by comparing outputs.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

_LETTERS = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0400-\u0527\u1d00-\u1d7f\ua640-\ua66e\ua67e-\ua697"
_LETTER = re.compile(f"[{_LETTERS}]").search
_PLAIN = re.compile(f"[{_LETTERS}0-9]+").fullmatch
_BLANKS = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000\\s]+")
_HIDDEN_STOP = "\0"  # one of several in a row, which no rule for a full stop is to see

# In this order. What a pattern takes is not seen again by the same pattern, as in "a-b-c" (two words).
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (f"([^{_LETTERS}0-9 .',-])", r" \1 "),
        (f"([{_LETTERS}0-9.])-([{_LETTERS}0-9])", r"\1 \2"),
        (r"([^0-9]),([^0-9])", r"\1 , \2"),
        (r"([0-9]),([^0-9])", r"\1 , \2"),
        (r"([^0-9]),([0-9])", r"\1 , \2"),
        (f"([^{_LETTERS}])'([^{_LETTERS}])", r"\1 ' \2"),
        (f"([^{_LETTERS}0-9])'([{_LETTERS}])", r"\1 ' \2"),
        (f"([{_LETTERS}])'([^{_LETTERS}])", r"\1 ' \2"),
        (f"([{_LETTERS}])'([{_LETTERS}])", r"\1 '\2"),
        (r"([0-9])'s", r"\1 's"),
    )
)
_STOPS = re.compile(r"\.{2,}")
# Abbreviations in lower case that keep their full stop wherever they stand.
_ABBREVIATIONS = frozenset(["v", "vs", "i.e", "rev", "e.g"])


def normalize(tokens: Sequence[str]) -> list[str]:
    """METEOR's words of a caption that was tokenised (``imgcap_jax.text.tokenize``)."""
    if any("." in token for token in tokens):
        return _line(" ".join(tokens))  # what becomes of a full stop depends on the next word
    return [word for token in tokens for word in _words(token)]


@lru_cache(maxsize=1 << 17)
def _words(token: str) -> tuple[str, ...]:
    return (token,) if _PLAIN(token) else tuple(_line(token))


def _line(text: str) -> list[str]:
    for mark in "‘’`":
        text = text.replace(mark, "'")
    text = re.sub("[“”]", '"', text.replace("''", '"'))
    text = text.replace("–", "-").replace("--", "-")
    text = f" {_BLANKS.sub(' ', text).strip()} "
    text = _REWRITES[0][0].sub(_REWRITES[0][1], text)
    text = _STOPS.sub(lambda found: f" {_HIDDEN_STOP * len(found[0])} ", text)
    for pattern, replacement in _REWRITES[1:]:
        text = pattern.sub(replacement, text)
    words = text.split()
    if not words:
        return []
    separated = [part for word, after in zip(words, [*words[1:], ""], strict=True) for part in _full_stop(word, after)]
    return [word.replace(_HIDDEN_STOP, ".") for word in separated]


def _full_stop(word: str, after: str) -> list[str]:
    """The word, without the stops of an acronym, or with its full stop apart where it ends a sentence."""
    before = word[:-1]
    if not word.endswith(".") or not before:
        return [word]
    if "." in before and _LETTER(before):
        return [word.replace(".", "")]
    goes_on = re.match("[a-z]", after) is not None or (before == "pp" and after[:1].isdigit())
    return [word] if before in _ABBREVIATIONS or goes_on else [before, "."]
