"""Tokenisers: how a caption becomes tokens, for the vocabulary, the metrics and the words of decoding settings.

A run has one tokeniser, ``data.tokenizer``. Its vocabulary, its captions and its scores use it. Score signatures and
``vocabulary.json`` state its label.

============== ============== =========================================================================================
name           class          use
============== ============== =========================================================================================
``ptb``        PennTreebank   the default; text with blanks between words. Published scores of English captions use it.
``characters`` Characters     text without blanks between words, such as Chinese, Japanese and Thai; emoji
============== ============== =========================================================================================

A tokeniser of your own is a frozen dataclass that implements ``Tokenizer``; docs/adding_parts.md has an example.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

from imgcap_jax.errors import UserError
from imgcap_jax.files import reason
from imgcap_jax.text import tokenize
from imgcap_jax.user_code import make_settings


class Tokenizer(Protocol):
    """Splits captions into tokens, and joins tokens into captions."""

    @property
    def label(self) -> str:
        """Name and parameters, as they appear in signatures: ``"jieba:0.42"``. It must not contain blanks, | or ,."""
        ...

    def __call__(self, caption: str, /) -> list[str]:
        """The tokens of a caption. The list can be empty; tokens must not be empty or blank.

        Scores are computed on the tokens of the joined text. A tokeniser should therefore return the same tokens again:
        ``tokenizer(tokenizer.join(tokens)) == tokens``.
        """
        ...

    def join(self, tokens: Sequence[str], /) -> str:
        """The text of tokens, as it is printed and written into files of captions. A token can be ``<unk>``."""
        ...


@dataclass(frozen=True)
class PennTreebank:
    """Words as in the official COCO tools: Penn Treebank rules, lower case, without punctuation."""

    @property
    def label(self) -> str:
        """See ``Tokenizer``."""
        return "ptb-coco"

    def __call__(self, caption: str, /) -> list[str]:
        """See ``imgcap_jax.text.tokenize``."""
        return tokenize(caption)

    def join(self, tokens: Sequence[str], /) -> str:
        """The tokens, separated by blanks."""
        return " ".join(tokens)


# Scripts that are written without blanks between words.
_UNSPACED = "".join(
    rf"\p{{scx={script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
)
_UNSPACED_CHARACTER = rf"(?=[\p{{L}}\p{{N}}\p{{M}}])(?=[{_UNSPACED}])\X"
_LETTER = rf"(?:(?![{_UNSPACED}])[\p{{L}}\p{{N}}]\p{{M}}*)"
_PIECE = (
    r"<(?:pad|bos|eos|unk)>"
    rf"|{_UNSPACED_CHARACTER}"
    # A word or a number: don't, t-shirt, 3.5, 1,000. The zero-width non-joiner is a part of Persian words.
    rf"|{_LETTER}+(?:(?:['’\-\u2010\u2011\u200c\u200d]|(?<=\p{{N}})[.,:](?=\p{{N}})){_LETTER}+)*"
    r"|(?=\p{S})\X"
)


class _Patterns(NamedTuple):
    """piece: a token. word: a token between blanks. unspaced: a token of a script without blanks. grapheme: any one."""

    piece: Any
    word: Any
    unspaced: Any
    grapheme: Any


@cache
def _patterns() -> _Patterns:
    """The compiled patterns. The default tokeniser does not need them, nor the package that has them."""
    import regex

    return _Patterns(
        regex.compile(_PIECE),
        regex.compile(rf"{_LETTER}.*|<unk>", regex.DOTALL),
        regex.compile(rf"(?:{_UNSPACED_CHARACTER})+"),
        regex.compile(r"\X"),
    )


@dataclass(frozen=True)
class Characters:
    """Characters of scripts without blanks between words, and words of other scripts.

    One character of Chinese, Japanese, Thai, Lao, Khmer, Burmese or Tibetan text is one token, with its combining marks
    (a grapheme). So is an emoji or another symbol. Words of other scripts and numbers stay whole. Text is normalised
    (NFKC) and in lower case. Punctuation is dropped. sacreBLEU's tokeniser "zh" splits Chinese in the same way, but
    keeps punctuation.
    """

    @property
    def label(self) -> str:
        """See ``Tokenizer``."""
        return "characters"

    def __call__(self, caption: str, /) -> list[str]:
        """See ``Tokenizer``."""
        plain = unicodedata.normalize("NFKC", caption).replace("\u00ad", "").lower()
        found: list[str] = _patterns().piece.findall(plain)
        return found

    def join(self, tokens: Sequence[str], /) -> str:
        """The tokens, with a blank only between two words."""
        text, before = "", False
        for token in tokens:
            is_word = _patterns().word.fullmatch(token) is not None
            text += f" {token}" if before and is_word else token
            before = is_word
        return text


DEFAULT = PennTreebank()
NAMES: dict[str, type[PennTreebank] | type[Characters]] = {"ptb": PennTreebank, "characters": Characters}
"""The tokenisers that are part of the package, by the names that options take."""


def find_tokenizer(name: str) -> Tokenizer:
    """The tokeniser with a name: one of ``NAMES``, or the name ``module:Class`` of a class of your own.

    Raises:
        UserError: there is no such tokeniser, or the module of the class is not imported.
    """
    if name in NAMES:
        return NAMES[name]()
    if ":" not in name:
        raise UserError(f"there is no tokenizer {name!r}; use {' or '.join(NAMES)}, or MODULE:CLASS with --code")
    tokenizer: Tokenizer = make_settings(name, f"tokenizer {name}")
    check_tokenizer(tokenizer, f"tokenizer {name}")
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, setting: str) -> None:
    """Raises UserError, which names the setting, unless a value implements ``Tokenizer``."""
    if isinstance(tokenizer, type):
        raise UserError(f"{setting} is the class {tokenizer.__name__}; give an instance, {tokenizer.__name__}()")
    for name in ("label", "__call__", "join"):
        if not hasattr(tokenizer, name):
            raise UserError(
                f"{setting}: {type(tokenizer).__name__} has no {name!r}; docs/adding_parts.md lists what a tokeniser "
                f"must offer"
            )
    label = tokenizer.label
    if not isinstance(label, str) or not label or any(character in "|," or character.isspace() for character in label):
        raise UserError(f"{setting}: the label {label!r} must be text without blanks, '|' or ','")
    if label in _LABELS and not isinstance(tokenizer, _LABELS[label]):
        raise UserError(f"{setting}: the label {label!r} belongs to a tokeniser of imgcap_jax; choose another label")


_LABELS = {kind().label: kind for kind in NAMES.values()}


def tokens_of(caption: str, tokenizer: Tokenizer) -> list[str]:
    """The tokens of a caption. A tokeniser of the user's own is checked.

    Raises:
        UserError: it raises an exception, or returns something other than a list of words.
    """
    if type(tokenizer) in _OWN:
        return tokenizer(caption)
    with _naming(tokenizer, f"the caption {caption!r:.80}"):
        tokens = tokenizer(caption)
    if not isinstance(tokens, list) or not all(isinstance(token, str) and token.strip() for token in tokens):
        raise UserError(
            f"tokenizer {type(tokenizer).__name__}: it returned {tokens!r:.80}; it must return a list of words, which "
            f"must not be empty or blank"
        )
    return tokens


def text_of(tokens: Sequence[str], tokenizer: Tokenizer) -> str:
    """The text of tokens.

    Raises:
        UserError: a tokeniser of the user's own raises an exception, or does not return text.
    """
    if type(tokenizer) in _OWN:
        return tokenizer.join(tokens)
    with _naming(tokenizer, f"join of the tokens {list(tokens)!r:.80}"):
        text = tokenizer.join(tokens)
    if not isinstance(text, str):
        raise UserError(f"tokenizer {type(tokenizer).__name__}: join returned {text!r:.80}; it must return text")
    return text


_OWN = (PennTreebank, Characters)


@contextmanager
def _naming(tokenizer: Tokenizer, given: str) -> Iterator[None]:
    """Turns an exception of a user's tokeniser into a UserError that names the class."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"tokenizer {type(tokenizer).__name__}: {given} raised {type(error).__name__} ({reason(error)}); mend the "
            f"class"
        ) from error


def splits_english_words(tokenizer: Tokenizer) -> bool:
    """Whether metrics that are defined for English words (METEOR, SPICE) can read the tokens."""
    return isinstance(tokenizer, PennTreebank)


def unspaced_length(token: str) -> int:
    """The number of characters (graphemes) of a token in a script without blanks; 0 for other tokens."""
    patterns = _patterns()
    return len(patterns.grapheme.findall(token)) if patterns.unspaced.fullmatch(token) else 0


_LONGEST_UNSPACED = 5.0  # characters; segmented Chinese and Japanese words have about two, Thai ones three
LONGEST_MEAN = 12.0  # characters; words of German and Finnish captions have six to eight
_ENOUGH_TOKENS = 100


def why_unsegmented(counts: Mapping[str, int], captions: int, tokenizer: Tokenizer) -> str:
    """Why captions do not seem to be separated into words; "" if they do, and for ``Characters``, which needs no words.

    Args:
        counts: the number of occurrences of each token.
        captions: the number of captions.
        tokenizer: what split the captions.
    """
    if isinstance(tokenizer, Characters):
        return ""
    found = unspaced = 0
    for token, count in counts.items():
        if not token.isascii() and (length := unspaced_length(token)):
            found, unspaced = found + count, unspaced + count * length
    if 2 * found > captions and unspaced > _LONGEST_UNSPACED * found:
        return f"their Chinese, Japanese or similar words have {unspaced / found:.0f} characters on average"
    words, characters = sum(counts.values()), sum(len(token) * count for token, count in counts.items())
    if words >= _ENOUGH_TOKENS and characters > LONGEST_MEAN * words:
        return f"their words have {characters / words:.0f} characters on average"
    return ""


_ENGLISH = frozenset({"an", "the", "is", "are", "and", "of", "with", "on"})
# Function words of languages that have few letters outside ASCII, or can be written without them. Words that English
# captions contain, such as "van" and "die", are left out.
_FOREIGN_WORDS = (
    "ein eine einem einen einer und der das dem mit auf ist sind zwei "  # German
    "een het en op zijn naar aan bij twee "  # Dutch
    "un une le la les des du et dans sur est avec qui deux "  # French
    "el los las una uno de del por para que y "  # Spanish
    "um uma o e os da das em na ao duas "  # Portuguese
    "il lo gli di che nel nella sul sulla della "  # Italian
    "och ett som med av till og det er til ja ei "  # Swedish, Danish, Norwegian, Finnish
    "w z na nie jest ze po dla ve bir az egy je se su "  # Polish, Turkish, Hungarian, Czech, Croatian
    "yang dengan dari untuk seorang sebuah ang ng sa mga ya wa kwa katika"  # Indonesian, Filipino, Swahili
)
_FOREIGN = frozenset(_FOREIGN_WORDS.split())


def looks_english(counts: Mapping[str, int]) -> bool:
    """Whether captions seem to be English, from the number of occurrences of each token.

    In English captions, nine function words make up about 30 % of the tokens ("a" alone 14 %, in Flickr8k). Captions
    count as English if the nine make up at least 12 %, and those other than "a" at least 3 %. ("a" alone is frequent in
    Hungarian and Portuguese, for example.) English titles, keywords and reports can have fewer of them. Such captions
    count as English unless at least 10 % of the tokens have letters outside ASCII or are function words of other
    languages. Fewer than 100 tokens are too few to decide. They count as English.
    """
    tokens = sum(counts.values())
    common = sum(counts.get(word, 0) for word in _ENGLISH)
    if tokens < _ENOUGH_TOKENS or (common >= 0.03 * tokens and common + counts.get("a", 0) >= 0.12 * tokens):
        return True
    foreign = sum(
        count
        for token, count in counts.items()
        if token in _FOREIGN or (not token.isascii() and any(map(str.isalpha, token)))
    )
    return foreign < 0.1 * tokens
