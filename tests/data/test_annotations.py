"""Lists of captions in all formats: ids, splits, several lines per photo, and what is refused."""

import csv
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.data.builders.annotations import find_annotations, read_annotations
from imgcap_jax.data.builders.folder import scan_folder
from imgcap_jax.data.builders.listed import Row
from imgcap_jax.data.builders.tables import random_split
from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.sources import describe, open_source
from imgcap_jax.errors import UserError
from imgcap_jax.image_ids import hashed_id, id_of_file_name


def read(path: Path) -> dict[str, tuple[str, int, list[str]]]:
    """File name -> split, id and captions, as they are read before any image is looked for."""
    images = read_annotations(*find_annotations(path)).images
    assert len({image.filename for image in images}) == len(images)
    return {image.filename: (image.split, image.image_id, [text for _, text in image.captions]) for image in images}


def lines(folder: Path, rows: list[Any], name: str = "list.jsonl") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return folder


def photos(folder: Path, names: list[str]) -> None:
    """Photos with different pixels."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def refused(path: Path, data_dir: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        prepare(path, data_dir=data_dir, progress=False, name="refused", **options)
    message = str(error.value)
    assert "\n" not in message
    assert not (data_dir / "refused").exists()
    return message


def test_ids_are_those_of_the_list_or_of_the_file_name(tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "captions": ["a dog"], "image_id": 1097},
        {"image": "b.jpg", "captions": ["a dog"], "image_id": "000012"},
        {"image": "c.jpg", "captions": ["a dog"], "id": 13.0},
        {"image": "d.jpg", "captions": ["a dog"]},
        {"image": "COCO_val2014_000000000042.jpg", "captions": ["a dog"]},
    ]
    ids = {name: image_id for name, (_, image_id, _) in read(lines(tmp_path, rows)).items()}
    assert list(ids.values()) == [1097, 12, 13, id_of_file_name("d.jpg"), 42]
    # A photo on top changes no other id.
    rows.insert(0, {"image": "new.jpg", "captions": ["a cat"]})
    changed = read(lines(tmp_path, rows))
    assert ids.items() <= {name: image_id for name, (_, image_id, _) in changed.items()}.items()


def test_one_line_per_caption_is_one_image_per_photo(tmp_path: Path) -> None:
    names = ("a.jpg", "./b.jpg")
    rows = [{"image": name, "caption": f"caption {k} of {name}", "id": 5 * k} for k in range(3) for name in names]
    found = read(lines(tmp_path, rows))
    assert found == {
        name: ("train", id_of_file_name(name), [f"caption {k} of {shown}" for k in range(3)])
        for name, shown in (("a.jpg", "a.jpg"), ("b.jpg", "./b.jpg"))
    }


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\r"])
def test_only_line_feeds_end_lines(end: str, tmp_path: Path) -> None:
    row = f'{{"image": "a.jpg", "captions": ["a red{end}dog"]}}'
    (tmp_path / "list.jsonl").write_bytes(f"{row}\r\n{row.replace('a.jpg', 'b.jpg')}\n".encode())
    photos(tmp_path, ["a.jpg", "b.jpg"])
    assert [image.captions[0][1] for image in scan_folder(tmp_path).images] == ["a red dog"] * 2


def test_kaggle_captions_txt(tmp_path: Path) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["image", "caption"])
    texts = ["A child , in a pink dress .", 'A man says "hello" .', "Two dogs", "line one\nline two"]
    writer.writerows([f"{number}.jpg", text] for number in range(3) for text in texts)
    (tmp_path / "captions.txt").write_text(buffer.getvalue())
    found = read(tmp_path)
    assert [captions for _, _, captions in found.values()] == [texts] * 3
    # The same without a header, and with commas and quotation marks that are not quoted.
    plain = "".join(f'{number}.jpg,"Hi, he said, to 2 dogs\n{number}.jpg,a "b" c, d\n' for number in range(3))
    (tmp_path / "captions.txt").write_text(plain)
    assert [captions for _, _, captions in read(tmp_path).values()] == [['"Hi, he said, to 2 dogs', 'a "b" c, d']] * 3


def test_flickr30k_results_csv_and_token_files(tmp_path: Path) -> None:
    header = "image_name| comment_number| comment\n"
    rows = "".join(f"{number}.jpg| {k}| Dog {number}, {k} .\n" for number in range(60) for k in range(5))
    broken = rows.replace("7.jpg| 4| Dog 7, 4", "7.jpg| 4   Dog 7, 4", 1)  # as one line of the original
    (tmp_path / "results.csv").write_text(header + broken)
    read_from = read_annotations(*find_annotations(tmp_path))
    assert {image.filename: [text for _, text in image.captions] for image in read_from.images} == {
        f"{number}.jpg": [f"Dog {number}, {k} ." for k in range(5 - (number == 7))] for number in range(60)
    }
    (entry,) = read_from.skipped
    assert entry.name.endswith("results.csv line 41")
    (tmp_path / "results.csv").unlink()

    tokens = "".join(f"{number}.jpg#{k}\tDog {number}, {k} .\n" for number in range(4) for k in range(2))
    (tmp_path / "Flickr8k.token.txt").write_text(tokens + "x.jpg.1#0\ta cat\n")
    (tmp_path / "Flickr8k.lemma.token.txt").write_text(tokens)
    for part, name in (("train", "0.jpg\n1.jpg\n"), ("dev", "2.jpg\n"), ("test", "x.jpg\n")):
        (tmp_path / f"Flickr_8k.{part}Images.txt").write_text(name)
    found = read(tmp_path)
    assert {name: split for name, (split, _, _) in found.items()} == {
        "0.jpg": "train",
        "1.jpg": "train",
        "2.jpg": "val",
        "x.jpg": "test",
    }
    assert found["1.jpg"][2] == ["Dog 1, 0 .", "Dog 1, 1 ."]
    assert any(
        "not in any of them, and left out: 1 photo" in note
        for note in read_annotations(*find_annotations(tmp_path)).notes
    )


def test_splits_that_no_file_gives_depend_only_on_the_names(tmp_path: Path) -> None:
    def splits(names: list[str]) -> dict[str, str]:
        (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f"{name},a dog\n" for name in names))
        return {name: split for name, (split, _, _) in read(tmp_path).items()}

    names = [f"{number}.jpg" for number in range(2000)]
    found = splits(names)
    counts = Counter(found.values())
    assert 1740 < counts["train"] < 1860
    assert 70 < counts["val"] < 130
    assert 70 < counts["test"] < 130
    # Other photos, another order: the same splits.
    assert found.items() <= splits([*[f"new {number}.jpg" for number in range(100)], *names[::-1]]).items()
    for count in range(2, 12):  # training needs both splits
        assert {"train", "val"} <= set(splits(names[:count]).values())
    assert "5% are val, 5% test" in read_annotations(*find_annotations(tmp_path)).notes[0]
    (tmp_path / "captions.txt").write_text("image,caption,split\na.jpg,a dog,validation\nb.jpg,a dog,train\n")
    assert {name: split for name, (split, _, _) in read(tmp_path).items()} == {"a.jpg": "val", "b.jpg": "train"}


@pytest.mark.parametrize("form", ["{:012d}.jpg", "images/{:012d}.jpg", "train2014/COCO_train2014_{:012d}.jpg"])
def test_numbers_in_names_are_not_a_split(form: str) -> None:
    split_of = random_split(rows := [Row(form.format(number), ("a dog",), "") for number in range(1000)])
    counts = Counter(map(split_of, rows))
    assert 850 < counts["train"] < 950
    assert 25 < counts["val"] < 80
    assert 25 < counts["test"] < 80


def test_rows_without_a_split_are_reported(tmp_path: Path) -> None:
    table = "image,caption,split\na.jpg,a dog,val\nb.jpg,a dog,\nc.jpg,a dog,train\nd.jpg,a dog,\n"
    (tmp_path / "captions.txt").write_text(table)
    found = read_annotations(tmp_path, [tmp_path / "captions.txt"])
    assert [image.split for image in found.images] == ["val", "train", "train", "train"]
    assert f"2 rows of 4 without a split: train (first: {tmp_path / 'captions.txt'} line 3)" in found.notes[0]
    (tmp_path / "captions.txt").write_text(table.replace(",\n", ",train\n"))
    assert read_annotations(tmp_path, [tmp_path / "captions.txt"]).notes == ()


def test_captions_in_a_cell(tmp_path: Path) -> None:
    """As in the table of Flickr30k at Hugging Face (JSON), and as pandas writes a list."""
    file = tmp_path / "flickr_annotations_30k.csv"
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    texts = ['Two young guys, "outside"', "It's a \U0001f436"]
    writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
    writer.writerow([json.dumps(texts), "[0, 1]", "train", "1.jpg", 7])
    writer.writerow([repr(texts), "[2, 3]", "val", "2.jpg", 8])
    writer.writerow(['["not a list" of texts]', "[4]", "val", "3.jpg", 9])
    file.write_text(buffer.getvalue())
    assert read(tmp_path) == {
        "1.jpg": ("train", 7, texts),
        "2.jpg": ("val", 8, texts),
        "3.jpg": ("val", 9, ['["not a list" of texts]']),
    }


@pytest.mark.parametrize("separator", [",", "|", "\t"])
def test_a_number_before_the_caption_is_not_part_of_it(separator: str, tmp_path: Path) -> None:
    rows = [["a.jpg", "0", f"a dog{separator} runs"], ["a.jpg", "1", "a cat"], ["b.jpg", "broken"]]
    (tmp_path / "captions.txt").write_text("".join(separator.join(row) + "\n" for row in rows))
    assert [captions for _, _, captions in read(tmp_path).values()] == [[rows[0][2], "a cat"]]
    (tmp_path / "captions.txt").write_text(f"a.jpg{separator}2{separator} dogs\na.jpg{separator}a cat\n")
    assert [captions for _, _, captions in read(tmp_path).values()] == [[f"2{separator} dogs", "a cat"]]


def test_a_key_without_a_value_does_not_hide_another(tmp_path: Path) -> None:
    row = {"image": None, "file_name": "a.jpg", "captions": None, "caption": "a dog", "text": "a cat"}
    assert [captions for _, _, captions in read(lines(tmp_path, [row])).values()] == [["a dog"]]


def test_computed_ids_that_collide(tmp_path: Path) -> None:
    """Names of 12 digits are COCO's only if they are unique in the dataset."""
    names = ["cam1/000000000001.jpg", "cam2/000000000001.jpg", "cam1/000000000002.jpg", "3.jpg", "000000000003.jpg"]
    rows: list[dict[str, Any]] = [{"image": name, "caption": "a dog"} for name in names]
    rows[3]["image_id"] = 3  # ids that the file gives are never changed
    expected = [hashed_id(names[0]), hashed_id(names[1]), 2, 3, hashed_id(names[4])]
    for order in (rows, rows[::-1]):
        ids = {name: image_id for name, (_, image_id, _) in read(lines(tmp_path, order)).items()}
        assert [ids[name] for name in names] == expected
    images = [
        {"filename": "000000000001.jpg", "filepath": f"cam{n}", "split": "val", "sentences": [{"raw": "a dog"}]}
        for n in (1, 2)
    ]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    found = read_annotations(tmp_path, [tmp_path / "dataset_x.json"]).images
    assert [image.image_id for image in found] == expected[:2]


def test_paths_of_windows(tmp_path: Path) -> None:
    photos(tmp_path, ["cam1/a.jpg", "cam2/a.jpg", "cam2/b\\c.jpg"])
    rows = [{"image": name, "caption": "a dog"} for name in ("cam1\\a.jpg", "cam2\\a.jpg", "cam2/b\\c.jpg")]
    contents = scan_folder(lines(tmp_path, rows))
    assert contents.absent == ()
    assert [path.relative_to(tmp_path).as_posix() for path in contents.paths] == [
        "cam1/a.jpg",
        "cam2/a.jpg",
        "cam2/b\\c.jpg",
    ]
    outside = scan_folder(lines(tmp_path / "cam1", [{"image": "..\\cam2\\a.jpg", "caption": "a dog"}]))
    assert "outside of" in outside.absent[0].reason


def test_captions_of_emoji_only_are_named_once(tmp_path: Path) -> None:
    photos(tmp_path, ["a.jpg", "b.jpg"])
    rows = [{"image": name, "caption": "😀", "split": split} for name, split in (("a.jpg", "train"), ("b.jpg", "val"))]
    message = refused(lines(tmp_path, rows), tmp_path / "data")
    assert message.count("a.jpg") == 1
    assert "a.jpg caption 0 (caption without a word)" in message


def test_hugging_face_image_folders(
    tmp_path: Path,
) -> None:
    for split in ("train", "validation", "test"):
        rows = [{"file_name": f"{number}.jpg", "text": f"{split} {number}"} for number in range(2)]
        lines(tmp_path / "below", rows, f"{split}/metadata.jsonl")
    assert {name: (split, captions) for name, (split, _, captions) in read(tmp_path / "below").items()} == {
        f"{folder}/{number}.jpg": (split, [f"{folder} {number}"])
        for folder, split in (("train", "train"), ("validation", "val"), ("test", "test"))
        for number in range(2)
    }
    rows = [{"file_name": f"{split}/1.jpg", "text": "a dog"} for split in ("train", "validation")]
    above = read(lines(tmp_path / "above", rows, "metadata.jsonl"))
    assert [split for split, _, _ in above.values()] == ["train", "val"]
    (tmp_path / "table" / "train").mkdir(parents=True)
    (tmp_path / "table" / "train" / "metadata.csv").write_text('file_name,text\n1.jpg,"a dog, running"\n')
    assert read(tmp_path / "table") == {"train/1.jpg": ("train", id_of_file_name("train/1.jpg"), ["a dog, running"])}


def test_blip_lists(tmp_path: Path) -> None:
    train = [
        {"caption": f"dog {k}", "image": f"val2014/COCO_val2014_{number:012d}.jpg", "image_id": f"coco_{number}"}
        for number in (522418, 7)
        for k in range(2)
    ]
    val = [{"image": "val2014/COCO_val2014_000000184613.jpg", "caption": ["a dog", "the dog"]}]
    (tmp_path / "coco_karpathy_train.json").write_text(json.dumps(train))
    (tmp_path / "coco_karpathy_val.json").write_text(json.dumps(val))
    assert list(read(tmp_path).values()) == [
        ("train", 522418, ["dog 0", "dog 1"]),
        ("train", 7, ["dog 0", "dog 1"]),
        ("val", 184613, ["a dog", "the dog"]),
    ]


def test_a_file_of_lines_for_each_split(tmp_path: Path) -> None:
    for name in ("train", "val"):
        lines(tmp_path, [{"image": f"{name}.jpg", "caption": "a dog"}], f"{name}.jsonl")
    assert [split for split, _, _ in read(tmp_path).values()] == ["train", "val"]


def test_other_files_next_to_karpathys_json_are_not_read(tmp_path: Path) -> None:
    sentences = [{"raw": "a dog"}]  # sentid is optional
    images = [{"filename": "a.jpg", "split": "val", "sentences": sentences, "imgid": 3}]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    (tmp_path / "captions.txt").write_text("image,caption\nb.jpg,a cat\n")
    assert read(tmp_path) == {"a.jpg": ("val", 3, ["a dog"])}


def test_a_missing_split_is_reported(tmp_path: Path) -> None:
    photos(tmp_path, ["a.jpg"])
    said: list[str] = []
    lines(tmp_path, [{"image": "a.jpg", "captions": ["a dog"]}])
    prepare(tmp_path, name="one", data_dir=tmp_path / "data", progress=False, say=said.append)
    assert any('no split val, which training needs; write "split"' in line for line in said)
    assert describe("one", tmp_path / "data").splits == {"train": 1}


DEEP = "[" * 100_000 + "]" * 100_000
WRONG_LINES = {
    "not JSON": ('{"image": "a.jpg", ', r"line 2: not valid JSON \(.* at column"),
    "deep": ('{"image": "a.jpg", "captions": ' + DEEP + "}", "line 2: not valid JSON .nested too deeply"),
    "long number": ('{"image": "a.jpg", "image_id": ' + "1" * 5000 + "}", "line 2: not valid JSON .a number has more"),
    "large id": ({"image_id": 2**63}, "line 2: image_id 9223372036854775808 is not between 0 and 2^63 - 1"),
    "negative id": ({"image_id": -1}, "line 2: image_id -1 is not between"),
    "NaN id": ('{"image": "b.jpg", "captions": ["x"], "image_id": NaN}', "line 2: image_id nan is not an integer"),
    "text id": ({"image_id": "cat"}, "line 2: image_id 'cat' is not an integer"),
    "half a name": ({"image": "b\ud83d.jpg"}, r"line 2: the file name b\\ud83d\.jpg contains a lone surrogate"),
    "same id": ({"image_id": 5}, "line 2: image id 5 is listed twice, for a.jpg and b.jpg"),
    "two ids": ({"image": "a.jpg", "image_id": 6}, "line 2: a.jpg has the image_id 6, but 5 in .* line 1"),
    "split": ({"split": "my/val"}, "line 2: b.jpg has the split 'my/val'"),
    "captions": ({"captions": [3]}, "line 2: 'captions' must be a list of strings"),
    "no captions": ('{"image": "b.jpg"}', "line 2: key 'captions' .or 'caption' or 'text'. is missing"),
    "no object": ("[]", "line 2: expected an object, found list"),
}


@pytest.mark.parametrize("wrong", WRONG_LINES)
def test_a_wrong_line_is_named(wrong: str, tmp_path: Path) -> None:
    line, words = WRONG_LINES[wrong]
    if isinstance(line, dict):
        line = {"image": "b.jpg", "captions": ["a dog"], **line}
    path = lines(tmp_path, [{"image": "a.jpg", "captions": ["a dog"], "image_id": 5}, line])
    limit = sys.getrecursionlimit()
    with pytest.raises(UserError, match=words.replace("^", r"\^")) as error:
        read(path)
    assert sys.getrecursionlimit() == limit
    assert "\n" not in str(error.value)


def test_all_wrong_lines_are_listed(tmp_path: Path) -> None:
    rows: list[Any] = [{"image": f"{number}.jpg", "captions": ["a dog"]} for number in range(40)]
    rows[3::4] = ["{"] * 10
    message = refused(lines(tmp_path, rows), tmp_path / "data")
    report = tmp_path / "data" / "refused_problems.txt"
    assert "10 entries cannot be read: " in message
    assert "list.jsonl line 4: not valid JSON" in message
    assert message.endswith(f"all are listed in {report}")
    listed = report.read_text().splitlines()
    assert all(f"line {number}: not valid" in line for number, line in zip(range(4, 41, 4), listed, strict=True))


def test_wrong_tables(tmp_path: Path) -> None:
    for text, words in (
        ("hello\n", "line 1: no column of captions"),
        ("name,words\na.jpg,a dog\n", "line 1: neither a header"),
        ("image,words\na.jpg,a dog\n", "line 1: no column of captions; call it one of: caption"),
        ("image,caption,image_id\na.jpg,a dog,cat\n", "line 2: image_id 'cat' is not an integer; write a number, or"),
        ("image,caption\n", "lists no images"),
    ):
        (tmp_path / "captions.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            read(tmp_path)
    os.mkfifo(tmp_path / "b.csv")
    (tmp_path / "captions.txt").unlink()
    with pytest.raises(UserError, match="is a pipe or a device"):
        read(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    photos(folder, ["a.jpg"])
    rows = [{"image": "a.jpg", "caption": "a dog"}]
    assert r"caf\xe9: the name is not UTF-8; rename the file or folder" in refused(
        lines(folder, rows), tmp_path / "data"
    )
    folder = folder.rename(tmp_path / "cafe")
    (folder / "list.jsonl").rename(folder / os.fsdecode(b"\xe9.jsonl"))
    prepare(folder, name="named", data_dir=tmp_path / "data", progress=False)
    assert len(open_source("named", "train", tmp_path / "data")) == 1


def test_ids_in_karpathys_and_cocos_json(tmp_path: Path) -> None:
    images = [{"id": 2**63, "file_name": "a.jpg"}]
    annotations = [{"image_id": 2**63, "caption": "a dog"}]
    file = tmp_path / "captions_train2014.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    with pytest.raises(UserError, match=r"annotations\[0\]: image_id 9223372036854775808 is not between"):
        read(tmp_path)
    images, annotations = [{"id": "07", "file_name": "a.jpg"}], [{"image_id": 7.0, "caption": "a dog"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert read(tmp_path) == {"a.jpg": ("train", 7, ["a dog"])}
    file.write_text(DEEP)
    with pytest.raises(UserError, match=r"train2014\.json: not valid JSON \(nested too deeply"):
        read(tmp_path)


def _every_format(folder: Path) -> dict[Path, bytes]:
    names = [f"{number}.jpg" for number in range(4)]
    rows = [{"image": name, "captions": ["a dog", "the dog"], "split": "val", "image_id": 5} for name in names]
    karpathy = [{"filename": name, "imgid": 3, "split": "val", "sentences": [{"raw": "a dog"}]} for name in names]
    annotations = [{"id": 1, "image_id": number, "caption": "a dog"} for number in range(4)]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(4)]
    texts = {
        "list.jsonl": "\n".join(map(json.dumps, rows)),
        "dataset_x.json": json.dumps({"images": karpathy}),
        "captions_val.json": json.dumps({"images": images, "annotations": annotations}),
        "coco_karpathy_val.json": json.dumps([{"image": name, "caption": "a dog"} for name in names]),
        "captions.txt": "image,caption\n" + "".join(f'{name},"a dog, runs"\n' for name in names),
        "results.csv": "image_name| comment_number| comment\n" + "".join(f"{name}| 0| a dog\n" for name in names),
        "a.token.txt": "".join(f"{name}#0\ta dog\n" for name in names),
    }
    return {folder / name: text.encode() for name, text in texts.items()}


def test_damaged_lists_give_one_line(tmp_path: Path) -> None:
    inserted = [
        b"NaN",
        b"1" * 5000,
        b'"\\ud83d"',
        b"-1",
        b"1e400",
        b"[" * 3000,
        b"\n",
        b'"',
        b"\0",
        b"\xff",
        b"../",
        b"|",
    ]
    formats = _every_format(tmp_path)
    messages = 0
    for seed in range(400):
        random = Random(seed)
        path = random.choice(list(formats))
        content = bytearray(formats[path])
        at = random.randrange(len(content))
        kind = random.choice(["cut", "flip", "insert", "replace"])
        if kind == "cut":
            del content[at:]
        elif kind == "flip":
            content[at] ^= 1 << random.randrange(8)
        else:
            content[at : at + (kind == "replace") * random.randrange(9)] = random.choice(inserted)
        path.write_bytes(content)
        message = ""
        try:
            scan_folder(path)
        except UserError as error:
            message = str(error)
        assert "\n" not in message, seed
        assert not message or str(path) in message, seed
        messages += bool(message)
    assert messages > 100


def test_captions_that_cannot_be_used(tmp_path: Path) -> None:
    """Up to 1 % are skipped and listed. A lone surrogate is removed, and the caption is kept."""
    names = [f"{number}.jpg" for number in range(60)]
    photos(tmp_path, names)
    rows = [{"image": name, "captions": ["a dog", "the dog"] * 5} for name in names]
    for number, text in enumerate(("...", "😀", " ", None, "。", "a red dog \ud83d")):
        rows[number]["captions"][9] = text
    data_dir = tmp_path / "data"
    prepare(lines(tmp_path, rows), name="odd", data_dir=data_dir, progress=False)
    skipped = {entry.name: entry.reason for entry in describe("odd", data_dir).skipped}
    assert list(skipped.values()) == [
        "caption without a word",
        "caption without a word",
        "empty caption",
        "empty caption",
        "caption without a word",
        "a lone surrogate was removed",
    ]
    source = open_source("odd", "train", data_dir)
    assert [len(source.captions(i)) for i in range(7)] == [9, 9, 9, 9, 9, 10, 10]
    assert source.captions(5)[9] == "a red dog"
    for number in range(10, 12):
        rows[number]["captions"][9] = "!"
    message = refused(lines(tmp_path, rows), data_dir)
    assert "more than 1% of its 600 captions cannot be used (7): 0.jpg caption 9 (caption without a word)" in message
    report = (data_dir / "refused_problems.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in report] == [
        f"{i}.jpg caption {10 * i + 9}" for i in (0, 1, 2, 3, 4, 10, 11)
    ]


def test_one_refusal_lists_all_problems(tmp_path: Path) -> None:
    """Broken and missing images, wordless captions and repeated photos, however many there are, in one pass."""
    names = [f"{number:03d}.jpg" for number in range(200)]
    photos(tmp_path, names)
    broken, missing = names[20:200:30], names[5:200:40]
    for name in broken:
        (tmp_path / name).write_bytes(b"<html>")
    for name in missing:
        (tmp_path / name).unlink()
    rows: list[Any] = [
        {"image": name, "captions": ["a dog"], "split": "val" if i > 150 else "train"} for i, name in enumerate(names)
    ]
    rows[3]["captions"].append("?")
    rows.append({"image": names[0], "captions": ["a dog"], "split": "val"})
    data_dir = tmp_path / "data"
    message = refused(lines(tmp_path, rows), data_dir)
    assert f"5 of its 201 images cannot be read: {missing[0]} (not found), " in message
    assert f"more than 1% of its 201 images cannot be used (6): {broken[0]} (" in message
    assert "1 photo listed more than once: 000.jpg (in train and in val)" in message
    report = data_dir / "refused_problems.txt"
    assert str(report) in message
    listed = [line.split("\t")[0] for line in report.read_text().splitlines()]
    assert listed == [*missing, names[0], *broken, "003.jpg caption 4"]
    # After everything is corrected, the list of problems is removed.
    photos(tmp_path, names)
    del rows[-1]
    prepare(lines(tmp_path, rows), name="refused", data_dir=data_dir, progress=False)
    assert not report.exists()


def test_pictures_that_are_also_in_another_split(tmp_path: Path) -> None:
    """Copies under other names are kept, because a check of learning by heart needs them, but they are reported."""
    names = [f"{number}.jpg" for number in range(400)]
    photos(tmp_path, names)
    rows = [
        {"image": name, "captions": ["a dog"], "split": "val" if i < 100 else "train"} for i, name in enumerate(names)
    ]
    data_dir = tmp_path / "data"
    (tmp_path / "0.jpg").write_bytes((tmp_path / "300.jpg").read_bytes())
    (tmp_path / "350.jpg").write_bytes((tmp_path / "351.jpg").read_bytes())  # within a split, which is harmless
    said: list[str] = []
    prepare(lines(tmp_path, rows), name="copies", data_dir=data_dir, progress=False, say=said.append)
    (entry,) = describe("copies", data_dir).skipped
    assert (entry.name, entry.reason) == ("300.jpg", "in train, is the same image as 0.jpg in val")
    assert "note: 1 image in two splits under different names (300.jpg, in train, is the same" in "\n".join(said)
    assert describe("copies", data_dir).splits["train"] == 300


def test_images_outside_of_the_folder_and_devices_are_refused(tmp_path: Path) -> None:
    folder, data_dir = tmp_path / "mine", tmp_path / "data"
    photos(tmp_path, ["secret/secret.jpg", "mine/a.jpg", "mine/below/b.jpg"])
    (folder / "link.jpg").symlink_to(tmp_path / "secret" / "secret.jpg")
    (folder / "photos").symlink_to(tmp_path / "secret")
    (folder / "inside.jpg").symlink_to("below/b.jpg")
    os.mkfifo(folder / "pipe.jpg")
    os.link(tmp_path / "secret" / "secret.jpg", folder / "hard.jpg")
    for name in ("link.jpg", "photos/secret.jpg"):
        message = refused(lines(folder, [{"image": name, "captions": ["a dog"]}]), data_dir)
        assert f"{name} (a link to outside of {folder.resolve()});" in message
        assert message.endswith(f"with files in place of links: cp -rL {folder} COPY")
    for name in ("../secret/secret.jpg", str(tmp_path / "secret" / "secret.jpg")):
        message = refused(lines(folder, [{"image": name, "captions": ["a dog"]}]), data_dir)
        assert f"{name} (outside of {folder.resolve()}; copy it into this folder)" in message
    for name in ("pipe.jpg", "/dev/zero"):
        message = refused(lines(folder, [{"image": name, "captions": ["a dog"]}]), data_dir)
        assert f"{name} (a pipe or a device, not an image)" in message
    for name in ("x" * 5000 + ".jpg", "a\0b.jpg", "new\nline.jpg"):
        assert "(not found)" in refused(lines(folder, [{"image": name, "captions": ["a dog"]}]), data_dir)
    # Paths that stay inside are accepted, however they are written.
    inside = ["below/../a.jpg", str(folder / "below" / "b.jpg"), "hard.jpg"]
    prepare(
        lines(folder, [{"image": name, "captions": ["a dog"]} for name in inside]),
        name="inside",
        data_dir=data_dir,
        progress=False,
    )
    assert len(open_source("inside", "train", data_dir)) == 3
    twice = [{"image": name, "captions": ["a dog"]} for name in ("inside.jpg", "below/b.jpg")]
    assert "1 photo listed more than once: below/b.jpg (listed twice, with the ids" in refused(
        lines(folder, twice), data_dir
    )
