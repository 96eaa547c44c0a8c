"""COCO's objects in captions: the rules of CHAIR, and its scores."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from imgcap_jax.metrics import objects
from imgcap_jax.metrics.compare import paired_bootstrap
from imgcap_jax.metrics.object_names import OBJECT_OF, OBJECTS
from imgcap_jax.metrics.objects import mentioned_objects, object_scores
from imgcap_jax.metrics.scoring import CaptionScorer

# Plurals and misspelled plurals of real captions -> the word of the list.
PLURALS = {
    "benches": "bench", "buses": "bus", "couches": "couch", "sandwiches": "sandwich", "toothbrushes": "toothbrush",
    "babies": "baby", "ladies": "lady", "ponies": "pony", "puppies": "puppy", "huskies": "husky", "ferries": "ferry",
    "children": "child", "grandchildren": "grandchild", "people": "person", "persons": "person", "men": "man",
    "women": "woman", "policemen": "policeman", "gentlemen": "gentleman", "geese": "goose", "mice": "mouse",
    "knives": "knife", "oxen": "ox", "calves": "calf", "skis": "ski", "vases": "vase", "purses": "purse",
    "horses": "horse", "canoes": "canoe", "ties": "tie", "collies": "collie", "microwaves": "microwave",
    "stoves": "stove", "flamingos": "flamingo", "buffaloes": "buffalo", "mans": "man", "childs": "child",
    "ladys": "lady", "babys": "baby", "suitcases": "suitcase", "scissors": "scissors", "sheep": "sheep",
}  # fmt: skip


def test_the_list_has_cocos_80_categories() -> None:
    assert len(OBJECTS) == len(set(OBJECTS)) == 80
    assert (OBJECTS[0], OBJECTS[4], OBJECTS[79]) == ("person", "airplane", "toothbrush")
    assert all(OBJECT_OF[name] == name for name in OBJECTS)
    assert OBJECT_OF["motor bike"] == "motorcycle"
    assert OBJECT_OF["cheesecake"] == "cake"
    assert OBJECT_OF["iphone"] == "cell phone"


def test_each_synonym_is_found_alone_and_with_an_s() -> None:
    for word, name in OBJECT_OF.items():
        if word != "stove top oven":
            assert mentioned_objects(f"there is a {word} here.") == (name,), word
            assert mentioned_objects(f"{word}s") == (name,), word
            assert mentioned_objects(word.upper()) == (name,), word


def test_plurals() -> None:
    for plural, word in PLURALS.items():
        assert mentioned_objects(f"two {plural} .") == (OBJECT_OF[word],), plural


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("", ()),
        ("a nice view of the sea", ()),
        ("A man and a woman with two dogs and a man", ("person", "person", "dog", "person")),
        ("a man's dog", ("person", "dog")),
        # Pairs count as one word.
        ("a motor bike", ("motorcycle",)),
        ("three hot dogs and a dog", ("hot dog", "dog")),
        ("teddy bears", ("teddy bear",)),
        ("a stop light next to a stop sign", ("traffic light", "stop sign")),
        ("a laptop computer", ("laptop",)),
        ("two wine glasses and a glass", ("wine glass",)),
        ("a tennis racket and a baseball bat", ("tennis racket", "baseball bat")),
        ("a bow tie", ("tie",)),
        ("a dining table", ("dining table",)),
        ("a sports ball", ("sports ball",)),
        ("a potted plant and a plant", ("potted plant",)),
        ("home plate", ()),
        ("the train tracks", ()),
        ("a train on the track", ("train",)),
        # Words before an animal or a vehicle that are not people.
        ("a baby elephant and its mother", ("elephant", "person")),
        ("an adult giraffe", ("giraffe",)),
        ("baby birds", ("bird",)),
        ("a baby animal", ()),
        ("a baby", ("person",)),
        ("a passenger train", ("train",)),
        ("a passenger jet", ("airplane",)),
        ("a passenger plane", ("person", "airplane")),
        # The seat of a toilet is not a chair.
        ("a toilet seat", ("toilet",)),
        ("the seat of the toilet is up", ("toilet",)),
        ("a seat", ("chair",)),
        # Three words are not looked up together: the list's "stove top oven" is two ovens.
        ("a stove top oven", ("oven", "oven")),
    ],
)
def test_rules(caption: str, found: tuple[str, ...]) -> None:
    assert mentioned_objects(caption) == found


REFERENCES = {
    1: ["a man on a horse", "a cowboy rides"],  # person, horse
    2: ["two cats on a bed"],  # cat, bed
    3: ["a view of the sea"],  # nothing
    4: ["a car"],  # car
}
CAPTIONS = {
    1: "a man and a man with a dog and a dog",  # person, person, dog, dog
    2: "a cat on a bed",  # cat, bed
    3: "a boat",  # boat
    4: "a street",  # nothing
}


def test_scores_by_hand() -> None:
    found = object_scores(CAPTIONS, REFERENCES)
    assert found.chair_s == 2 / 4
    assert found.chair_i == 3 / 7
    assert found.recall == 3 / 5
    assert found.precision == 3 / 5
    assert found.hallucinated == {1: ("dog",), 2: (), 3: ("boat",), 4: ()}
    assert found.missed == {1: ("horse",), 2: (), 3: (), 4: ("car",)}
    dog, person = found.per_object["dog"], found.per_object["person"]
    assert (dog.present, dog.named, dog.correct, dog.precision) == (0, 1, 0, 0)
    assert math.isnan(dog.recall)
    assert (person.present, person.named, person.correct) == (1, 1, 1)
    assert math.isnan(found.per_object["zebra"].precision)


def test_annotated_objects_are_present_too() -> None:
    found = object_scores(CAPTIONS, REFERENCES, {1: ["dog", "horse"], 4: {"person"}, 9: {"zebra"}})
    assert found.chair_i == 1 / 7
    assert found.missed == {1: ("horse",), 2: (), 3: (), 4: ("person", "car")}
    assert found.recall == 4 / 7


def test_scores_without_objects_are_undefined() -> None:
    found = object_scores({1: "the sea"}, {1: ["the sky"]})
    assert found.chair_s == 0
    assert math.isnan(found.chair_i)
    assert math.isnan(found.recall)
    assert math.isnan(found.precision)
    assert math.isnan(object_scores({}, {}).chair_s)


def sentence(rng: random.Random) -> str:
    words = ["a", "man", "dogs", "cat", "hot", "dog", "baby", "toilet", "seat", "the", "buses", "runs"]
    return " ".join(rng.choices(words, k=rng.randint(0, 8)))


def test_the_metric_equals_the_definition_on_all_images_and_on_samples() -> None:
    rng = random.Random(0)
    references = {image: [sentence(rng) + " x" for _ in range(rng.randint(1, 3))] for image in range(40)}
    captions = {image: sentence(rng) for image in references}
    annotated = {image: rng.sample(["person", "dog", "toilet"], rng.randint(0, 2)) for image in range(0, 40, 2)}
    metric = objects.metric(annotated)
    found = CaptionScorer(references, {objects.label(annotated, "x.json"): metric}).score(captions).metrics
    for drawn in (np.arange(40), np.random.default_rng(0).integers(0, 40, 40)):
        wrong = mentions = sentences = correct = present = named = 0
        for image in drawn.tolist():
            truth = {
                *annotated.get(image, []),
                *(name for text in references[image] for name in mentioned_objects(text)),
            }
            names = mentioned_objects(captions[image])
            wrong += sum(name not in truth for name in names)
            sentences += any(name not in truth for name in names)
            mentions += len(names)
            correct += len(truth.intersection(names))
            named += len(Counter(names))
            present += len(truth)
        counts = np.bincount(drawn, minlength=40)[None].astype(float)
        assert found["CHAIRs"].corpus(counts)[0] == pytest.approx(sentences / 40)
        assert found["CHAIRi"].corpus(counts)[0] == pytest.approx(wrong / mentions)
        assert found["object recall"].corpus(counts)[0] == pytest.approx(correct / present)
        assert found["object precision"].corpus(counts)[0] == pytest.approx(correct / named)
    whole = object_scores(captions, references, annotated)
    assert found["CHAIRs"].value == pytest.approx(whole.chair_s)
    assert found["CHAIRi"].value == pytest.approx(whole.chair_i)
    assert found["object recall"].value == pytest.approx(whole.recall)
    assert found["object precision"].value == pytest.approx(whole.precision)


def test_the_bootstrap_of_chair_is_finite_if_samples_name_no_object() -> None:
    references = {image: ["a dog"] for image in range(3)}
    scorer = CaptionScorer(references, {objects.label(None): objects.metric()})
    ours = scorer.score({0: "a cat", 1: "the sea", 2: "the sea"}).metrics["CHAIRi"]
    other = scorer.score({0: "a dog", 1: "the sea", 2: "the sea"}).metrics["CHAIRi"]
    found = paired_bootstrap(ours, other, samples=200)
    assert (found.ours, found.other, found.low, found.high) == (1, 0, 0, 1)


def test_the_label_depends_on_the_annotations() -> None:
    first, second = {1: {"dog", "cat"}, 2: set[str]()}, {1: {"dog"}, 2: set[str]()}
    assert objects.label(None) == "CHAIR:objects=references"
    assert objects.label(first, "a.json").startswith("CHAIR:objects=references+a.json-2-")
    assert objects.label(first, "a.json") == objects.label({2: [], 1: ["cat", "dog"]}, "a.json")
    assert objects.label(first, "a.json") != objects.label(second, "a.json")
