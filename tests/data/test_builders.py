"""Preparing folders and scenes: the dataset equals its input, and every mistake is reported."""

import errno
import fcntl
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.data import staging
from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.scenes.builder import SceneSplits
from imgcap_jax.data.scenes.world import Scene, draw_scene
from imgcap_jax.data.sources import check_dataset, describe, find_prepared, open_source
from imgcap_jax.errors import UserError


def encoded(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def karpathy(images: list[dict[str, Any]]) -> str:
    return json.dumps({"dataset": "x", "images": images})


def entry(number: int, split: str = "train", captions: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "filename": f"{number}.jpg",
        "imgid": number,
        "split": split,
        "sentences": [
            # Tokens unrelated to the sentence, so that the tests fail if they are read.
            {"raw": raw, "sentid": 10 * number + k, "tokens": ["tokens", "never", "read"]}
            for k, raw in enumerate(captions or (f"A dog, number {number}.", f"Dog {number}"))
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """150 images: 100 train, 30 restval, 20 val, with a Karpathy JSON."""
    folder = tmp_path / "my photos"
    (folder / "images").mkdir(parents=True)
    splits = ["train"] * 100 + ["restval"] * 30 + ["val"] * 20
    for number in range(len(splits)):
        (folder / "images" / f"{number}.jpg").write_bytes(encoded(number))
    entries = [entry(number, split) for number, split in enumerate(splits)]
    (folder / "dataset_x.json").write_text(karpathy(entries))
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def quietly(path: Path | str, data_dir: Path, **options: Any) -> Path:
    return prepare(path, data_dir=data_dir, progress=False, **options)


def test_karpathy_folder_is_stored_unchanged(folder: Path, data_dir: Path) -> None:
    quietly(folder, data_dir, licence="CC0")
    train, val = open_source("my_photos", "train", data_dir), open_source("my_photos", "val", data_dir)
    assert (len(train), len(val)) == (130, 20)  # restval belongs to train
    assert sorted(train.image_ids()) == list(range(130))
    for example in (train[0], train[129], val[3]):
        assert example.image == (folder / "images" / example.filename).read_bytes()
        number = example.image_id
        assert example.filename == f"{number}.jpg"
        assert example.captions == (f"A dog, number {number}.", f"Dog {number}")
    dataset = describe("my_photos", data_dir)
    assert dataset.splits == {"train": 130, "val": 20}
    assert (dataset.source, dataset.licence) == (str(folder), "CC0")


def test_the_features_equal_those_of_coco_captions(folder: Path, data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    prepared = quietly(folder, data_dir)
    example = tfds.builder_from_directory(prepared).as_data_source("val")[0]
    assert set(example) == {"image", "image/filename", "image/id", "captions"}
    assert example["image"].shape == (12, 16, 3)
    assert example["captions"]["id"][1] == 10 * example["image/id"] + 1


def test_coco_json_and_jsonl_give_the_same(folder: Path, tmp_path: Path, data_dir: Path) -> None:
    (folder / "dataset_x.json").unlink()
    (folder / "annotations").mkdir()
    below = folder / "images" / "deep"
    below.mkdir()
    (folder / "images" / "7.jpg").rename(below / "7.jpg")
    for split, numbers in (("train2014", range(5, 9)), ("validation", range(3))):
        captions = {
            "images": [{"id": 100 + number, "file_name": f"{number}.jpg"} for number in numbers],
            # In another order than the images, and two per image.
            "annotations": [
                {"id": 2 * number + k, "image_id": 100 + number, "caption": f" Caption {number} {k}\n"}
                for k in range(2)
                for number in reversed(numbers)
            ],
        }
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(captions))
    quietly(folder, data_dir, name="as_coco")
    lines = [
        json.dumps({"image": f"images/{'deep/' * (number == 7)}{number}.jpg", "split": split}
                   | {"captions": [f"Caption {number} {k}" for k in range(2)]})
        for split, numbers in (("train", range(5, 9)), ("val", range(3)))
        for number in numbers
    ]  # fmt: skip
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n\n")
    quietly(folder / "list.jsonl", data_dir, name="as_lines")
    for split in ("train", "val"):
        coco, rows = open_source("as_coco", split, data_dir), open_source("as_lines", split, data_dir)
        assert len(coco) == len(rows) == {"train": 4, "val": 3}[split]
        for a, b in zip(coco, rows, strict=True):
            assert (a.image, a.captions) == (b.image, b.captions)
            assert len(a.captions) == 2
    assert open_source("as_coco", "train", data_dir)[2].image_id == 107
    assert open_source("as_coco", "train", data_dir)[2].image == (below / "7.jpg").read_bytes()


def test_other_formats_become_png(tmp_path: Path, data_dir: Path) -> None:
    kinds = {"a.gif": "GIF", "b.bmp": "BMP", "c.webp": "WEBP", "d.png": "PNG", "e.JPG": "JPEG"}
    lines = []
    for number, (name, kind) in enumerate(kinds.items()):
        (tmp_path / name).write_bytes(encoded(number, kind))
        lines.append(json.dumps({"image": name, "captions": ["A dog"]}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    quietly(tmp_path, data_dir, name="mixed")
    for example in open_source("mixed", "train", data_dir):
        original = (tmp_path / example.filename).read_bytes()
        if example.filename in ("d.png", "e.JPG"):
            assert example.image == original
        else:
            assert example.image.startswith(b"\x89PNG")
            # Compared in RGB, because a GIF has a palette.
            pixels, expected = (
                np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (example.image, original)
            )
            np.testing.assert_array_equal(pixels, expected)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_few_bad_images_and_captions_are_skipped_and_listed(folder: Path, data_dir: Path) -> None:
    truncate(folder / "images" / "3.jpg")  # the header is intact; only decoding fails
    listed = json.loads((folder / "dataset_x.json").read_text())
    listed["images"][5]["sentences"][0]["raw"] = "  "
    (folder / "dataset_x.json").write_text(json.dumps(listed))
    said: list[str] = []
    prepared = quietly(folder, data_dir, say=said.append)
    source = open_source("my_photos", "train", data_dir)
    assert len(source) == 129
    assert 3 not in source.image_ids()
    assert source.captions(source.image_ids().index(5)) == ("Dog 5",)
    skipped = {entry.name: entry.reason for entry in describe("my_photos", data_dir).skipped}
    assert set(skipped) == {"3.jpg", "5.jpg caption 50"}
    assert "truncated" in skipped["3.jpg"]
    assert any("2 images or captions skipped" in line and str(prepared / "skipped.json") in line for line in said)


def edit(folder: Path, change: Any) -> None:
    listed = json.loads((folder / "dataset_x.json").read_text())
    change(listed)
    (folder / "dataset_x.json").write_text(json.dumps(listed))


def break_images(folder: Path) -> None:
    for number in (3, 4, 120):
        truncate(folder / "images" / f"{number}.jpg")


def empty_captions(folder: Path) -> None:
    def change(listed: dict[str, Any]) -> None:
        for image in listed["images"][:4]:
            image["sentences"][0]["raw"] = ""

    edit(folder, change)


MISTAKES = {
    "over 1 % of images": (break_images, ["more than 1% of its 150 images", "3.jpg", "truncated"]),
    "over 1 % of captions": (empty_captions, ["more than 1% of its 300 captions", "0.jpg caption 0"]),
    "absent": (lambda f: (f / "images" / "7.jpg").unlink(), ["7.jpg (not found)", "1 of its 150 images"]),
    "no sentences": (
        lambda f: edit(f, lambda x: x["images"][2].pop("sentences")),
        ["dataset_x.json: images[2]", "'sentences'", "missing"],
    ),
    "no raw": (
        lambda f: edit(f, lambda x: x["images"][2]["sentences"][1].pop("raw")),
        ["images[2]: sentences[1]", "'raw'", "missing"],
    ),
    "raw not text": (
        lambda f: edit(f, lambda x: x["images"][2]["sentences"][1].update(raw=5)),
        ["sentences[1]", "'raw' must be str, found int"],
    ),
    "not json": (
        lambda f: (f / "dataset_x.json").write_text('{"images": ['),
        ["dataset_x.json", "not valid"],
    ),
    "no image listed": (lambda f: edit(f, lambda x: x.update(images=[])), ["dataset_x.json", "no image"]),
    "listed twice": (lambda f: edit(f, lambda x: x["images"][1].update(imgid=0)), ["id 0", "1.jpg", "twice"]),
    "odd split": (lambda f: edit(f, lambda x: x["images"][1].update(split="my/val")), ["1.jpg", "'my/val'"]),
    "no annotations": (lambda f: (f / "dataset_x.json").unlink(), ["no annotation file", "*.jsonl"]),
    "two lists": (
        lambda f: (f / "list.jsonl").write_text("{}"),
        ["several annotation files", "dataset_x.json", "list.jsonl"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_in_one_line_and_leaves_no_files(mistake: str, folder: Path, data_dir: Path) -> None:
    make, parts = MISTAKES[mistake]
    make(folder)
    with pytest.raises(UserError) as error:
        quietly(folder, data_dir)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    left = list(data_dir.iterdir()) if data_dir.exists() else []
    assert left == ([data_dir / "my_photos_problems.txt"] if "listed in" in message else [])


def test_a_missing_folder_and_invalid_names_are_refused(folder: Path, data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        quietly(folder / "nowhere", data_dir)
    with pytest.raises(UserError, match=r"'../x' cannot name a dataset"):
        quietly(folder, data_dir, name="../x")
    with pytest.raises(UserError, match=r"'scenes' cannot name a dataset"):
        quietly(folder, data_dir, name="scenes")


def test_preparing_again_does_nothing_until_something_changes(folder: Path, data_dir: Path) -> None:
    said: list[str] = []
    prepared = quietly(folder, data_dir)
    records = next(prepared.glob("*-val.array_record*"))
    before = records.stat().st_mtime_ns
    assert quietly(folder, data_dir, licence="CC0", say=said.append) == prepared
    assert any("already prepared" in line for line in said)
    assert records.stat().st_mtime_ns == before
    assert describe("my_photos", data_dir).licence == "CC0"  # the licence can be added later
    fingerprint = describe("my_photos", data_dir).fingerprint

    edit(folder, lambda x: x["images"][149]["sentences"][0].update(raw="A new caption"))
    quietly(folder, data_dir, say=said.append)
    assert open_source("my_photos", "val", data_dir).captions(19)[0] == "A new caption"
    assert describe("my_photos", data_dir).fingerprint != fingerprint

    # If preparing again fails, the existing dataset stays.
    break_images(folder)
    with pytest.raises(UserError, match="more than 1%"):
        quietly(folder, data_dir)
    assert len(open_source("my_photos", "train", data_dir)) == 130
    assert [path.name for path in prepared.parent.iterdir()] == [prepared.name]


def test_what_prepare_did_not_write_is_not_replaced(folder: Path, data_dir: Path) -> None:
    place = data_dir / "my_photos" / "1.0.0"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("my work")
    with pytest.raises(UserError, match=r"1\.0\.0 was not written by imgcap data prepare; move it away"):
        quietly(folder, data_dir)
    assert (place / "thesis.txt").read_text() == "my work"
    # A dataset that TFDS itself prepared.
    (place / "thesis.txt").rename(place / "dataset_info.json")
    for path in (folder, "scenes"):
        (data_dir / "my_photos").rename(data_dir / ("my_photos" if path == folder else "scenes"))
        with pytest.raises(UserError, match=r"was prepared from TFDS dataset|was not written by imgcap data prepare"):
            quietly(path, data_dir, **({} if path == folder else {"scenes": SMALL}))
    assert (data_dir / "scenes" / "1.0.0" / "dataset_info.json").read_text() == "my work"


def test_files_that_were_put_into_a_dataset_are_kept(folder: Path, data_dir: Path) -> None:
    prepared = quietly(folder, data_dir)
    (prepared / "notes.txt").write_text("my work")
    edit(folder, lambda x: x["images"][149]["sentences"][0].update(raw="A new caption"))
    with pytest.raises(UserError, match=r"1\.0\.0 contains notes\.txt, which imgcap data prepare did not write; move"):
        quietly(folder, data_dir)
    assert (prepared / "notes.txt").read_text() == "my work"
    assert open_source("my_photos", "val", data_dir).captions(19)[0] == "A dog, number 149."
    (prepared / "notes.txt").unlink()
    quietly(folder, data_dir)
    assert open_source("my_photos", "val", data_dir).captions(19)[0] == "A new caption"


def test_other_folders_next_to_a_dataset_are_kept(folder: Path, data_dir: Path) -> None:
    mine = data_dir / "my_photos" / "incomplete.holiday pictures" / "a.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("my work")
    for path in (mine, mine.parent):
        os.utime(path, (0, 0))
    quietly(folder, data_dir)
    assert mine.read_text() == "my work"


def test_a_dataset_that_is_up_to_date_is_not_read_again(
    folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of COCO takes a minute; only `imgcap data inspect --check` reads everything."""
    prepared = quietly(folder, data_dir)
    records = next(prepared.glob("*-train.array_record*"))
    content = bytearray(records.read_bytes())
    content[len(content) // 2] ^= 1
    records.write_bytes(content)
    said: list[str] = []
    quietly(folder, data_dir, say=said.append)
    assert any("already prepared" in line for line in said)
    assert check_dataset("my_photos", data_dir) == [f"{records} has changed"]
    records.write_bytes(content[:-1])
    quietly(folder, data_dir, say=said.append)
    assert any("damaged" in line and "preparing it again" in line for line in said)
    assert check_dataset("my_photos", data_dir) == []


def test_errors_of_files_name_the_file(
    tmp_path: Path, folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from imgcap_jax.data.builders.base import CaptionBuilder\n"
        "class Own(CaptionBuilder):\n"
        "    def record_shards(self):\n"
        "        open('/nonexistent/captions.csv')\n"
    )
    with pytest.raises(UserError) as error:
        quietly(own, data_dir)
    assert str(error.value).startswith("/nonexistent/captions.csv: No such file or directory; check this path")

    own.touch()
    with pytest.raises(UserError, match=r"own.py/data can't be created .*own.py is not a folder"):
        quietly(folder, own / "data")

    def refuse(number: int, path: Path) -> Any:
        def make(path_of_lock: Path) -> Any:
            raise OSError(number, os.strerror(number), os.fspath(path))

        return make

    for number, path, words in (
        (errno.EACCES, data_dir / "my_photos", f"{data_dir / 'my_photos'} can't be written .*; use another --data-dir"),
        (errno.EROFS, data_dir.parent, f"{data_dir.parent} can't be written .*; use another --data-dir"),
        (errno.ENOSPC, data_dir / "my_photos", f"{data_dir}: the disk is full; free some space"),
        (errno.EIO, Path("/elsewhere"), "/elsewhere: Input/output error; check the disk"),
    ):
        monkeypatch.setattr(staging, "lock_file", refuse(number, path))
        with pytest.raises(UserError, match=words):
            quietly(folder, data_dir)


@pytest.mark.parametrize(
    ("splits", "stored"),
    [
        (("train", "validation"), ["train", "val"]),
        (("train", "dev", "test"), ["train", "val", "test"]),
        (("training", "valid", "extra"), ["train", "val", "extra"]),
        (("train", "val", "validation"), None),
    ],
)
def test_the_splits_of_own_builders_get_our_names(
    splits: tuple[str, ...], stored: list[str] | None, tmp_path: Path, data_dir: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(0))
    (tmp_path / "own.py").write_text(
        textwrap.dedent(
            f"""
            from functools import partial
            from pathlib import Path
            from imgcap_jax.data.builders.base import CaptionBuilder, CaptionRecord

            class Own(CaptionBuilder):
                def record_shards(self):
                    return {{split: [partial(self.records, i)] for i, split in enumerate({splits})}}

                def records(self, i):
                    yield CaptionRecord(Path({str(tmp_path)!r}, "a.jpg").read_bytes(), f"{{i}}.jpg", i, [(i, "A dog.")])
            """
        )
    )
    said: list[str] = []
    if stored is None:
        with pytest.raises(UserError, match=r"record_shards: 'validation' is another name of the split 'val'"):
            quietly(tmp_path / "own.py", data_dir)
        return
    quietly(tmp_path / "own.py", data_dir, say=said.append)
    assert list(describe("own", data_dir).splits) == stored
    for given, name in zip(splits, stored, strict=True):
        assert (f"own: note: the split {given!r} is stored as {name!r}" in said) == (given != name)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_kept(
    folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = data_dir / "my_photos"
    dead, living = home / "incomplete.aaaaaaaa", home / "incomplete.bbbbbbbb"
    old, starting = home / "incomplete.cccccccc", home / "incomplete.dddddddd.lock"
    for leftover in (dead, living, old):
        leftover.mkdir(parents=True)
        (leftover / "records").touch()
    for path in (old / "records", old):  # without a lock, and unchanged for hours
        os.utime(path, (0, 0))
    (home / "incomplete.aaaaaaaa.lock").touch()

    flock = fcntl.flock

    def as_on_nfs(file: Any, operation: int) -> None:
        """Refuses an exclusive lock of a file that is not open for writing."""
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    with (home / "incomplete.bbbbbbbb.lock").open("a") as lock, starting.open("a") as other:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(other, fcntl.LOCK_EX)  # its folder is made next
        quietly(folder, data_dir)
    assert sorted(path.name for path in home.iterdir()) == [
        "1.0.0",
        "incomplete.bbbbbbbb",
        "incomplete.bbbbbbbb.lock",
        starting.name,
    ]


def test_the_folder_of_a_running_process_is_locked_from_the_start(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    mkdir = Path.mkdir

    def watched(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name.startswith("incomplete."):
            lock = path.with_name(f"{path.name}.lock").open("a")
            with lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            made.append(True)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", watched)
    with staging.staging(data_dir / "my_photos") as place:
        assert place.is_dir()
    assert made == [True]
    assert not (data_dir / "my_photos").exists()


def test_another_folder_cannot_take_over_a_name(folder: Path, tmp_path: Path, data_dir: Path) -> None:
    quietly(folder, data_dir)
    other = tmp_path / "other" / folder.name
    other.mkdir(parents=True)
    (other / "0.jpg").write_bytes(encoded(0))
    (other / "list.jsonl").write_text('{"image": "0.jpg", "captions": ["A cat"]}')
    with pytest.raises(UserError, match=r"was prepared from .*--name"):
        quietly(other, data_dir)


def test_shards_contain_all_images_in_order(folder: Path, data_dir: Path, monkeypatch: Any) -> None:
    from imgcap_jax.data.builders import base

    monkeypatch.setattr(base, "SHARD_BYTES", 20_000)
    prepared = quietly(folder, data_dir)
    assert len(list(prepared.glob("*-train.array_record*"))) > 1
    assert open_source("my_photos", "train", data_dir).image_ids() == list(range(130))


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_killed_run_leaves_nothing_that_looks_prepared(folder: Path, data_dir: Path) -> None:
    killed = python(
        """
        import os, signal, sys
        from pathlib import Path
        from imgcap_jax.data.builders import folder
        from imgcap_jax.data.prepare import prepare
        read, count = folder.read_image, 0
        def read_or_die(path):
            global count
            count += 1
            if count > 140:  # within the last split
                os.kill(os.getpid(), signal.SIGKILL)
            return read(path)
        folder.read_image = read_or_die
        prepare(sys.argv[1], data_dir=Path(sys.argv[2]), progress=False)
        """,
        str(folder),
        str(data_dir),
    )
    assert killed.returncode == -9
    assert find_prepared("my_photos", data_dir) is None
    leftover = next((data_dir / "my_photos").iterdir())
    hours_ago = time.time() - 7200
    for path in (leftover, *leftover.rglob("*")):
        os.utime(path, (hours_ago, hours_ago))
    quietly(folder, data_dir)
    assert len(open_source("my_photos", "train", data_dir)) == 130
    assert not leftover.exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # The wording of array_record.
        RuntimeError("write() failed: No space left on device; writing x; at byte 3145728"),
    ],
)
def test_a_full_disk_is_reported(
    error: Exception, folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from array_record.python import array_record_module

    class Writer:
        def __init__(self, *_: object) -> None:
            raise error

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Writer)
    with pytest.raises(UserError, match="the disk is full; free some space"):
        quietly(folder, data_dir)
    assert not list(data_dir.iterdir())


SMALL = SceneSplits(train=12, val=3, test=3, test_compositional=3, image_size=32)


def test_scenes(data_dir: Path, tmp_path: Path) -> None:
    quietly("scenes", data_dir, scenes=SMALL)
    assert describe("scenes", data_dir).splits == SMALL.counts
    images: set[bytes] = set()
    for split, count in SMALL.counts.items():
        source = open_source("scenes", split, data_dir)
        assert len(source) == count
        for example in source:
            pixels = np.asarray(Image.open(io.BytesIO(example.image)))
            np.testing.assert_array_equal(pixels, draw_scene(Scene.from_json(example.scene), 32))
            assert len(set(example.captions)) == 5
            images.add(example.image)
    assert len(images) == sum(SMALL.counts.values())  # no scene occurs in two splits
    # The same seed gives the same dataset.
    quietly("scenes", tmp_path / "again", scenes=SMALL)
    again = open_source("scenes", "train", tmp_path / "again")
    assert list(again) == list(open_source("scenes", "train", data_dir))


def test_scenes_are_drawn_again_with_other_settings(data_dir: Path) -> None:
    quietly("scenes", data_dir, scenes=SMALL)
    first = open_source("scenes", "train", data_dir)[0]
    quietly("scenes", data_dir, scenes=SceneSplits(12, 3, 3, 3, image_size=32, seed=1))
    assert open_source("scenes", "train", data_dir)[0] != first
    with pytest.raises(UserError, match="'val'; use 1 to 9,999,999"):
        SceneSplits(val=0)


def test_preparing_and_reading_scenes_imports_no_tensorflow_and_prints_nothing(data_dir: Path) -> None:
    run = python(
        """
        import sys
        from pathlib import Path
        from imgcap_jax.data.scenes.builder import SceneSplits
        from imgcap_jax.data.prepare import prepare
        from imgcap_jax.data.sources import open_source
        prepare("scenes", data_dir=Path(sys.argv[1]), scenes=SceneSplits(4, 1, 1, 1), progress=False)
        source = open_source("scenes", "train", Path(sys.argv[1]))
        assert len(list(source)) == 4
        assert "tensorflow" not in sys.modules
        """,
        str(data_dir),
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_sources_survive_pickling(data_dir: Path) -> None:
    quietly("scenes", data_dir, scenes=SMALL)
    source = open_source("scenes", "val", data_dir)
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy) == list(source)
    assert copy.fingerprint == source.fingerprint
