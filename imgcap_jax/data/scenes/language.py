"""The language of drawn scenes: writes true captions, parses captions, and decides whether they are true.

Grammar (optional parts in brackets; commas and letter case are ignored):

    caption   = [opening] list  |  [opening] bare [more]  |  clause [more | "and" clause]
    opening   = "a picture of" | "there is"
    list      = phrase  |  phrase {"," phrase} "and" phrase
    bare      = phrase relation phrase
    clause    = phrase "is" relation phrase
    more      = "and" relation phrase  |  "and there is" list
    phrase    = ("a" | "two" | "three" | "four") [size] [texture] [colour] shape
    relation  = "left of" | "right of" | "above" | "below", or a synonym

with at most four phrases in total.

Meaning:

- The phrases of a caption name different objects. A caption is false if an object fits two of its phrases.
- Counts are exact, including "a": "two red balls" is false if there are three red balls, and "a red ball" is false if
  there are two. (Otherwise a model that cannot count could always say "a".) A phrase means all objects that fit it.
  A caption may leave out objects; it then states fewer facts.
- A relation between two groups must hold between every member of one and every member of the other. It compares
  centres, which must differ by at least `TRUTH_MARGIN`, as a share of the image side. Captions written here state a
  relation only if the difference is at least `CLEAR_MARGIN`, and along the clearer axis. After "and", a relation
  without a new subject refers to the subject of the previous relation.
- A caption that the grammar does not cover is false, so vague captions gain nothing.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imgcap_jax.data.scenes.world import Scene, SceneObject, pick_weighted

TRUTH_MARGIN = 0.06
CLEAR_MARGIN = 0.18
MAX_WORDS = 20

_NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
# Synonyms: the usual word first, then the colloquial one, if there is one.
_SHAPE_WORDS = {
    "circle": ("circle", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring",),
}
_PLURALS = {"box": "boxes"}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_TEXTURE_WORDS = {"striped": ("striped",), "dotted": ("dotted", "spotted")}
_COLOUR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
_RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Phrase:
    """A group of equal objects: their number, their shape and the other stated attributes (None: not stated)."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None
    texture: str | None = None

    def fits(self, o: SceneObject) -> bool:
        return (
            self.shape == o.shape
            and self.colour in (None, o.colour)
            and self.size in (None, o.size)
            and self.texture in (None, o.texture)
        )


@dataclass(frozen=True)
class Relation:
    """Phrase number `subject` is `kind` ("left", "right", "above" or "below") of phrase number `object`."""

    subject: int
    kind: str
    object: int


@dataclass(frozen=True)
class Statement:
    """The content of a caption."""

    phrases: tuple[Phrase, ...]
    relations: tuple[Relation, ...] = ()


def facts(statement: Statement) -> int:
    """The number of facts that a caption states.

    One per named object (including its shape; "two balls" are two facts), one per stated attribute of a phrase
    (colour, size, texture; in "two red balls", red counts once), and one per relation.
    """
    attributes = sum(value is not None for p in statement.phrases for value in (p.colour, p.size, p.texture))
    return sum(p.count for p in statement.phrases) + attributes + len(statement.relations)


# --- parsing ----------------------------------------------------------------------------------------------

_ATTRIBUTE_OF_WORD: dict[str, tuple[str, str]] = {
    **{word: ("colour", word) for word in _COLOUR_WORDS},
    **{word: ("size", size) for size, words in _SIZE_WORDS.items() for word in words},
    **{word: ("texture", texture) for texture, words in _TEXTURE_WORDS.items() for word in words},
}
_SHAPE_OF_WORD: dict[str, tuple[str, bool]] = {}  # word -> (shape, whether plural)
for _shape, _words in _SHAPE_WORDS.items():
    for _word in _words:
        _SHAPE_OF_WORD[_word] = (_shape, False)
        _SHAPE_OF_WORD[_PLURALS.get(_word, _word + "s")] = (_shape, True)
# Fixed wordings with their letter in _FORMS, longest first.
_WORDINGS: list[tuple[tuple[str, ...], str, str]] = sorted(
    [
        *((tuple(text.split()), "R", kind) for kind, texts in _RELATION_WORDS.items() for text in texts),
        *((tuple(text.split()), "T", "") for text in ("there is", "there are")),
        (("a", "picture", "of"), "P", ""),
        (("is",), "V", ""),
        (("are",), "V", ""),
        (("and",), "A", ""),
    ],
    key=lambda wording: -len(wording[0]),
)
# Captions as strings of the letters N(oun phrase), R(elation), V(erb), A(nd), T(here is), P(icture of).
_LIST = "(N|N+AN)"
_MORE = f"(ARN|AT{_LIST})"
_FORMS = re.compile(f"[TP]?({_LIST}|NRN{_MORE}?)|NVRN({_MORE}|ANVRN)?")


def parse_caption(text: str) -> Statement | None:
    """Parses a caption, raw or tokenised (lower case, joined by spaces, no punctuation).

    Returns None if the grammar does not cover the caption. Such a caption counts as false.
    """
    words = text.lower().replace(",", " ").rstrip(". ").split()
    letters = ""
    phrases: list[Phrase] = []
    kinds: list[str] = []
    i = 0
    while i < len(words):
        for wording, letter, kind in _WORDINGS:
            if tuple(words[i : i + len(wording)]) == wording:
                letters += letter
                kinds += [kind] if kind else []
                i += len(wording)
                break
        else:
            read = _read_phrase(words[i:])
            if read is None:
                return None
            phrase, length = read
            phrases.append(phrase)
            letters += "N"
            i += length
    if not _FORMS.fullmatch(letters) or len(phrases) > 4:
        return None
    relations: list[Relation] = []
    named, subject = 0, 0
    for before, letter in zip(" " + letters, letters, strict=False):
        if letter == "N":
            named += 1
        elif letter == "R":
            subject = subject if before == "A" else named - 1
            relations.append(Relation(subject, kinds[len(relations)], named))
    return Statement(tuple(phrases), tuple(relations))


def _read_phrase(words: Sequence[str]) -> tuple[Phrase, int] | None:
    """Parses the phrase at the start of `words`; adjectives may be in any order, at most one of each kind.

    Returns the phrase and its number of words, or None if `words` does not start with a phrase.
    """
    if not words or words[0] not in _NUMBERS:
        return None
    count = _NUMBERS[words[0]]
    said: dict[str, str] = {}
    for length, word in enumerate(words[1:], start=2):
        if word in _SHAPE_OF_WORD:
            shape, plural = _SHAPE_OF_WORD[word]
            return (Phrase(count, shape, **said), length) if plural == (count > 1) else None
        attribute, value = _ATTRIBUTE_OF_WORD.get(word, ("", ""))
        if not attribute or attribute in said:
            return None
        said[attribute] = value
    return None


# --- truth ------------------------------------------------------------------------------------------------


def is_true(statement: Statement | None, scene: Scene) -> bool:
    """Whether everything that a caption states is true of the scene, as defined in the docstring of this module.

    None (a caption that could not be parsed) is false.
    """
    if statement is None:
        return False
    # Counts are exact, so the only possible assignment gives each phrase all objects that fit it.
    members = [[i for i, o in enumerate(scene.objects) if phrase.fits(o)] for phrase in statement.phrases]
    if any(len(group) != phrase.count for group, phrase in zip(members, statement.phrases, strict=True)):
        return False
    if len({i for group in members for i in group}) < sum(map(len, members)):
        return False
    return all(
        _distance(scene, r.kind, members[r.subject], members[r.object]) >= TRUTH_MARGIN for r in statement.relations
    )


def _distance(scene: Scene, kind: str, subject: Sequence[int], other: Sequence[int]) -> float:
    """The distance by which `subject` is `kind` of `other`, at their nearest members, as a share of the image side."""
    if kind in ("right", "below"):
        return _distance(scene, _OPPOSITE[kind], other, subject)
    axis = "x" if kind == "left" else "y"
    return min(getattr(scene.objects[i], axis) for i in other) - max(getattr(scene.objects[i], axis) for i in subject)


# --- writing ----------------------------------------------------------------------------------------------


def scene_captions(scene: Scene, seed: int = 0) -> list[str]:
    """Writes five different true captions of a scene, of at most 20 words each.

    The same scene and seed give the same captions. The captions name every object with its shape and colour. They
    differ in the sizes, textures and relations that they state, in order, and in wording.

    Raises:
        ValueError: the scene does not contain one to four objects, or five captions cannot be found.
    """
    if not 1 <= len(scene.objects) <= 4:
        raise ValueError(f"a scene must contain one to four objects; this one contains {len(scene.objects)}")
    sequence = np.random.SeedSequence([seed, zlib.crc32(scene.to_json().encode())])
    rng = np.random.Generator(np.random.Philox(sequence))
    captions: list[str] = []
    for _ in range(400):
        caption = _write(scene, rng)
        fits = len(caption.split()) <= MAX_WORDS and is_true(parse_caption(caption), scene)
        if fits and caption not in captions:
            captions.append(caption)
        if len(captions) == 5:
            return captions
    raise ValueError(f"cannot find five different true captions of the scene {scene.to_json()}")


@dataclass(frozen=True)
class _Group:
    """The objects that one phrase names."""

    phrase: Phrase
    members: tuple[int, ...]


def _write(scene: Scene, rng: np.random.Generator) -> str:
    """Writes a random caption. It may be too long, or false if objects differ only in what it leaves out."""
    # The kinds of attributes and the words for them are drawn once per caption: people are consistent within a
    # sentence, and a network learns a regular language sooner. With many groups, fewer attributes are stated.
    many = len({(o.shape, o.colour) for o in scene.objects}) >= 3
    sizes, textures = pick_weighted(
        rng,
        (((True, True), 0.3), ((False, True), 0.5), ((True, False), 0.1), ((False, False), 0.1))
        if many
        else (((True, True), 0.7), ((False, True), 0.2), ((True, False), 0.1)),
    )
    everyday = rng.random() < 0.25
    groups = _group(scene, sizes=sizes, textures=textures)
    if rng.random() < 0.35:
        groups.reverse()
    said = [_say(group.phrase, everyday=everyday) for group in groups]

    def relate(a: int, b: int, *, verb: bool) -> str:
        """The text " left of a box" or " is left of a box", or "" if no relation is clear."""
        kind = _clear_relation(scene, groups[a].members, groups[b].members)
        if kind is None:
            return ""
        wording = _RELATION_WORDS[kind][rng.random() < 0.25]
        return f" {_be(groups[a])} {wording} {said[b]}" if verb else f" {wording} {said[b]}"

    relational = rng.random() < 0.7
    if relational and len(groups) == 2 and (relation := relate(0, 1, verb=False)):
        return _opening(rng, groups[0]) + said[0] + relation
    if relational and len(groups) == 3:
        if rng.random() < 0.5:  # one subject, two relations
            a = int(3 * rng.random())
            b, c = (i for i in range(3) if i != a)
            first, second = relate(a, b, verb=True), relate(a, c, verb=False)
            if first and second:
                return f"{said[a]}{first} and{second}"
        a = int(2 * rng.random())
        if first := relate(a, a + 1, verb=True):
            rest = groups[2 - 2 * a]
            return f"{said[a]}{first} and there {_be(rest)} {_say(rest.phrase, everyday=everyday)}"
    if relational and len(groups) == 4:
        first, second = relate(0, 1, verb=True), relate(2, 3, verb=True)
        if first and second:
            return f"{said[0]}{first} and {said[2]}{second}"
    listed = ", ".join(said[:-1]) + f" and {said[-1]}" if len(said) > 1 else said[0]
    return _opening(rng, groups[0]) + listed


def _group(scene: Scene, *, sizes: bool, textures: bool) -> list[_Group]:
    """Groups the objects by the attributes that the caption states, from left to right."""
    members: dict[tuple[str, str, str | None, str | None], list[int]] = {}
    for i, o in enumerate(scene.objects):
        texture = o.texture if textures and o.texture != "plain" else None
        members.setdefault((o.shape, o.colour, o.size if sizes else None, texture), []).append(i)
    groups = [_Group(Phrase(len(indices), *said), tuple(indices)) for said, indices in members.items()]
    return sorted(groups, key=lambda group: float(np.mean([scene.objects[i].x for i in group.members])))


def _clear_relation(scene: Scene, subject: Sequence[int], other: Sequence[int]) -> str | None:
    """The clearest relation between two groups, or None if none reaches `CLEAR_MARGIN`."""
    kind = max(_OPPOSITE, key=lambda kind: _distance(scene, kind, subject, other))
    return kind if _distance(scene, kind, subject, other) >= CLEAR_MARGIN else None


def _say(phrase: Phrase, *, everyday: bool) -> str:
    shape = _SHAPE_WORDS[phrase.shape][-1 if everyday else 0]
    size = _SIZE_WORDS[phrase.size][-1 if everyday else 0] if phrase.size else ""
    texture = _TEXTURE_WORDS[phrase.texture][-1 if everyday else 0] if phrase.texture else ""
    noun = shape if phrase.count == 1 else _PLURALS.get(shape, shape + "s")
    words = " ".join(word for word in (size, texture, phrase.colour, noun) if word)
    number = ("an" if words[0] in "aeiou" else "a", "two", "three", "four")[phrase.count - 1]
    return f"{number} {words}"


def _be(group: _Group) -> str:
    return "is" if group.phrase.count == 1 else "are"


def _opening(rng: np.random.Generator, first: _Group) -> str:
    return pick_weighted(rng, (("", 0.6), (f"there {_be(first)} ", 0.25), ("a picture of ", 0.15)))
