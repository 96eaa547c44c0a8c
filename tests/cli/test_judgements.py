"""The command ``imgcap score --judgements``."""

import json
import re
from pathlib import Path

import pytest

from imgcap_jax.cli.main import main

IMAGES = 55


@pytest.fixture
def references(tmp_path: Path) -> str:
    """One reference per image, of twelve words that no other image has."""
    path = tmp_path / "references.json"
    images = [{"id": image, "file_name": f"photos/img{image:02}.jpg"} for image in range(IMAGES)]
    annotations = [{"image_id": image, "caption": reference(image)} for image in range(IMAGES)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


def reference(image: int) -> str:
    return " ".join(f"w{image}x{place}" for place in range(12))


def caption(image: int, correct: int) -> str:
    """Twelve words, the first of which are those of the reference: BLEU-1 is the share of these."""
    words = reference(image).split()
    return " ".join([*words[:correct], *["other"] * (12 - correct)])


def table(tmp_path: Path, rows: list[str], header: str = "image,caption,rating", end: str = "\n") -> str:
    path = tmp_path / "ratings.csv"
    path.write_bytes(end.join([header, *rows, ""]).encode())
    return str(path)


def test_a_metric_that_orders_captions_as_the_ratings_do(
    references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        f'img{image:02}.jpg,"{caption(image, 1 + (image + k) % 4)}",{1 + (image + k) % 4}'
        for image in range(IMAGES)
        for k in (0, 1)
    ]
    ratings = table(tmp_path, [*rows, f"0,{reference(0).upper()} .,4"])
    out = tmp_path / "out.json"
    assert main(["score", "--judgements", ratings, references, "--bootstrap", "20", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "110 pairs of an image and a caption, 110 ratings from 1 to 4, 55 images; 1 pair left out" in shown
    assert re.search(r"^rating, tau x100 +tau-b", shown, re.MULTILINE)
    assert re.search(r"^BLEU-1 +\+100.0 +\+100.0 to \+100.0 +\+100.0 +.* BLEU:closest$", shown, re.MULTILINE)
    assert "mean rating" not in shown
    assert ":idf=references.json-55-" in shown
    assert not re.search("^warning", shown, re.MULTILINE)
    document = json.loads(out.read_text())
    assert document["excluded_pairs"] == 1
    assert document["each_rating"]["BLEU-1"]["tau_b"]["value"] == pytest.approx(1)
    assert document["pairs"][0]["scores"]["BLEU-1"] == pytest.approx(1 / 12, abs=1e-6)
    assert document["pairs"][0]["ratings"] == [1]


def test_several_ratings_ids_tabs_and_objects(
    references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{image}\t{caption(image, image % 3)}\t{rating}" for image in range(6) for rating in (1 + image % 3, 2)]
    ratings = table(tmp_path, [*rows, "", "9999\tsome text\t1"], "Image\tCaption\tRating", end="\r\n")
    out = tmp_path / "out.json"
    command = ["score", "--judgements", ratings, references, "--objects", "--bootstrap", "20", "--json", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "6 pairs of an image and a caption, 12 ratings from 1 to 3, 6 images; 0 pairs left out" in shown
    assert "each rating, tau x100" in shown
    assert re.search(r"^CHAIRs +- +- +- +- +CHAIR:objects=references$", shown, re.MULTILINE)
    assert (
        "(first: '9999' in line 15, which is neither an id nor a file name there); their ratings are omitted" in shown
    )
    assert "with 6 images the intervals are not reliable" in shown
    document = json.loads(out.read_text())
    each = document["each_rating"]["BLEU-1"]["tau_b"]["value"]
    assert 0 < each < document["mean_rating"]["BLEU-1"]["tau_b"]["value"]
    assert document["mean_rating"]["BLEU-1"]["tau_b"]["value"] == pytest.approx(1)
    assert document["each_rating"]["CHAIRi"]["tau_c"] == {"value": None, "low": None, "high": None}


def test_instances_of_the_rated_images(references: str, tmp_path: Path) -> None:
    instances = tmp_path / "instances.json"
    categories = [{"id": 1, "name": "dog"}]
    annotations = [{"image_id": image, "category_id": 1} for image in range(0, IMAGES, 2)]
    images = [{"id": image} for image in range(IMAGES)]
    instances.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    ratings = table(tmp_path, [f"{image},a dog,{image % 2}" for image in range(IMAGES - 2, -1, -1)])
    out = tmp_path / "out.json"
    command = ["score", "--judgements", ratings, references, "--objects", "--instances", str(instances)]
    assert main([*command, "--bootstrap", "5", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["each_rating"]["CHAIRi"]["tau_b"]["value"] == pytest.approx(1)
    assert document["each_rating"]["object recall"]["tau_b"]["value"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1,a dog,4", "1,a cat,good"], "line 3: the rating 'good' is not a number"),
        (["1,a dog,4", '1,"a cat\nwith a hat",4', "1,a cow,nan"], "line 5: the rating 'nan' is not a number"),
        (['1,"a\ncat",x'], "line 2: the rating 'x' is not a number"),
        (["1,a dog, and a cat,4"], "line 2 has 4 columns, the header has 3: put captions with ',' in double quotes"),
        (["1,a dog"], "line 2 has 2 columns"),
        (["1,,4"], "line 2 has no caption"),
        ([",a dog,4"], "line 2 has no image"),
        ([], "has no ratings"),
        (["x.jpg,a dog,4"], "1 image without references in"),
        ([f"1,{reference(1)},4"], "all captions are references of their images"),
    ],
)
def test_bad_rows(
    rows: list[str], message: str, references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", "--judgements", table(tmp_path, rows), references]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "ratings.csv" in error
    assert error.count("\n") == 1


def test_a_header_without_a_column(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratings = table(tmp_path, ["1,a dog,4"], "image,caption,score")
    assert main(["score", "--judgements", ratings, references]) == 2
    assert "ratings.csv line 1: no column 'rating': expected a header" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--compare", "--training", "--samples"])
def test_options_without_effect(
    option: str, references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratings = table(tmp_path, ["1,a dog,4"])
    assert main(["score", "--judgements", ratings, references, option, references]) == 2
    assert f"{option} has no effect with --judgements" in capsys.readouterr().err


def test_the_output_must_not_be_an_input(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratings = table(tmp_path, ["1,a dog,4"])
    assert main(["score", "--judgements", ratings, references, "--json", ratings]) == 2
    assert "is one of the input files" in capsys.readouterr().err
