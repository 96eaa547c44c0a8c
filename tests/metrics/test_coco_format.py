"""COCO's files: what is written is read back, and each mistake is named in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.metrics.coco_format import read_references, read_results, write_references, write_results


def test_results_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    captions = {391895: "a man’s dog", 7: ""}
    write_results(path, captions)
    assert json.loads(path.read_text()) == [
        {"image_id": 391895, "caption": "a man’s dog"},
        {"image_id": 7, "caption": ""},
    ]
    assert read_results(path) == captions
    assert [file.name for file in tmp_path.iterdir()] == ["captions.json"]


def test_references_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "references.json"
    references = {3: ["a dog", "the dog"], 1: ["a cat"]}
    write_references(path, references, {3: "3.jpg", 1: "1.jpg"})
    assert read_references(path) == references
    document = json.loads(path.read_text())
    assert document["images"] == [{"id": 3, "file_name": "3.jpg"}, {"id": 1, "file_name": "1.jpg"}]
    assert [annotation["id"] for annotation in document["annotations"]] == [1, 2, 3]


def test_images_without_captions_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "references.json"
    annotations = [{"id": 5, "image_id": 2, "caption": "a dog"}]
    path.write_text(json.dumps({"info": {}, "images": [{"id": 1}, {"id": 2}], "annotations": annotations}))
    assert read_references(path) == {2: ["a dog"]}


def check(read: Any, path: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([{"image_id": 1}], "entry 0 has no 'caption'"),
        ([{"image_id": 1, "caption": "a"}, {"caption": "b"}], "entry 1 has no 'image_id'"),
        ([{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}], "image 1 twice"),
        ([{"image_id": "1", "caption": "a"}], "'1' is not a whole number"),
        ([{"image_id": True, "caption": "a"}], "not a whole number"),
        ([{"image_id": 1, "caption": ["a"]}], "not text"),
        (["a dog"], "not an object"),
        ([], "empty"),
        ({"1": "a dog"}, "not a list"),
        ({"annotations": []}, "references"),
    ],
)
def test_bad_results(tmp_path: Path, document: Any, words: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(document))
    check(read_results, path, words)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([{"image_id": 1, "caption": "a"}], "as results do"),
        ({"images": []}, "no 'annotations'"),
        ({"annotations": []}, "annotations is empty"),
        ({"annotations": [{"image_id": 1}]}, "entry 0 of annotations has no 'caption'"),
        ({"images": [{"id": 1}, {"id": 1}], "annotations": []}, "image 1 twice"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]}, "image 2 .* not listed"),
        ({"images": {"1": {}}, "annotations": []}, '"images" must be a list'),
    ],
)
def test_bad_references(tmp_path: Path, document: Any, words: str) -> None:
    path = tmp_path / "references.json"
    path.write_text(json.dumps(document))
    check(read_references, path, words)


@pytest.mark.parametrize("read", [read_results, read_references])
def test_unreadable_files(tmp_path: Path, read: Any) -> None:
    check(read, tmp_path / "missing.json", "No such file")
    check(read, tmp_path, "directory")
    path = tmp_path / "broken.json"
    path.write_text('[{"image_id": 1, "caption":')
    check(read, path, "not JSON")
    path.write_bytes(b'["\xff"]')
    check(read, path, "not UTF-8")
