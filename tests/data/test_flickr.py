"""Flickr8k and Flickr30k prepared from small archives with the layout of the real ones."""

import csv
import errno
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.cli.main import main
from imgcap_jax.data.builders import flickr
from imgcap_jax.data.builders.folder import scan_images
from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.sources import describe, open_source
from imgcap_jax.data.staging import staging
from imgcap_jax.errors import UserError

SPLITS = {"train": ["11.jpg", "12.jpg", "13.jpg"], "val": ["21.jpg"], "test": ["31.jpg", "32.jpg"]}
NAMES = [name for names in SPLITS.values() for name in names]


def jpeg(name: str) -> bytes:
    pixels = np.random.default_rng(int(name[:-4])).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def captions_of(name: str) -> tuple[str, ...]:
    return tuple(f"A dog , {name[:-4]} {k} ." for k in range(5))


def write_zip(path: Path, files: dict[str, bytes | str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def karpathy(name: str, edit: Callable[[list[Any]], None] = lambda images: None) -> str:
    images = [
        {
            "filename": name,
            "imgid": number,
            "split": split,
            "sentids": [0],
            "sentences": [{"raw": raw, "sentid": 5 * number + k} for k, raw in enumerate(captions_of(name))],
        }
        for number, (split, name) in enumerate((split, name) for split, names in SPLITS.items() for name in names)
    ]
    edit(images)
    return json.dumps({"dataset": name, "images": images})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files as they are downloaded."""
    counts = {split: len(names) for split, names in SPLITS.items()}
    for name, dataset in list(flickr.DATASETS.items()):
        monkeypatch.setitem(flickr.DATASETS, name, replace(dataset, splits=counts))
    folder = tmp_path / "files"
    folder.mkdir()
    photos = [*NAMES, "99.jpg"]  # 99 is in no split, as 91 photos of Flickr8k
    write_zip(
        folder / "Flickr8k_Dataset.zip",
        {
            **{f"Flicker8k_Dataset/{name}": jpeg(name) for name in photos},
            **{f"__MACOSX/Flicker8k_Dataset/._{name}": b"\0" for name in photos},
        },
    )
    write_zip(folder / "flickr30k-images.zip", {f"flickr30k-images/{name}": jpeg(name) for name in photos})
    tokens = "".join(f"{name}#{k}\t{text}\n" for name in photos for k, text in enumerate(captions_of(name)))
    write_zip(
        folder / "Flickr8k_text.zip",
        {
            "CrowdFlowerAnnotations.txt": "1.jpg\t2.jpg#2\t0\t0\t3\n",
            "Flickr8k.token.txt": tokens,
            "Flickr8k.lemma.token.txt": tokens,
            "readme.txt": "If you publish work based on the data",
            "__MACOSX/._Flickr8k.token.txt": "\0",
            **{
                f"Flickr_8k.{part}Images.txt": "".join(f"{name}\n" for name in SPLITS[split])
                for part, split in (("train", "train"), ("dev", "val"), ("test", "test"))
            },
        },
    )
    of_karpathy = {f"dataset_{name}.json": karpathy(name) for name in ("flickr8k", "flickr30k")}
    write_zip(folder / "caption_datasets.zip", {**of_karpathy, "dataset_coco.json": "{}"})
    (folder / "dataset_flickr30k.json").write_text(of_karpathy["dataset_flickr30k.json"])
    with (folder / "flickr_annotations_30k.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for number, (split, name) in enumerate((split, name) for split, names in SPLITS.items() for name in names):
            rows.writerow([json.dumps(captions_of(name)), "[0, 1, 2, 3, 4]", split, name, number])
    return folder


@pytest.mark.parametrize(
    ("name", "images", "split_file"),
    [
        ("flickr8k", "Flickr8k_Dataset.zip", "Flickr8k_text.zip"),
        ("flickr8k", "Flickr8k_Dataset.zip", "caption_datasets.zip"),
        ("flickr8k", "extracted", "text"),
        ("flickr8k", "extracted", "text/Flickr8k.token.txt"),
        ("flickr30k", "flickr30k-images.zip", "dataset_flickr30k.json"),
        ("flickr30k", "flickr30k-images.zip", "caption_datasets.zip"),
        ("flickr30k", "flickr30k-images.zip", "flickr_annotations_30k.csv"),
    ],
)
def test_archives_as_they_are_downloaded(name: str, images: str, split_file: str, files: Path) -> None:
    for archive, folder in (("Flickr8k_Dataset", "extracted"), ("Flickr8k_text", "text")):
        with zipfile.ZipFile(files / f"{archive}.zip") as opened:
            opened.extractall(files / folder)
    data_dir = files.parent / "data"
    prepare(name, images=[files / images], split_file=files / split_file, data_dir=data_dir, progress=False)
    for split, names in SPLITS.items():
        found = {(one.filename, one.image, one.captions) for one in open_source(name, split, data_dir)}
        assert found == {(name, jpeg(name), captions_of(name)) for name in names}
    described = describe(name, data_dir)
    assert "et al." in described.source
    assert "non-commercial" in described.licence
    said: list[str] = []
    prepare(
        name, images=[files / images], split_file=files / split_file, data_dir=data_dir, progress=False, say=said.append
    )
    assert f"{name}: already prepared in {described.folder}" in said


def without_test(images: list[Any]) -> None:
    del images[-1]


def other_split(images: list[Any]) -> None:
    images[0]["split"] = "restval"


def unknown_photo(images: list[Any]) -> None:
    images[0]["filename"] = "77.jpg"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_test, r"does not have the splits of flickr8k: test has 1 photo instead of 2 \("),
        (other_split, "train has 2 photos instead of 3, restval is not a split of it"),
        (
            unknown_photo,
            r"Flickr8k_Dataset\.zip: 1 photo of the 6 in .*some\.json cannot be used \(77\.jpg: not found\)",
        ),
    ],
)
def test_counts_are_checked(edit: Callable[[list[Any]], None], message: str, files: Path) -> None:
    (files / "some.json").write_text(karpathy("flickr8k", edit))
    with pytest.raises(UserError, match=message) as raised:
        prepare(
            "flickr8k",
            images=[files / "Flickr8k_Dataset.zip"],
            split_file=files / "some.json",
            data_dir=files.parent / "data",
            progress=False,
        )
    assert str(raised.value).endswith(
        "a part of the dataset is prepared by: imgcap data prepare FOLDER --name flickr8k"
    )
    assert not (files.parent / "data").exists()


def test_a_part_is_prepared_from_a_folder(files: Path) -> None:
    with zipfile.ZipFile(files / "Flickr8k_Dataset.zip") as archive:
        archive.extractall(files / "part")
    (files / "part" / "dataset_flickr8k.json").write_text(karpathy("flickr8k", without_test))
    prepare(files / "part", name="flickr8k", data_dir=files.parent / "data", progress=False)
    assert describe("flickr8k", files.parent / "data").splits == {"train": 3, "val": 1, "test": 1}


def test_karpathys_file_in_the_folder_of_photos_is_found(files: Path) -> None:
    with zipfile.ZipFile(files / "Flickr8k_Dataset.zip") as archive:
        archive.extractall(files / "photos")
    options = {"images": [files / "photos"], "data_dir": files.parent / "data", "progress": False}
    with pytest.raises(
        UserError, match=r"nowhere does not exist; check the path \(imgcap data prepare flickr8k without"
    ):
        prepare("flickr8k", **{**options, "images": [files / "nowhere"]})
    with pytest.raises(UserError, match=r"captions are missing; pass dataset_flickr8k\.json .* with --split-file"):
        prepare("flickr8k", **options)
    (files / "photos" / "dataset_flickr8k.json").write_text(karpathy("flickr8k"))
    prepare("flickr8k", **options)
    assert describe("flickr8k", files.parent / "data").splits == {"train": 3, "val": 1, "test": 2}


@pytest.mark.parametrize("name", ["flickr8k", "flickr30k"])
def test_without_options_the_addresses_of_the_files_are_printed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", name, "--data-dir", str(tmp_path / "data")]) == 2
    out, err = capsys.readouterr()
    assert err == f"imgcap: {name} is not downloaded automatically; get its files as described, then use --images\n"
    assert "request form: https://forms.illinois.edu/sec/" in out
    assert "non-commercial research" in out
    assert out.splitlines()[-1].split() == ["then", *f"imgcap data prepare {name}".split(), *out.split()[-4:]]
    assert out.split()[-4::2] == ["--images", "--split-file"]
    assert list(tmp_path.iterdir()) == []


def test_a_local_folder_of_that_name_is_used(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(files / "Flickr8k_Dataset.zip") as archive:
        archive.extractall(files / "flickr8k")
    (files / "flickr8k" / "dataset_flickr8k.json").write_text(karpathy("flickr8k", without_test))
    monkeypatch.chdir(files)
    for name in ("flickr8k", "mine"):
        prepare("flickr8k", name=name, data_dir=files.parent / "data", progress=False)
        assert describe(name, files.parent / "data").splits == {"train": 3, "val": 1, "test": 1}


def test_damaged_files_in_archives(files: Path) -> None:
    """One line that names the archive and the file in it."""
    data_dir = files.parent / "data"
    write_zip(files / "text.zip", {"dataset_flickr8k.json": '{"images": [{"filename": "1.jpg"}]}'})
    options: dict[str, Any] = {"images": [files / "Flickr8k_Dataset.zip"], "data_dir": data_dir, "progress": False}
    with pytest.raises(UserError, match=r"files/text\.zip/dataset_flickr8k\.json: images\[0\]: key"):
        prepare("flickr8k", split_file=files / "text.zip", **options)
    write_zip(files / "rows.zip", {"train.jsonl": '{"image": 1}\n' * 5})
    with pytest.raises(UserError, match=rf"listed in {data_dir}/flickr8k_problems\.txt"):
        prepare("flickr8k", split_file=files / "rows.zip", **options)
    assert f"{files}/rows.zip/train.jsonl line 5" in (data_dir / "flickr8k_problems.txt").read_text()
    path = files / "Flickr8k_Dataset.zip"
    path.write_bytes(path.read_bytes().replace(jpeg("12.jpg"), jpeg("12.jpg")[:-9] + bytes(9)))
    with pytest.raises(UserError, match=r"token\.txt: 1 of its 6 images cannot be used: 12\.jpg \(damaged") as raised:
        prepare("flickr8k", split_file=files / "Flickr8k_text.zip", **options)
    assert str(raised.value).endswith("; replace them with undamaged copies")


def given(files: Path, **changed: Any) -> dict[str, Any]:
    """The arguments of `prepare` for archives that are there."""
    return {
        "images": [files / "Flickr8k_Dataset.zip"],
        "split_file": files / "Flickr8k_text.zip",
        "data_dir": files.parent / "data",
        "progress": False,
        **changed,
    }


def test_photos_that_an_archive_has_twice(files: Path) -> None:
    twice = {f"{folder}/{name}": jpeg(name) for folder in ("Images", "Images/Images") for name in NAMES}
    write_zip(files / "twice.zip", dict(twice))
    prepare("flickr8k", **given(files, images=[files / "twice.zip"]))
    assert describe("flickr8k", files.parent / "data").splits == {"train": 3, "val": 1, "test": 2}
    write_zip(files / "other.zip", {**twice, "Images/Images/12.jpg": jpeg("13.jpg")})
    with pytest.raises(
        UserError, match=r"1 photo of the 6 .* cannot be used \(12\.jpg: 2 different files of this name in"
    ):
        prepare("flickr8k", **given(files, images=[files / "other.zip"]))


def test_files_of_one_name_in_an_archive_keep_their_folders(files: Path) -> None:
    tables = {
        f"captions/{split}/metadata.csv": "file_name,text\n" + "".join(f"{name},A dog {name[:2]}\n" for name in names)
        for split, names in SPLITS.items()
    }
    write_zip(files / "tables.zip", dict(tables))
    with zipfile.ZipFile(files / "Flickr8k_Dataset.zip") as archive:
        for split, names in SPLITS.items():
            for name in names:
                path = files / "photos" / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(f"Flicker8k_Dataset/{name}"))
    contents = scan_images(files / "photos", files / "tables.zip", "none.json", partial(staging, files / "temporary"))
    assert {image.split: image.captions[0][1] for image in contents.images if image.filename.endswith("1.jpg")} == {
        "train": "A dog 11",
        "val": "A dog 21",
        "test": "A dog 31",
    }
    assert not (files / "temporary").exists()


def test_a_full_disk_is_no_damaged_archive(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "incomplete." in str(path) and "w" in mode:
            assert path.is_relative_to(files.parent / "data")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, mode, *arguments, **options)

    original = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UserError, match=r"data: the disk is full; free some space"):
            prepare("flickr8k", **given(files))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10))  # type: ignore
    with pytest.raises(UserError, match=r"GB needed, .* GB free; use another --data-dir"):
        prepare("flickr8k", **given(files))


def test_disk_space_for_photos_is_checked(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10))  # type: ignore
    with pytest.raises(UserError, match=r"GB needed, .* GB free; use another --data-dir"):
        prepare("flickr30k", **given(files, split_file=files / "dataset_flickr30k.json"))
    with zipfile.ZipFile(files / "Flickr8k_Dataset.zip") as archive:
        archive.extractall(files / "mine")
    (files / "mine" / "dataset_flickr8k.json").write_text(karpathy("flickr8k"))
    with pytest.raises(UserError, match=r"GB needed, .* GB free; use another --data-dir"):
        prepare(files / "mine", data_dir=files.parent / "data", progress=False)


def test_after_a_folder_the_archives_can_be_prepared(files: Path) -> None:
    data_dir = files.parent / "data"
    with zipfile.ZipFile(files / "Flickr8k_Dataset.zip") as archive:
        archive.extractall(files / "part")
    (files / "part" / "dataset_flickr8k.json").write_text(karpathy("flickr8k", without_test))
    folder = prepare(files / "part", name="flickr8k", data_dir=data_dir, progress=False)
    with pytest.raises(UserError, match=rf"was prepared from .*part; delete {folder} and run the same command again$"):
        prepare("flickr8k", **given(files))
    shutil.rmtree(folder)
    prepare("flickr8k", **given(files))
    with pytest.raises(UserError, match=r"was prepared from .*Flickr8k_Dataset\.zip; use another --name$"):
        prepare(files / "part", name="flickr8k", data_dir=data_dir, progress=False)


def test_a_known_file_with_another_digest_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files / "dataset_flickr30k.json"
    known = {path.stat().st_size: ("dataset_flickr30k.json", "0" * 64)}
    monkeypatch.setattr("imgcap_jax.data.builders.karpathy.KNOWN", known)
    for name in ("dataset_flickr30k.json", "caption_datasets.zip"):
        with pytest.raises(UserError, match=r"has the size of Karpathy's dataset_flickr30k\.json, but another SHA-256"):
            prepare("flickr30k", **given(files, split_file=files / name))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["scenes", "--images", "x"],
            "--images has no effect on 'scenes', only on coco, coco_captions, flickr8k, ",
        ),
        (["flickr8k", "--annotations", "x"], "--annotations has no effect on 'flickr8k', only on coco, coco_captions"),
        (["photos", "--split-file", "x"], "--split-file has no effect on 'photos'"),
        (["flickr8k", "--images", "a", "--images", "b"], "--images is given 2 times; pass one folder or zip archive"),
        (["flickr8k", "--split-file", "x"], "the photos are missing; pass their folder or zip archive with --images"),
        (["flickr8k", "--images", "absent", "--split-file", "x"], "absent does not exist"),
        (["flickr8k", "--name", "mine"], "--name has no effect on 'flickr8k'"),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert line in refused(["data", "prepare", *arguments, "--data-dir", str(tmp_path / "data")])
