"""COCO's 80 objects in captions: hallucination as CHAIR counts it, and recall.

CHAIR (Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018) finds the objects that a caption names
and checks each against the objects that are present: those of COCO's instance annotations, and those that a reference
names. CHAIRi is the share of object mentions whose object is not present. CHAIRs is the share of captions with at least
one such mention. Recall is the share of the present objects that the caption names.

Objects are found as by the authors' code. Words are reduced to the singular. Some word pairs count as one word, such as
"hot dog". "baby" and "adult" before an animal and "passenger" before a train or a jet are not people. "seat" is not a
chair in a caption with "toilet". The remaining words are looked up in the synonym list (``object_names.py``).

Differences from the authors' code: its singulariser (pattern.en) turns "bus" into "bu", "ties" into "ty" and "canoes"
into "cano", so it does not count these words. Nor does it count "motor bike", "cheesecake" and "iPhone", which have a
stray blank or a capital letter in its list. Here they are counted. Captions are split by the tokeniser of the other
metrics, which drops punctuation; the two words of a pair can therefore have a comma between them.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from imgcap_jax.metrics.corpus import Candidates, MetricScore, MetricScores, References, mean_score
from imgcap_jax.metrics.object_names import OBJECT_OF, OBJECTS
from imgcap_jax.text import tokenize

# Two words that count as one word. Words that are in no entry of the list ("home plate") are not objects.
_PAIRS: dict[tuple[str, ...], str] = {
    ("motor", "bike"): "motor bike",
    ("motor", "cycle"): "motor cycle",
    ("air", "plane"): "air plane",
    ("traffic", "light"): "traffic light",
    ("street", "light"): "street light",
    ("traffic", "signal"): "traffic signal",
    ("stop", "light"): "stop light",
    ("fire", "hydrant"): "fire hydrant",
    ("stop", "sign"): "stop sign",
    ("parking", "meter"): "parking meter",
    ("suit", "case"): "suit case",
    ("sports", "ball"): "sports ball",
    ("baseball", "bat"): "baseball bat",
    ("baseball", "glove"): "baseball glove",
    ("tennis", "racket"): "tennis racket",
    ("wine", "glass"): "wine glass",
    ("hot", "dog"): "hot dog",
    ("cell", "phone"): "cell phone",
    ("mobile", "phone"): "mobile phone",
    ("teddy", "bear"): "teddy bear",
    ("hair", "drier"): "hair drier",
    ("potted", "plant"): "potted plant",
    ("laptop", "computer"): "laptop computer",
    ("home", "plate"): "home plate",
    ("train", "track"): "train track",
    ("bow", "tie"): "tie",
    ("toilet", "seat"): "toilet",
}
for _animal in ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"):
    _PAIRS |= {("baby", _animal): _animal, ("adult", _animal): _animal}
_PAIRS |= {("passenger", vehicle): vehicle for vehicle in ("jet", "train")}

_IRREGULAR = {
    "child": "children", "person": "people", "goose": "geese", "mouse": "mice", "ox": "oxen", "calf": "calves",
    "knife": "knives",
}  # fmt: skip


def _plurals(word: str) -> Iterator[str]:
    """The plurals of a noun, and the form with "s", which captions use by mistake ("mans") and verbs have ("skis")."""
    yield word + "s"
    for singular, plural in _IRREGULAR.items():
        if word.endswith(singular):
            yield word.removesuffix(singular) + plural
    if word.endswith("man"):
        yield word.removesuffix("man") + "men"
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        yield word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        yield word[:-1] + "ies"


# Each form of each word that matters -> the word. A form that is a word of its own ("people") stays as it is.
_WORDS = {word for word in OBJECT_OF if " " not in word} | {word for pair in _PAIRS for word in pair}
_SINGULAR = {form: word for word in sorted(_WORDS) for form in _plurals(word)} | {word: word for word in _WORDS}


def objects_in(tokens: Sequence[str]) -> tuple[str, ...]:
    """The objects that the tokens of a caption name: see ``mentioned_objects``."""
    singular = [_SINGULAR.get(token, "") for token in tokens]
    words = []
    position = 0
    while position < len(singular):
        pair = _PAIRS.get(tuple(singular[position : position + 2]))
        words.append(singular[position] if pair is None else pair)
        position += 1 if pair is None else 2
    if "toilet" in words:
        words = [word for word in words if word != "seat"]
    return tuple(OBJECT_OF[word] for word in words if word in OBJECT_OF)


def mentioned_objects(caption: str) -> tuple[str, ...]:
    """COCO's names of the objects that a caption names, in the order of the words. Repeated mentions are kept."""
    return objects_in(tokenize(caption))


@dataclass(frozen=True)
class ObjectCounts:
    """The images of one object.

    Attributes:
        present: the number of images that contain the object.
        named: the number of images whose caption names it.
        correct: the number of images that contain it and whose caption names it.
    """

    present: int
    named: int
    correct: int

    @property
    def recall(self) -> float:
        """The share of the images with the object whose caption names it; nan if there is no such image."""
        return _ratio(self.correct, self.present)

    @property
    def precision(self) -> float:
        """The share of the captions that name the object whose image contains it; nan if there is no such caption."""
        return _ratio(self.correct, self.named)


@dataclass(frozen=True)
class ObjectScores:
    """The objects that captions name, and those that are present in their images.

    Attributes:
        mentioned: image id -> the objects that the caption names, as ``mentioned_objects`` returns them.
        present: image id -> the objects that are present.
    """

    mentioned: Mapping[int, tuple[str, ...]]
    present: Mapping[int, frozenset[str]]

    @property
    def chair_s(self) -> float:
        """The share of captions that name an object that is not present; nan without captions."""
        return _ratio(sum(map(bool, self.hallucinated.values())), len(self.mentioned))

    @property
    def chair_i(self) -> float:
        """The share of object mentions whose object is not present; nan if no caption names an object."""
        return _ratio(self._sums[1], self._sums[0])

    @property
    def recall(self) -> float:
        """The share of the pairs of an image and a present object that the captions name; nan if there is no pair."""
        return _ratio(self._sums[3], self._sums[4])

    @property
    def precision(self) -> float:
        """The share of the pairs of an image and a named object that are present; nan if there is no pair."""
        return _ratio(self._sums[3], self._sums[2])

    @cached_property
    def hallucinated(self) -> dict[int, tuple[str, ...]]:
        """Image id -> the different objects that the caption names and that are not present, in order of mention."""
        return {
            image: tuple(name for name in dict.fromkeys(names) if name not in self.present[image])
            for image, names in self.mentioned.items()
        }

    @cached_property
    def missed(self) -> dict[int, tuple[str, ...]]:
        """Image id -> the objects that are present and that the caption does not name, in the order of COCO."""
        return {
            image: tuple(sorted(self.present[image] - set(names), key=OBJECTS.index))
            for image, names in self.mentioned.items()
        }

    @cached_property
    def per_object(self) -> dict[str, ObjectCounts]:
        """Object -> its counts, for all 80 objects, in the order of COCO."""
        counts = {name: [0, 0, 0] for name in OBJECTS}
        for image, names in self.mentioned.items():
            named, present = set(names), self.present[image]
            for place, found in enumerate((present, named, named & present)):
                for name in found:
                    counts[name][place] += 1
        return {name: ObjectCounts(*found) for name, found in counts.items()}

    @cached_property
    def counts(self) -> np.ndarray:
        """Per image [I,5]: mentions, mentions of absent objects, objects named, objects named correctly, present."""
        rows = [
            (
                len(names),
                sum(name not in self.present[image] for name in names),
                len(set(names)),
                len(set(names) & self.present[image]),
                len(self.present[image]),
            )
            for image, names in self.mentioned.items()
        ]
        return np.array(rows, float).reshape(-1, 5)

    @cached_property
    def _sums(self) -> list[float]:
        sums: list[float] = self.counts.sum(0).tolist()
        return sums


def object_scores(
    captions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    annotated: Mapping[int, Collection[str]] | None = None,
) -> ObjectScores:
    """Finds the objects that captions name, and compares them with the objects that are present.

    Args:
        captions: image id -> caption.
        references: image id -> reference captions, of at least these images. An object that any reference names is
            present.
        annotated: image id -> the names of other objects that are present, such as those of COCO's instance
            annotations. An image that is not in it has none.
    """
    others = annotated or {}
    present = {
        image: frozenset(name for text in references[image] for name in mentioned_objects(text)).union(
            others.get(image, ())
        )
        for image in captions
    }
    return ObjectScores({image: mentioned_objects(caption) for image, caption in captions.items()}, present)


def metric(
    annotated: Mapping[int, Collection[str]] | None = None,
) -> Callable[[References], Callable[[Candidates], MetricScores]]:
    """CHAIRs, CHAIRi, recall and precision as a metric of ``CaptionScorer``. For the arguments see ``object_scores``.

    A ratio whose denominator is 0 is 0, for an image as well as for all images.
    """
    others = annotated or {}

    def prepare(references: References) -> Callable[[Candidates], MetricScores]:
        present = {
            image: frozenset(name for tokens in texts for name in objects_in(tokens)).union(others.get(image, ()))
            for image, texts in zip(references.image_ids, references.tokens, strict=True)
        }

        def score(candidates: Candidates) -> MetricScores:
            mentioned = zip(references.image_ids, map(objects_in, candidates.tokens), strict=True)
            mentions, absent, named, correct, there = ObjectScores(dict(mentioned), present).counts.T
            return {
                "CHAIRs": mean_score((absent > 0).astype(float)),
                "CHAIRi": _ratio_score(absent, mentions),
                "object recall": _ratio_score(correct, there),
                "object precision": _ratio_score(correct, named),
            }

        if annotated is None:
            score.warnings = FROM_REFERENCES  # type: ignore[attr-defined]
        return score

    return prepare


FROM_REFERENCES = (
    "CHAIR: only objects that a reference names count as present; published scores also count COCO's instance "
    "annotations (--instances) and cannot be compared with these"
)


def label(annotated: Mapping[int, Collection[str]] | None, name: str = "") -> str:
    """The label of ``metric``, for signatures. `name` is that of the file of instance annotations."""
    if annotated is None:
        return "CHAIR:objects=references"
    text = "\n".join(f"{image} {','.join(sorted(names))}" for image, names in sorted(annotated.items()))
    return f"CHAIR:objects=references+{name}-{len(annotated)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _ratio_score(part: np.ndarray, whole: np.ndarray) -> MetricScore:
    """Scores of a metric whose score of a set is the ratio of two sums over its images, [I] each."""
    return MetricScore(_divide(part, whole), lambda counts: _divide(counts @ part, counts @ whole))


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
