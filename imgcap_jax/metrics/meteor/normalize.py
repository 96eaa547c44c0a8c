"""METEOR's text normalisation (option ``-norm``) of lower-case tokens.

The official COCO tools tokenise captions by Penn Treebank rules and pass them to METEOR, which tokenises them again by
its own rules. Hyphenated words are split (``t-shirt`` becomes two words), abbreviations lose their full stops
(``u.s.``), and symbols become separate words. The rules here describe the behaviour of the tool. They were derived by
comparing outputs.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

_LETTERS = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0400-\u0527\u1d00-\u1d7f\ua640-\ua66e\ua67e-\ua697"
_LETTER = re.compile(f"[{_LETTERS}]").search
_PLAIN = re.compile(f"[{_LETTERS}0-9]+").fullmatch
_BLANKS = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000\\s]+")
_HIDDEN_STOP = "\0"  # replaces each of several full stops in a row, so that no rule for a single one applies

# Applied in this order. Matches of one pattern do not overlap: "a-b-c" becomes two words.
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
# Lower-case abbreviations that keep their full stop in every position.
_ABBREVIATIONS = frozenset(["v", "vs", "i.e", "rev", "e.g"])


def normalize(tokens: Sequence[str]) -> list[str]:
    """The words that METEOR uses for a caption tokenised by ``imgcap_jax.text.tokenize``."""
    if any("." in token for token in tokens):
        return _line(" ".join(tokens))  # the treatment of a full stop depends on the next word
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
    """The word without the full stops of an acronym, or with the full stop separated if it ends a sentence."""
    before = word[:-1]
    if not word.endswith(".") or not before:
        return [word]
    if "." in before and _LETTER(before):
        return [word.replace(".", "")]
    goes_on = re.match("[a-z]", after) is not None or (before == "pp" and after[:1].isdigit())
    return [word] if before in _ABBREVIATIONS or goes_on else [before, "."]
