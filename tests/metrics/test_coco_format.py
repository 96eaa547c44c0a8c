"""COCO file formats: files are read back as they were written, and each mistake gives an error of one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.metrics.coco_format import (
    Captions,
    check_file_names,
    read_captions,
    read_references,
    write_references,
    write_results,
)


def test_results_are_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    captions = {391895: "a man’s dog", 7: ""}
    write_results(path, captions)
    assert json.loads(path.read_text()) == [
        {"image_id": 391895, "caption": "a man’s dog"},
        {"image_id": 7, "caption": ""},
    ]
    assert read_captions(path) == {image: [caption] for image, caption in captions.items()}
    assert [file.name for file in tmp_path.iterdir()] == ["captions.json"]


def test_references_are_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "references.json"
    references = {3: ["a dog", "the dog"], 1: ["a cat"]}
    write_references(path, references, {3: "3.jpg", 1: "1.jpg"})
    assert read_references(path) == references
    document = json.loads(path.read_text())
    assert document["images"] == [{"id": 3, "file_name": "3.jpg"}, {"id": 1, "file_name": "1.jpg"}]
    assert [annotation["id"] for annotation in document["annotations"]] == [1, 2, 3]


def test_file_names_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    write_results(path, {3: "a dog", 1: "a cat"}, {1: "1.jpg", 3: "3.jpg"})
    assert json.loads(path.read_text())[0] == {"image_id": 3, "caption": "a dog", "file_name": "3.jpg"}
    assert read_captions(path).file_names == {1: "1.jpg", 3: "3.jpg"}
    write_references(path, {3: ["a dog"], 1: ["a cat"]}, {1: "1.jpg", 3: "3.jpg"})
    assert read_references(path).file_names == {1: "1.jpg", 3: "3.jpg"}


def named(tmp_path: Path, names: list[str]) -> tuple[Path, Captions]:
    path = tmp_path / f"{names[0].replace('/', '_')}.json"
    write_results(path, dict.fromkeys(range(len(names)), "a dog"), dict(enumerate(names)))
    return path, read_captions(path)


@pytest.mark.parametrize(
    "other",
    ["COCO_val2014_000000000001.jpg", "val2014/000000000001.png", "val\\000000000001.JPG", "000000000001"],
)
def test_the_same_photo_under_another_name(tmp_path: Path, other: str) -> None:
    references = named(tmp_path, ["000000000001.jpg", "A Dog.v2.jpeg"])
    assert check_file_names(*named(tmp_path, [other, "photos/a dog.V2.png"]), *references) == []


def test_other_photos_under_the_same_ids(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(4)]
    references = named(tmp_path, names)
    path, captions = named(tmp_path, ["8.jpg", "9.jpg", *names[2:]])  # a half of the names differs
    (warning,) = check_file_names(path, captions, *references)
    assert warning.startswith(f"2 images of 4 with another file name in {path} than in {references[0]} (first: image 0")
    path, captions = named(tmp_path, ["7.jpg", "8.jpg", "9.jpg", names[3]])
    with pytest.raises(UserError, match=r"3 images of 4 with another .* '7.jpg' and '0.jpg'\): the files are of diff"):
        check_file_names(path, captions, *references)


@pytest.mark.parametrize("image_id", ["7", "000007", 7.0, "COCO_val2014_000000000007.jpg"])
def test_ids_in_other_notations(tmp_path: Path, image_id: Any) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([{"image_id": image_id, "caption": ["a dog"]}]))
    assert read_captions(path) == {7: ["a dog"]}
    annotations = [{"image_id": 7, "caption": "a dog"}]
    path.write_text(json.dumps({"images": [{"id": image_id}], "annotations": annotations}))
    assert read_references(path) == {7: ["a dog"]}


def test_images_without_captions_are_omitted(tmp_path: Path) -> None:
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
        ([{"image_id": "cat", "caption": "a"}], "'cat' is not an integer"),
        (
            [{"image_id": 1, "captions": ["a", "b"]}, {"image_id": 2, "captions": [{"score": 1}]}],
            "entry 1 has no 'caption'",
        ),
        ([{"image_id": 1, "captions": []}], "not a list of at least one"),
        ([{"image_id": 1, "caption": "a \ud83d"}], "a lone surrogate"),
        ([{"image_id": "9" * 5000, "caption": "a"}], "not an integer"),
        ([{"image_id": True, "caption": "a"}], "not an integer"),
        ([{"image_id": -1, "caption": "a"}], "not between 0 and"),
        ([{"image_id": 2**63, "caption": "a"}], "not between 0 and"),
        ([{"image_id": 1.5, "caption": "a"}], "1.5 is not an integer"),
        ([{"image_id": float("nan"), "caption": "a"}], "nan is not an integer"),
        ([{"image_id": 1, "caption": ["a", "dog"]}], "not a string"),
        (["a dog"], "not an object"),
        ([], "empty"),
        ({"1": "a dog"}, "not a list"),
        ({"annotations": []}, "references"),
    ],
)
def test_bad_results(tmp_path: Path, document: Any, words: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(document))
    check(read_captions, path, words)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([{"image_id": 1, "caption": "a"}], "as results files do"),
        ({"images": []}, "no 'annotations'"),
        ({"annotations": []}, "annotations is empty"),
        ({"annotations": [{"image_id": 1}]}, "entry 0 of annotations has no 'caption'"),
        ({"images": [{"id": 1}, {"id": 1}], "annotations": []}, "image 1 twice"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]}, "image 2 .* not listed"),
        ({"images": {"1": {}}, "annotations": []}, '"images" must be a list'),
        ({"images": [{"id": "cat"}], "annotations": []}, "entry 0 of images: id 'cat' is not an integer"),
    ],
)
def test_bad_references(tmp_path: Path, document: Any, words: str) -> None:
    path = tmp_path / "references.json"
    path.write_text(json.dumps(document))
    check(read_references, path, words)


@pytest.mark.parametrize("read", [read_captions, read_references])
def test_unreadable_files(tmp_path: Path, read: Any) -> None:
    check(read, tmp_path / "missing.json", "is missing: give a JSON file with a")
    check(read, tmp_path, "Is a directory")
    path = tmp_path / "broken.json"
    path.write_text('[{"image_id": 1, "caption":')
    check(read, path, "is damaged")
    path.write_text("[" * 100_000)
    check(read, path, "is damaged")
    path.write_bytes(b'["\xff"]')
    check(read, path, "byte 2 is not utf-8")
    path.unlink()
    os.mkfifo(path)
    check(read, path, "is a pipe")  # opening it would wait for ever


def test_several_captions_per_image(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    path.write_text(
        json.dumps(
            [
                {"image_id": 1, "caption": "a dog"},
                {"image_id": "2", "captions": ["a cat", {"caption": "the cat", "score": -1.0}]},
                {"image_id": 1, "captions": ["the dog"], "caption": None},
            ]
        )
    )
    assert read_captions(path) == {1: ["a dog", "the dog"], 2: ["a cat", "the cat"]}


def test_references_with_string_ids(tmp_path: Path) -> None:
    path = tmp_path / "references.json"
    path.write_text(json.dumps({"images": [{"id": "7"}], "annotations": [{"image_id": "7", "caption": "a dog"}]}))
    assert read_references(path) == {7: ["a dog"]}
