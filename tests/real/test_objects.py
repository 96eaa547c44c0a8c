"""COCO's objects in real captions."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from nltk.stem import PorterStemmer

from imgcap_jax.metrics.coco_format import first_captions, read_captions, read_references
from imgcap_jax.metrics.object_names import OBJECT_OF
from imgcap_jax.metrics.objects import mentioned_objects, object_scores
from imgcap_jax.text import tokenize


@pytest.fixture(scope="module")
def references(shared: Path) -> dict[int, list[str]]:
    return read_references(shared / "metrics" / "flickr30k" / "references.json")


def real_captions(shared: Path) -> Iterator[str]:
    for image in json.loads((shared / "flickr8k" / "dataset_flickr8k.json").read_text())["images"]:
        yield from (sentence["raw"] for sentence in image["sentences"])
    for split in ("train", "val"):
        for texts in read_references(shared / "coco_subset" / "annotations" / f"captions_{split}.json").values():
            yield from texts


def test_no_plural_in_real_captions_is_missed(shared: Path, references: dict[int, list[str]]) -> None:
    """All words in -s with the stem of a word of the list, except verbs and names, name its object."""
    stem = PorterStemmer().stem
    stems = {stem(word) for word in OBJECT_OF if " " not in word}
    captions = [*real_captions(shared), *(text for texts in references.values() for text in texts)]
    words = {word for caption in captions for word in tokenize(caption)}
    plurals = {word for word in words if word.endswith("s") and stem(word) in stems}
    assert len(plurals) > 150
    missed = {word for word in plurals if not mentioned_objects(word)}
    verbs = {"contains", "reclines", "retrieves", "travels"}
    other_words = {"backpackers", "bicyclers", "ferris", "kayakers", "seaguls", "villages"}
    assert missed <= verbs | other_words


def test_systems_on_flickr30k(shared: Path, references: dict[int, list[str]]) -> None:
    """The captions of human_1 are references; those of models name objects that no reference names."""
    folder = shared / "metrics" / "flickr30k"
    human, model = (
        object_scores(first_captions(read_captions(folder / f"{name}.json"))[0], references)
        for name in ("human_1", "init_1")
    )
    assert human.chair_s == 0
    assert human.recall == pytest.approx(0.8368, abs=1e-4)
    # The rules of the authors' code give 0.140, 0.104 and 0.687: it does not count "bus", "canoes" and "ties".
    assert model.chair_s == pytest.approx(0.143, abs=1e-4)
    assert model.chair_i == pytest.approx(0.1059, abs=1e-4)
    assert model.recall == pytest.approx(0.6837, abs=1e-4)
