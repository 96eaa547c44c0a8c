"""The tokeniser of the vocabulary and the metrics: Penn Treebank rules as in the official COCO tools.

The official tools run Stanford's PTBTokenizer (CoreNLP 3.4.1, options ``-preserveLines -lowerCase``) on every caption
and drop a short list of punctuation tokens. `tokenize` returns the same tokens in plain Python. Its rules describe the
behaviour of PTBTokenizer. They were derived by comparing outputs, and a test repeats the comparison on real captions.

At each position every rule is tried. The longest match wins. If two matches have the same length, the earlier rule
wins. The right context of a rule counts towards the length but is not consumed. Most captions consist of plain words
and need no rules.

Known differences: PTBTokenizer reads a file of captions as one text. If a caption ends in an initial ("a sign that
reads K."), the full stop is kept or dropped depending on the beginning of the *next* caption. Here captions are
independent. Letters and combining marks of a few rare scripts are classified by Python's Unicode tables.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

# The tokens that the official tools drop. Their list also contains "-LRB-" and the other brackets, but in upper case,
# while the tokens are in lower case. Brackets therefore stay in captions as "-lrb-", and published scores include them.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Within a word, combining marks count as letters and a soft hyphen is invisible.
_MARK = (
    "\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0384\u0385\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5"
    "\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4\u06e7-\u06ed\u0730-\u074a\u0900-\u0903\u093c\u093e-\u094e"
    "\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd\u09d7\u0a01-\u0a03\u0a3c"
    "\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03"
    "\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
_ENTITY_LETTER = "&[aeiouAEIOU](?:acute|grave|uml);"
_NUMERAL = (  # matched by \w, but not part of words
    "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089"
    "\u2150-\u2182\u2185-\u2189\u2460-\u249b\u3007\u3021-\u3029\u3038-\u303a"
)
_L = rf"(?:[^\W\d_{_NUMERAL}]|{_ENTITY_LETTER})"  # letter
_A = rf"(?:[^\W_{_NUMERAL}]|[{_MARK}\u00ad]|{_ENTITY_LETTER})"  # letter or digit
_APOSTROPHE = "['\u0092\u2019]"
_QUOTE = "['\u0091\u0092\u2018\u2019\u201b`]"  # apostrophes in contractions
_BLANK = r"[ \t\u00a0\u2000-\u200a\u3000]"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_JOIN = "[-_\u058a\u2010\u2011]"
_THING = rf"(?:[dDlLoO]{_QUOTE}{_A})?{_A}+"
_COMPOUND = rf"{_THING}(?:{_JOIN}{_THING})*"
_WORD = rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*"
_ACRONYM = rf"{_L}(?:\.{_L})+"
_FILE_ENDING = (
    r"(?i:bat|bmp|bz2|class|cgi|cpp|c|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql"
    r"|tar|txt|wav|xml|x|zip)"
)
_TAG_NAME = r"[A-Za-z][\w:.-]*"
_TAG_VALUE = rf"(?:'[^']*'|\"[^\"]*\"|{_TAG_NAME})"
_TAG = rf"<(?:[!?][A-Za-z-][^>]*|/?{_TAG_NAME}(?: +{_TAG_NAME}(?: *= *{_TAG_VALUE})?)* */?) *>"


def _abbreviations(words: str, *, capitalised: str = "", uncapitalised: str = "") -> str:
    """A pattern of abbreviations.

    Args:
        words: abbreviations in any case, separated by spaces.
        capitalised: abbreviations only with a capital first letter.
        uncapitalised: abbreviations only with all letters after the first in lower case.
    """
    spellings = [f"(?i:{word})" for word in words.split()]
    spellings += [f"{word[0].upper()}(?i:{word[1:]})" for word in capitalised.split()]
    spellings += [f"[{word[0].upper()}{word[0]}]{word[1:]}" for word in uncapitalised.split()]
    return f"(?:{'|'.join(spellings)})"


# Abbreviations keep their full stop. There are three kinds: those that can end a sentence, those that are always
# followed by something, and those that are abbreviations only before a number.
_CLOSING_ABBREVIATION = _abbreviations(
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ala ariz calif colo "
    "conn ct dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo assn "
    "bhd bldg blvd bros co corp cos esq inc intl jr ltd plc sr sys univ al est etc ext rd rt seq sq tel",
    capitalised="ark az del ill la mass miss ore pa tex wash",
    uncapitalised="pte ptes ppte pptes pty ptys ppty pptys",
)
_OPENING_ABBREVIATION = _abbreviations(
    "adj adm adv asst atty attys brig capt cmdr col comdr cpl det dr drs ens gen gov govs hon insp lieut lt "
    "maj messrs mlle mme mr mrs ms msgr pfc ph pres prof profs pvt rep reps rev sen sens sfc sgt spc supt "
    "supts treas alex jos wm assoc cie dept elec invt natl ave cf ft mt st ste vs",
    uncapitalised="mfg mtg",
)
# Before one of these words, a single letter with a full stop ends a sentence and is not an initial.
_SENTENCE_STARTER = _abbreviations(
    "",
    capitalised="a about according additionally after an as at but earlier he her here however if in it "
    "last many more now once one other our she since so some such that the their then there these they "
    "this we what when while yet you",
)
_BEFORE_NUMBER = "(?i:nos?|figs?|pp|op|art|prop|ca)"

_SYMBOLS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "¢": "cents", "£": "#", "¤": "$", "\u0080": "$", "₠": "$", "€": "$",
}  # fmt: skip
"""Symbols and the tokens that replace them."""
_STRAIGHT_QUOTE = {
    "‘": "`", "‛": "`", "‹": "`", "\u0091": "`", "’": "'", "›": "'", "\u0092": "'",
    "“": "``", "«": "``", "\u0093": "``", "”": "''", "»": "''", "\u0094": "''",
}  # fmt: skip


def _as_written(token: str) -> Iterator[str]:
    yield token.lower()


def _nothing(token: str) -> Iterator[str]:
    return iter(())


def _plain_word(token: str) -> Iterator[str]:
    yield token.replace("\u00ad", "").lower() or "-"


def _brackets(token: str) -> Iterator[str]:
    yield token.replace("(", "-lrb-").replace(")", "-rrb-").lower()


def _straight_apostrophe(token: str) -> Iterator[str]:
    yield token.translate({0x92: "'", 0x91: "'", 0x2018: "'", 0x2019: "'"}).lower()


def _quotes(token: str) -> Iterator[str]:
    yield "".join(_STRAIGHT_QUOTE.get(quote, quote) for quote in token)


def _three_and_rest(token: str) -> Iterator[str]:
    """cannot -> can not; gonna -> gon na."""
    yield token[:3].lower()
    yield token[3:].lower()


def _entity(token: str) -> Iterator[str]:
    yield {"&a": "&", "&l": "<", "&g": ">"}[token[:2].lower()]


class _Rule(NamedTuple):
    match: Callable[[str, int], re.Match[str] | None]
    emit: Callable[[str], Iterator[str]]


def _rule(token: str, emit: Callable[[str], Iterator[str]] = _as_written, *, before: str = "") -> _Rule:
    """A rule that matches the pattern `token` if the pattern `before` follows it."""
    return _Rule(re.compile(f"({token}){before}").match, emit)


_RULES = (
    # Mark-up and character references.
    _rule(_TAG),
    _rule(r"(?i:&(?:md|mdash|ndash|nbsp);)", _nothing),
    _rule("&(?:quot|apos);", _nothing),
    _rule("(?i:&(?:amp|lt|gt);)", _entity),
    _rule(r"(?i:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq);)|&#[0-9]+;"),
    # Two words written as one: cannot, gonna; 'tis and 'twas.
    _rule("(?i:cannot|gonna|gotta|lemme|gimme|wanna)", _three_and_rest),
    _rule("'[tT]", before="(?i:is|was)"),
    # A word before a contraction (it|'s, do|n't), then the contraction.
    _rule(_WORD, _plain_word, before=f"{_APOSTROPHE}(?i:[msd]|re|ve|ll)"),
    _rule(rf"[A-Za-z]*?[A-MO-Za-mo-z](?=[nN]{_QUOTE}[tT])", _plain_word, before=f"[nN]{_QUOTE}[tT]"),
    _rule("[\u0092\u2019](?i:[msd]|re|ve|ll)", _straight_apostrophe),
    _rule("'(?i:[msd]|re|ve|ll)", before="[^A-Za-z]"),
    _rule(f"[nN]{_QUOTE}[tT]", _straight_apostrophe),
    # Words.
    _rule(_WORD, _plain_word),
    # Words with an apostrophe: 'n', ol', y'all, O'Neil, ma'am, '90s.
    _rule(
        rf"{_APOSTROPHE}[nN]{_APOSTROPHE}|[lLdDjJ]{_APOSTROPHE}|(?i:dunkin|somethin|ol){_APOSTROPHE}"
        rf"|{_APOSTROPHE}(?i:em|till?|cause)|[A-HJ-XZn]{_QUOTE}{_L}{_L}+|{_APOSTROPHE}[2-9]0s"
        rf"|{_L}+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_L}*"
        rf"|[oO]{_QUOTE}[oO]|(?i:cont{_APOSTROPHE}d\.|nor{_APOSTROPHE}easter|c{_APOSTROPHE}mon|c{_APOSTROPHE}est|e{_APOSTROPHE}er"
        rf"|s{_APOSTROPHE}mores|ev{_APOSTROPHE}ry|li{_APOSTROPHE}l|nat{_APOSTROPHE}l)"
    ),
    _rule("[\u0092\u2019][nN]"),
    _rule("'[nN]", before=r"\s"),
    _rule(rf"[yY]{_APOSTROPHE}", before=_L),
    _rule(rf"{_APOSTROPHE}\d\d", before=r"\s"),
    # Addresses.
    _rule(r"(?i:https?)://[^\s\"<>|()]+[^\s\"<>|.!?(){},-]"),
    _rule(
        r"(?:www\.(?:[^\s\"`'<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^\s\"`'<>|.!?(){},-_$]+\.)+(?:com|net|org|edu))"
        r"(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?"
    ),
    _rule(r"(?:&lt;|<)?[a-zA-Z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+(?:&gt;|>)?"),
    _rule(r"@[A-Za-z_][A-Za-z0-9_]*|#[^\W\d_\xb2\xb3\xb9\xbc-\xbe]+"),
    # Numbers, fractions, telephone numbers and currencies.
    _rule(f"[-+]?{_NUMBER}"),
    _rule(r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}"),
    _rule(
        r"(?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])\d{3,4}[- \xa0]?\d{3,5}"
        r"|(?:\+\+?)?\d{2,4}\.\d{3,4}\.\d{3,5}",
        _brackets,
    ),
    _rule(r"[A-Z]*\$"),
    _rule("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+"),
    # Abbreviations and acronyms with their full stop. Single letters are initials.
    _rule(rf"{_CLOSING_ABBREVIATION}\.", before=r"[\s\S]{2}"),
    _rule(rf"{_OPENING_ABBREVIATION}\."),
    _rule(rf"{_BEFORE_NUMBER}\.", before=rf"{_BLANK}?\d"),
    _rule(rf"(?:{_ACRONYM}|[A-Za-z])\.|[pP][hH]\.[dD]\.?"),
    _rule("[A-Za-z]", before=rf"\.{_BLANK}+(?:{_SENTENCE_STARTER}\s|M(?i:[rs])\.|{_TAG})"),  # exit K. The
    _rule(rf"{_A}+(?:\.{_A}+)*\.{_FILE_ENDING}", before=r"[\s.?!,]"),
    # Compounds: well-known, five-o'clock, t_1, and/or, U.S.-based, AT&T, C++.
    _rule(_COMPOUND, _plain_word),
    _rule(rf"(?:{_WORD}|{_COMPOUND}|\d+(?:[.:,]\d+)*)\.", before="[,;:]"),  # no end of a sentence before these
    _rule("-(?i:[lr][rcs]b)-"),
    _rule(r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    _rule(
        rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:[A-Za-z0-9\xad]+(?!\.[A-Za-z]\.)|{_ACRONYM}\.))+", _plain_word
    ),
    _rule("[A-Z]+(?:(?:[&+]|(?i:&amp;))[A-Z]+)+", lambda token: _as_written(re.sub("(?i)&amp;", "&", token))),
    _rule(r"[CcFf]#|[Cc]\+\+"),
    # Smileys, and repeated punctuation.
    _rule(r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", _brackets, before="[^A-Za-z0-9]"),
    _rule(r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", _brackets),
    _rule(r"[!?]+|#+|\*+|@+|_+|<<|>>|\\\*|-{5,}"),
    _rule("[\u0091-\u0094‘’‛‹›“”«»`]{1,2}", _quotes),
    _rule(r"-{2,4}|\.{3,4}|\.(?:[ \u00a0]\.){2,}|''|…", _nothing),
)  # fmt: skip

# A symbol that no rule matches is a token if PTBTokenizer knows it. Emoji, control characters and others are dropped.
_KNOWN_SYMBOL = re.compile(
    "[!-~\u0080\u00a1-\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603"
    "\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f"
    "\u1fbd\u2016\u2017\u201a\u201e\u201f\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207e\u208a-\u208e\u20a0\u20a4\u20ac"
    "\u2100-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
    f"\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6{_MARK}]"
)
# Quotes and dashes that PTBTokenizer replaces by a token of `PUNCTUATION`.
_VANISHING = frozenset('\u0091\u0092\u0093\u0094\u0096\u0097‘’‛‹›“”«»–—―…\u00ad"')
_PLAIN_CHUNK = re.compile(r"([A-Za-z]+(?:-[A-Za-z]+)*)[,;]?|([A-Za-z]{2,})\.|[.,;]").fullmatch
_IS_ABBREVIATION = re.compile(rf"{_CLOSING_ABBREVIATION}|{_OPENING_ABBREVIATION}|{_BEFORE_NUMBER}").fullmatch
_IS_CONTRACTION = re.compile("(?i:cannot|gonna|gotta|lemme|gimme|wanna)").fullmatch


def _scan(text: str) -> Iterator[str]:
    """All tokens of `text` by the rules, including punctuation."""
    text = " ".join(text.splitlines())
    position, end = 0, len(text)
    text += "\n\n"  # right context for the rules at the end
    while position < end:
        if text[position].isspace():
            position += 1
            continue
        longest, size, winner = 0, 0, _RULES[0]
        for rule in _RULES:
            found = rule.match(text, position)
            if found and found.end() - position > longest:
                longest, size, winner = found.end() - position, found.end(1) - position, rule
        if size:
            yield from winner.emit(text[position : position + size])
            position += size
            continue
        character = text[position]
        if character not in _VANISHING and _KNOWN_SYMBOL.match(character):
            yield _SYMBOLS.get(character, character)
        position += 1


@lru_cache(maxsize=1 << 17)
def _plain_chunk(chunk: str) -> tuple[str, ...] | None:
    """The tokens of a chunk between blanks, or None if it needs the rules or its context."""
    found = _PLAIN_CHUNK(chunk)
    if found is None:
        return None
    word = found[1] or found[2]
    if word is None:
        return ()
    if found[2] and _IS_ABBREVIATION(word):
        return None
    return tuple(_three_and_rest(word)) if _IS_CONTRACTION(word) else (word.lower(),)


def tokenize(caption: str) -> list[str]:
    """Tokenises a caption as the official COCO tools do: PTB rules, lower case, punctuation dropped.

    Details:

    - Possessives and contractions are split (``man 's``, ``do n't``, ``can not``).
    - Hyphenated words, abbreviations (``mr.``, ``u.s.``) and numbers (``1,000``, ``3.5``, ``1/2``) stay whole.
    - Brackets become ``-lrb-``, ``€`` becomes ``$``, and ``½`` becomes ``1/2``. Emoji are dropped.
    - ``!!`` and ``?!`` are kept, because the list of punctuation contains only ``!`` and ``?``.
    - British spelling is not changed. Newlines count as blanks.
    - No token contains white space. PTBTokenizer joins the parts of a telephone number or of ``1 1/2`` by no-break
      spaces; here they are separate tokens, as they are for BLEU and CIDEr.

    Returns:
        The tokens. The list can be empty.
    """
    tokens: list[str] = []
    for chunk in caption.split():
        plain = _plain_chunk(chunk)
        if plain is None:
            break
        tokens += plain
    else:
        return tokens
    return [part for token in _scan(caption) if token not in PUNCTUATION for part in token.split()]
