"""Snowball's English stemmer ("Porter 2", snowballstem.org/algorithms/english/stemmer.html), as METEOR 1.5 uses it.

Its stems of all 109,445 words in METEOR's tables equal those of PyStemmer 2.2, which has no wheel for Python 3.14, and
of snowballstemmer 2.2, which takes four times as long. Version 3 of both has further rules: PyStemmer 3.1 differs for
198 words. nltk's stemmer takes 0.8 s to import and differs for 18 words.
"""

import re

_SPECIAL = {
    "skis": "ski", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "idly": "idl", "gently": "gentl",
    "ugly": "ugli", "early": "earli", "only": "onli", "singly": "singl",
    **{word: word for word in ("sky", "news", "howe", "atlas", "cosmos", "bias", "andes")},
    **{form: word for word in ("inning", "outing", "canning", "herring", "earring") for form in (word, f"{word}s")},
    **{f"{word}{ending}": word for word in ("proceed", "exceed", "succeed") for ending in ("", "s", "ed", "ing")},
}  # fmt: skip
_APOSTROPHES = str.maketrans("\u2018\u2019\u201b", "'''")
_VOWEL = re.compile("[aeiouy]").search
_REGION = re.compile("[aeiouy][^aeiouy]").search  # R1 and R2 begin after it
_LONG_START = re.compile("gener|commun|arsen").match
_SHORT_END = re.compile("[^aeiouy][aeiouy][^aeiouywxY]$|^[aeiouy][^aeiouy]$").search  # a short syllable
_DOUBLED = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")

# Each step applies the longest suffix of the word, and only if R1 (step 4: R2) contains it. Longest suffixes first.
_STEP_2 = {
    "ization": "ize", "ational": "ate", "fulness": "ful", "ousness": "ous", "iveness": "ive", "tional": "tion",
    "biliti": "ble", "lessli": "less", "entli": "ent", "ation": "ate", "alism": "al", "aliti": "al", "ousli": "ous",
    "iviti": "ive", "fulli": "ful", "enci": "ence", "anci": "ance", "abli": "able", "izer": "ize", "ator": "ate",
    "alli": "al", "bli": "ble", "ogi": "og", "li": "",
}  # fmt: skip
_STEP_3 = {
    "ational": "ate", "tional": "tion", "alize": "al", "icate": "ic", "iciti": "ic", "ative": "", "ical": "ic",
    "ness": "", "ful": "",
}  # fmt: skip
_STEP_4 = (
    "ement", "ance", "ence", "able", "ible", "ment", "ant", "ent", "ism", "ate", "iti", "ous", "ive", "ize", "ion",
    "al", "er", "ic",
)  # fmt: skip
# One of these letters must precede the suffix. Other suffixes can follow any letter.
_BEFORE = {"ogi": "l", "li": "cdeghkmnrt", "ion": "st"}


def stem(word: str) -> str:
    """The stem of a word."""
    word = word.lower()
    if len(word) <= 2:
        return word
    if word in _SPECIAL:
        return _SPECIAL[word]
    word = word.translate(_APOSTROPHES).removeprefix("'")
    if "y" in word:  # a y that is a consonant becomes Y
        word = re.sub("([aeiouy])y", r"\1Y", re.sub("^y", "Y", word))
    r1 = _end(_LONG_START(word) or _REGION(word), word)
    r2 = _end(_REGION(word, r1), word)

    for suffix in ("'s'", "'s", "'"):
        if word.endswith(suffix):
            word = word.removesuffix(suffix)
            break
    word = _step_1c(_step_1b(_step_1a(word), r1))
    for suffix, replacement in _STEP_2.items():
        if word.endswith(suffix):
            word = _replace(word, suffix, replacement, r1)
            break
    for suffix, replacement in _STEP_3.items():
        if word.endswith(suffix):
            word = _replace(word, suffix, replacement, r2 if suffix == "ative" else r1)
            break
    for suffix in _STEP_4:
        if word.endswith(suffix):
            word = _replace(word, suffix, "", r2)
            break
    last = len(word) - 1
    if word.endswith("e"):
        if last >= r2 or (last >= r1 and not _SHORT_END(word[:-1])):
            word = word[:-1]
    elif word.endswith("ll") and last >= r2:
        word = word[:-1]
    return word.lower()


def _end(found: re.Match[str] | None, word: str) -> int:
    return found.end() if found else len(word)


def _replace(word: str, suffix: str, replacement: str, region: int) -> str:
    """Replaces a suffix if the region that begins at `region` contains it and a permitted letter precedes it."""
    begin = len(word) - len(suffix)
    if begin < region or (suffix in _BEFORE and word[begin - 1] not in _BEFORE[suffix]):
        return word
    return word[:begin] + replacement


def _step_1a(word: str) -> str:
    """Plurals."""
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")) and _VOWEL(word[:-2]):
        return word[:-1]
    return word


def _step_1b(word: str, r1: int) -> str:
    """Past forms and participles."""
    for suffix in ("eedly", "ingly", "edly", "eed", "ing", "ed"):
        if word.endswith(suffix):
            break
    else:
        return word
    if suffix in ("eed", "eedly"):
        return _replace(word, suffix, "ee", r1)
    shorter = word.removesuffix(suffix)
    if not _VOWEL(shorter):
        return word
    if shorter.endswith(("at", "bl", "iz")):
        return shorter + "e"
    if shorter.endswith(_DOUBLED):
        return shorter[:-1]
    return shorter + "e" if r1 >= len(shorter) and _SHORT_END(shorter) else shorter


def _step_1c(word: str) -> str:
    """A final y becomes i after a consonant."""
    return f"{word[:-1]}i" if len(word) > 2 and word[-1] in "yY" and not _VOWEL(word[-2]) else word
