"""The command ``imgcap score``."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.metrics import scoring

REFERENCES = {1: ["a dog runs fast", "the dog runs"], 2: ["two cats sleep"], 3: ["some people ski down a hill"]}
CAPTIONS = {1: "a dog runs", 2: "two cats", 3: "people ski"}


def results(path: Path, captions: Any) -> str:
    if isinstance(captions, dict):
        captions = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
    path.write_text(json.dumps(captions))
    return str(path)


@pytest.fixture
def references(tmp_path: Path) -> str:
    annotations = [{"image_id": image, "caption": text} for image, texts in REFERENCES.items() for text in texts]
    path = tmp_path / "references.json"
    path.write_text(json.dumps({"annotations": annotations}))
    return str(path)


def test_table_and_json(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(tmp_path / "captions.json", CAPTIONS)
    assert main(["score", captions, references, "--json", str(tmp_path / "out.json"), "--training", references]) == 0
    shown = capsys.readouterr().out.splitlines()
    document = json.loads((tmp_path / "out.json").read_text())
    line = next(line.split() for line in shown if line.startswith("BLEU-1"))
    assert line[1] == f"{100 * document['scores']['BLEU-1']:.2f}"
    assert line[2] == "BLEU:closest"
    assert any("|refs:1-2|n:3|(last column)" in line for line in shown)
    assert document["signatures"]["BLEU-1"].endswith("|refs:1-2|n:3|BLEU:closest")
    assert document["per_image"]["1"]["ROUGE-L"] == pytest.approx(2.44 * 0.75 / (0.75 + 1.44), abs=1e-6)
    assert document["diversity"]["novel"] == 1
    assert not any(line.startswith("warning") for line in shown)


def test_comparison(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(tmp_path / "captions.json", CAPTIONS)
    other = results(tmp_path / "other.json", dict.fromkeys(CAPTIONS, "a zebra"))
    command = ["score", captions, references, "--compare", other, "--bootstrap", "50"]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    found = document["differences"]["ROUGE-L"]
    assert found["low"] > 0
    assert document["bootstrap"] == {"samples": 50, "seed": 0}
    ours, theirs = document["per_image"], document["per_image_compared_with"]
    mean = sum(ours[image]["ROUGE-L"] - theirs[image]["ROUGE-L"] for image in ours) / 3
    assert found["ours"] - found["other"] == pytest.approx(mean, abs=1e-6)
    shown = capsys.readouterr().out
    assert "95 % interval" in shown
    assert "with 3 images neither interval nor p-value is reliable" in shown


def test_the_caption_on_which_systems_agree_is_scored(
    references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agreed = {1: "a dog runs", 2: "two cats sleep", 3: "people ski"}
    one = results(tmp_path / "one.json", {**agreed, 1: "a zebra"})
    several = [
        {"image_id": image, "captions": [{"caption": text}, {"caption": text}]} for image, text in agreed.items()
    ]
    two = results(tmp_path / "two.json", several)
    chosen = tmp_path / "chosen.json"
    command = [
        "score",
        one,
        references,
        "--mbr",
        two,
        "--mbr-output",
        str(chosen),
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main([*command, "--compare", one]) == 0
    assert {entry["image_id"]: entry["caption"] for entry in json.loads(chosen.read_text())} == agreed
    document = json.loads((tmp_path / "out.json").read_text())
    capsys.readouterr()
    assert main(["score", str(chosen), references, "--json", str(tmp_path / "alone.json")]) == 0
    assert document["scores"] == json.loads((tmp_path / "alone.json").read_text())["scores"]
    assert document["compared_with"]["BLEU-1"] < document["scores"]["BLEU-1"]


def test_a_part_of_the_images_is_scored(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(tmp_path / "captions.json", CAPTIONS)
    command = ["score", captions, references, "--idf", references, "--json", str(tmp_path / "out.json")]
    found = []
    for part in (":", "1:"):
        assert main([*command, "--images", part]) == 0
        assert "warning" not in capsys.readouterr().out
        found.append(json.loads((tmp_path / "out.json").read_text())["per_image"])
    assert list(found[1]) == ["2", "3"]
    for image, scores in found[1].items():
        assert scores["CIDEr-D"] == pytest.approx(found[0][image]["CIDEr-D"])


def test_document_frequencies_from_a_file(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(tmp_path / "captions.json", CAPTIONS)
    texts = ["a dog runs", "two cats", "people ski", "a hill"]
    train = [{"image_id": image, "caption": text} for image, text in enumerate(texts)]
    (tmp_path / "train set.json").write_text(json.dumps({"annotations": train}))
    assert main(["score", captions, references, "--idf", str(tmp_path / "train set.json")]) == 0
    assert ":idf=train_set.json-4-" in capsys.readouterr().out


def test_missing_meteor_is_reported(
    references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "package_folder", lambda: None)
    captions = results(tmp_path / "captions.json", CAPTIONS)
    assert main(["score", captions, references, "--json", str(tmp_path / "out.json")]) == 0
    assert "METEOR is missing: pip install" in capsys.readouterr().out
    assert "METEOR" in json.loads((tmp_path / "out.json").read_text())["missing"]


def test_misleading_input_gives_warnings(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(
        tmp_path / "captions.json",
        [
            {"image_id": "1", "caption": "a dog\nruns"},
            {"image_id": 1, "caption": "a cat"},
            {"image_id": 99, "caption": "a cow"},
        ],
    )
    assert main(["score", captions, references]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    expected = ("more than once", "1 of 2 images have no references", "for 2 of 3 images", "one image", "newlines")
    for words in expected:
        assert sum(words in line for line in warnings) == 1, (words, warnings)


def test_diversity_is_said_in_words(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ("A dog runs.", "a dog runs", "two cats")
    captions = results(
        tmp_path / "captions.json", [{"image_id": image, "caption": text} for image, text in enumerate(texts, 1)]
    )
    training = tmp_path / "train.json"
    training.write_text(json.dumps({"annotations": [{"image_id": 7, "caption": "A dog runs!"}]}))
    assert main(["score", captions, references, "--training", str(training)]) == 0
    printed = capsys.readouterr().out
    assert "captions: 2.7 words on average, 5 different words, distinct-1 62.5 %" in printed
    unique = "33.3 % of the captions are unique: no other image has the same one"
    assert f"{unique}; 33.3 % do not occur in the training captions" in printed


def test_diversity_of_samples(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(tmp_path / "captions.json", CAPTIONS)
    several = [{"image_id": 1, "captions": [{"caption": "a dog runs fast"}, {"caption": "two cats sleep there"}]}]
    samples = results(tmp_path / "samples.json", several)
    assert main(["score", captions, references, "--samples", samples]) == 0
    assert "2.0 captions of each of 1 images, self-CIDEr 1.000" in capsys.readouterr().out
    assert main(["score", captions, references, "--samples", captions]) == 2
    assert "no image with two captions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.json", "{references}"], "missing.json is missing"),
        (["{references}", "{references}"], "contains references"),
        (["{captions}", "{captions}"], "as results files do, not references"),
        (["{strange}", "{references}"], "none of the 1 image of .* has references"),
        (["{captions}", "{references}", "--compare", "{strange}"], "none of the 1 image"),
        (
            ["{captions}", "{references}", "--compare", "{captions}", "--bootstrap", "0"],
            "--bootstrap is 0; it must be",
        ),
        (["{captions}", "{references}", "--bootstrap", "9"], "--bootstrap requires --compare"),
        (["{captions}", "{references}", "--idf", "{one}"], "one.json has 1"),
        (["{captions}", "{references}", "--json", "{folder}"], "is a folder"),
        (["{captions}", "{references}", "--json", "{captions}"], "one of the input files"),
        (["{captions}", "{references}", "--json", "/dev/null"], "a device or a pipe"),
        (["{captions}", "{references}", "--images", "9:"], "--images 9: names none of the 3 images of"),
        (["{captions}", "{references}", "--images", "half"], "--images is 'half'; it must be FIRST:END"),
        (["{captions}", "{references}", "--mbr-bleu", "2"], "--mbr-bleu requires --mbr"),
        (["{captions}", "{references}", "--mbr", "{captions}", "--mbr-bleu", "-1"], "--mbr-bleu is -1.0; it must be"),
        (["{captions}", "{references}", "--mbr", "{captions}", "--mbr-output", "{captions}"], "one of the input files"),
        (["{captions}", "{references}", "--mbr", "{captions}"], "names only .*captions.json itself"),
        (["{captions}", "{references}", "--mbr", "{captions}", "--images", ":1"], "names only .*captions.json itself"),
        (["{captions}", "{references}", "--mbr", "{other}", "--images", ":1"], "of at least two images"),
        (["{captions}", "{references}", "--judgements", "--images", "1:"], "--images has no effect with --judgements"),
    ],
)
def test_mistakes_give_an_error_of_one_line(
    arguments: list[str], words: str, references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "references": references,
        "captions": results(tmp_path / "captions.json", CAPTIONS),
        "strange": results(tmp_path / "strange.json", {77: "a cow"}),
        "other": results(tmp_path / "other.json", dict.fromkeys(CAPTIONS, "a man walks")),
        "one": str(tmp_path / "one.json"),
        "folder": str(tmp_path),
    }
    (tmp_path / "one.json").write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "a dog"}]}))
    assert main(["score", *(argument.format(**files) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(words, error)


def test_captions_of_other_photos_under_the_same_ids_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids that have changed between two versions of a dataset would give a wrong score without any error."""
    annotations = [{"image_id": image, "caption": text} for image, texts in REFERENCES.items() for text in texts]
    images = [{"id": image, "file_name": f"val/{image}.jpg"} for image in REFERENCES]
    references = tmp_path / "references.json"
    references.write_text(json.dumps({"images": images, "annotations": annotations}))
    entries = [{"image_id": image, "caption": text, "file_name": f"{image}.jpg"} for image, text in CAPTIONS.items()]
    same = results(tmp_path / "same.json", entries)
    moved = results(tmp_path / "moved.json", [{**entry, "file_name": "2.jpg"} for entry in entries])
    assert main(["score", same, str(references)]) == 0
    capsys.readouterr()
    for arguments in ([moved, str(references)], [same, str(references), "--compare", moved]):
        assert main(["score", *arguments]) == 2
        error = capsys.readouterr().err
        assert f"2 images of 3 with another file name in {moved} than in {references}" in error
        assert "(first: image 1, '2.jpg' and 'val/1.jpg')" in error
        assert error.count("\n") == 1


def test_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str], forget_code: Callable[[], None]
) -> None:
    texts = {1: "一只狗在草地上跑", 2: "两只猫在睡觉"}
    captions = results(tmp_path / "captions.json", {1: "一只狗在草地上奔跑", 2: "两只猫"})
    annotations = [{"image_id": image, "caption": text} for image, text in texts.items()]
    references = results(tmp_path / "references.json", [])
    Path(references).write_text(json.dumps({"annotations": annotations}))
    command = ["score", captions, references, "--json", str(tmp_path / "out.json")]
    assert main([*command, "--tokenizer", "characters", "--spice", "--training", references]) == 0
    shown = capsys.readouterr().out
    assert "|tok:characters|refs:1|n:2|(last column)" in shown
    for metric in ("METEOR", "SPICE"):
        assert f"{metric} is missing: {metric} is defined for the words of English captions" in shown
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["scores"]["CIDEr-D"] > 1
    assert document["diversity"]["length"] == 6  # 9 and 3 characters
    assert set(document["missing"]) == {"METEOR", "SPICE"}

    code = tmp_path / "my_pairs.py"
    code.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Pairs:\n"
        "    label = 'pairs'\n"
        "    def __call__(self, caption):\n"
        "        return [caption[i : i + 2] for i in range(0, len(caption), 2)]\n"
        "    def join(self, tokens):\n"
        "        return ''.join(tokens)\n"
    )
    assert main([*command, "--tokenizer", "my_pairs:Pairs", "--code", str(code)]) == 0
    assert "|tok:pairs|" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["diversity"]["length"] == 3.5
    forget_code()
    assert "add --code my_pairs.py" in refused([*command, "--tokenizer", "my_pairs:Pairs"])
    assert "no tokenizer 'character'" in refused([*command, "--tokenizer", "character"])


def test_images_whose_references_are_empty_are_reported(
    references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(Path(references).read_text())
    for annotation in document["annotations"]:
        if annotation["image_id"] == 2:
            annotation["caption"] = "."
    Path(references).write_text(json.dumps(document))
    assert main(["score", results(tmp_path / "captions.json", CAPTIONS), references]) == 0
    assert "warning: 1 of 3 images have only references without words (first: image 2)" in capsys.readouterr().out


def test_spice_is_checked_before_files_are_read(
    references: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["score", "missing.json", references, "--spice"]) == 2
    assert "SPICE needs Java" in capsys.readouterr().err


INSTANCES = {
    "images": [{"id": image} for image in (1, 2, 3)],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
    "annotations": [
        {"image_id": 1, "category_id": 1, "segmentation": [[1.5, 2.5]], "bbox": [0, 0, 1, 1]},
        {"image_id": 1, "category_id": 1},
        {"image_id": 2, "category_id": 17, "segmentation": {"counts": [1], "size": [2, 2]}},
    ],
}


def test_objects(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(tmp_path / "captions.json", {1: "a dog and a man", 2: "two cats", 3: "people and a bench"})
    command = ["score", captions, references, "--objects", "--json", str(tmp_path / "out.json")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["scores"]["CHAIRi"] == 2 / 5
    assert document["scores"]["CHAIRs"] == 2 / 3
    assert document["signatures"]["CHAIRi"].endswith("|CHAIR:objects=references")
    assert document["objects"]["hallucinated"] == {"1": ["person"], "3": ["bench"]}
    # "ski" is one of the list's words for skis.
    assert document["objects"]["missed"] == {"3": ["skis"]}
    assert document["objects"]["per_object"]["person"] == {
        "present": 1, "named": 2, "correct": 1, "recall": 1.0, "precision": 0.5,
    }  # fmt: skip
    assert document["objects"]["per_object"]["zebra"]["recall"] is None
    assert document["per_image"]["1"]["CHAIRi"] == 0.5
    assert re.search(r"^bench +1 / 1 +skis +1 / 1$", shown, re.MULTILINE)
    assert re.search(r"^person +1 / 2$", shown, re.MULTILINE)
    assert "cannot be compared" in shown

    instances = tmp_path / "instances val.json"
    instances.write_text(json.dumps(INSTANCES))
    other = results(tmp_path / "other.json", dict.fromkeys(CAPTIONS, "a bench"))
    assert main([*command, "--instances", str(instances), "--compare", other]) == 0
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["scores"]["CHAIRi"] == 1 / 5
    assert "CHAIR:objects=references+instances_val.json-3-" in document["signatures"]["CHAIRi"]
    assert document["differences"]["CHAIRs"]["other"] == 1
    assert document["objects_compared_with"]["missed"]["1"] == ["person", "dog"]
    assert "cannot be compared" not in shown


def without(key: str, part: str, entry: int = 0) -> Any:
    document = json.loads(json.dumps(INSTANCES))
    del document[part][entry][key]
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "does not contain instance annotations"),
        ({"annotations": []}, "does not contain instance annotations"),
        ({**INSTANCES, "categories": [{"id": 1, "name": "ferret"}]}, "the category 'ferret' is not one of COCO's 80"),
        ({**INSTANCES, "images": 5}, '"images" must be a list'),
        (without("image_id", "annotations", 1), "entry 1 of annotations: image_id None is not an integer"),
        (without("category_id", "annotations", 2), "entry 2 of annotations: category_id None is not listed"),
        (without("id", "images"), "entry 0 of images: id None is not an integer"),
        ({**INSTANCES, "images": [], "annotations": [{"image_id": 77, "category_id": 1}]}, "has none of the 3 images"),
    ],
)
def test_bad_instances(
    document: Any, message: str, references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = results(tmp_path / "captions.json", CAPTIONS)
    (tmp_path / "instances.json").write_text(json.dumps(document))
    command = ["score", captions, references, "--objects", "--instances", str(tmp_path / "instances.json")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "instances.json" in error


def test_images_without_instances_are_reported(
    references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = results(tmp_path / "captions.json", CAPTIONS)
    (tmp_path / "instances.json").write_text(json.dumps({**INSTANCES, "images": [{"id": 1}]}))
    command = ["score", captions, references, "--objects", "--instances", str(tmp_path / "instances.json")]
    assert main(command) == 0
    assert "1 of 3 images are not in it (first: image 3)" in capsys.readouterr().out


def test_objects_are_for_english(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(tmp_path / "captions.json", CAPTIONS)
    command = ["score", captions, references, "--objects", "--tokenizer", "characters"]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    assert "CHAIR is missing: CHAIR is defined for the words of English captions" in capsys.readouterr().out
    assert "objects" not in json.loads((tmp_path / "out.json").read_text())


def test_instances_require_objects(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = results(tmp_path / "captions.json", CAPTIONS)
    assert main(["score", captions, references, "--instances", captions]) == 2
    assert "--instances requires --objects" in capsys.readouterr().err
