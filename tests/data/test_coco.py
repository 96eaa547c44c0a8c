"""COCO prepared from small archives with the layout of the real ones, downloaded from a local server or given."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcap_jax import downloads
from imgcap_jax.cli.main import main
from imgcap_jax.data.builders import coco
from imgcap_jax.data.builders.folder import FolderBuilder, scan_folder
from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.sources import check_dataset, describe, open_source
from imgcap_jax.errors import UserError

# Image ids by Karpathy's split. The images of train are in COCO's train2014, all others in its val2014.
SPLITS = {"train": [9, 5, 7], "restval": [2, 4], "val": [1, 6, 8], "test": [3]}
UNLISTED = {"train2014": 99, "val2014": 98}  # images that are not in Karpathy's list
WITHOUT_OBJECTS = (5, 1)
NAMES = ("train2014.zip", "val2014.zip", "annotations_trainval2014.zip", "caption_datasets.zip")


def place_of(split: str) -> str:
    return "train2014" if split == "train" else "val2014"


def file_name(image_id: int, place: str) -> str:
    return f"COCO_{place}_{image_id:012d}.jpg"


def jpeg(image_id: int) -> bytes:
    pixels = np.random.default_rng(image_id).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def captions_of(image_id: int) -> list[tuple[int, str]]:
    """Id and text, with the spaces and line breaks that COCO's captions have."""
    return [(1000 * image_id + k, f"A dog, image {image_id}, number {k}. \n") for k in (3, 1, 2, 5, 4)]


def objects_of(image_id: int) -> list[dict[str, Any]]:
    """Not in the order of their ids; areas have fractions."""
    if image_id in WITHOUT_OBJECTS:
        return []
    return [
        {
            "id": 100 * image_id + k,
            "image_id": image_id,
            "category_id": 2 * ((image_id + k - 1) % 80 + 1),
            "bbox": [1.25 * k, 0.5, 5.17, 7.9],
            "area": 25.75 + k,
            "iscrowd": k % 2,
            "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]],
        }
        for k in (2, 1, 3)
    ]


def karpathy(edit: Callable[[list[Any]], None] = lambda images: None) -> dict[str, Any]:
    images = [
        {
            "filename": file_name(i, place_of(split)),
            "filepath": place_of(split),
            "cocoid": i,
            "imgid": number,
            "split": split,
            "sentids": [sentid for sentid, _ in captions_of(i)],
            "sentences": [{"raw": raw, "sentid": sentid, "tokens": ["wrong"]} for sentid, raw in captions_of(i)],
        }
        for number, (i, split) in enumerate((i, split) for split, ids in SPLITS.items() for i in ids)
    ]
    edit(images)
    return {"dataset": "coco", "images": images}


def annotations(kind: str, place: str) -> dict[str, Any]:
    ids = sorted({i for split, ids in SPLITS.items() if place_of(split) == place for i in ids} | {UNLISTED[place]})
    images = [{"id": i, "file_name": file_name(i, place), "width": 14, "height": 10} for i in reversed(ids)]
    if kind == "captions":
        found = [{"id": sentid, "image_id": i, "caption": text} for i in ids for sentid, text in captions_of(i)]
        return {"images": images, "annotations": found}
    return {
        "images": images,
        "annotations": [found for i in ids for found in objects_of(i)],
        "categories": [{"id": 2 * number, "name": f"thing {number}"} for number in range(1, 81)],
    }


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the archives, under their names."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for place in ("train2014", "val2014"):
        ids = [i for split, ids in SPLITS.items() if place_of(split) == place for i in ids]
        images = {f"{place}/{file_name(i, place)}": jpeg(i) for i in [*ids, UNLISTED[place]]}
        write_zip(folder / f"{place}.zip", {f"{place}/": b"", **images})
    files = [(kind, place) for kind in ("captions", "instances") for place in ("train2014", "val2014")]
    texts = {f"annotations/{kind}_{place}.json": json.dumps(annotations(kind, place)).encode() for kind, place in files}
    write_zip(folder / "annotations_trainval2014.zip", texts)
    write_zip(
        folder / "caption_datasets.zip",
        {"dataset_coco.json": json.dumps(karpathy()).encode(), "dataset_flickr8k.json": b"{}"},
    )
    monkeypatch.setattr(coco, "SPLITS", {split: len(ids) for split, ids in SPLITS.items()})
    return folder


@pytest.fixture
def served(archives: Path, file_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server with the archives, at the addresses from which they are downloaded."""

    def archive(name: str) -> coco.Archive:
        content = (archives / name).read_bytes()
        file_server.files[f"/{name}"] = content
        return coco.Archive(f"{file_server.base}/{name}", len(content), hashlib.sha256(content).hexdigest())

    monkeypatch.setattr(coco, "PHOTOS", (archive("train2014.zip"), archive("val2014.zip")))
    monkeypatch.setattr(coco, "ANNOTATIONS", archive("annotations_trainval2014.zip"))
    splits = archive("caption_datasets.zip")
    gone = replace(splits, url=f"{file_server.base}/gone.zip")
    monkeypatch.setattr(coco, "MIRRORS", (gone, splits))
    return file_server


def given(archives: Path, **changed: Any) -> dict[str, Any]:
    """The arguments of `prepare` for archives that are there."""
    return {
        "data_dir": archives.parent / "data",
        "images": [archives / "train2014.zip", archives / "val2014.zip"],
        "annotations": archives / "annotations_trainval2014.zip",
        "split_file": archives / "caption_datasets.zip",
        "progress": False,
        **changed,
    }


def contents(data_dir: Path) -> dict[str, list[tuple[int, str, bytes, tuple[str, ...]]]]:
    """Id, file name, image and captions of each record, by split."""
    return {
        split: [(one.image_id, one.filename, one.image, one.captions) for one in open_source("coco", split, data_dir)]
        for split in ("train", "val", "test")
    }


def expected(splits: tuple[str, ...]) -> set[tuple[int, str, bytes, tuple[str, ...]]]:
    return {
        (i, file_name(i, place_of(split)), jpeg(i), tuple(text for _, text in captions_of(i)))
        for split in splits
        for i in SPLITS[split]
    }


def check_contents(data_dir: Path) -> None:
    found = contents(data_dir)
    assert set(found["train"]) == expected(("train", "restval"))
    assert set(found["val"]) == expected(("val",))
    assert set(found["test"]) == expected(("test",))
    assert sum(map(len, found.values())) == 9


def test_coco_is_prepared_from_its_archives(archives: Path) -> None:
    data_dir, said = archives.parent / "data", list[str]()
    folder = prepare("coco", **given(archives), say=said.append)
    assert folder == data_dir / "coco_captions" / "2014" / "1.1.0"
    assert said == [f"coco_captions: train 3, restval 2, val 3, test 1 images in {folder}"]
    check_contents(data_dir)
    assert describe("coco", data_dir).source == coco.ORIGIN.source
    assert check_dataset("coco", data_dir) == []
    assert [file.name for file in (data_dir / "coco_captions").iterdir()] == ["2014"]
    said.clear()
    for name in NAMES:
        (archives / name).unlink()
    assert prepare("coco", data_dir=data_dir, progress=False, say=said.append) == folder
    assert said == [f"coco_captions: already prepared in {folder}"]


def test_objects_are_stored(archives: Path) -> None:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(prepare("coco", **given(archives))).as_data_source("val")
    found = {int(example["image/id"]): example["objects"] for example in source}
    assert len(found[1]["id"]) == 0
    assert list(found[6]["id"]) == [601, 602, 603]
    assert list(found[6]["area"]) == [26, 27, 28]
    assert list(found[6]["is_crowd"]) == [True, False, True]
    assert list(found[6]["label"]) == [6, 7, 8]  # the numbers of categories, not their ids
    np.testing.assert_allclose(found[6]["bbox"][1], [0.05, 2.5 / 14, 0.84, 7.67 / 14], rtol=1e-6)


def test_no_tensorflow_is_imported(archives: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from imgcap_jax.data.builders import coco
        from imgcap_jax.data.prepare import prepare
        from imgcap_jax.data.sources import open_source
        archives = Path(sys.argv[1])
        coco.SPLITS = {"train": 3, "restval": 2, "val": 3, "test": 1}
        prepare("coco", data_dir=archives / "data", images=[archives], annotations=archives / sys.argv[2],
                split_file=archives / sys.argv[3], progress=False)
        assert len(open_source("coco", "train", archives / "data")) == 5
        assert "tensorflow" not in sys.modules
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), archives, *NAMES[2:]], check=True)


@pytest.mark.parametrize("nested", [True, False])
def test_extracted_archives(nested: bool, archives: Path) -> None:
    extracted = archives.parent / "extracted"
    for name in NAMES:
        with zipfile.ZipFile(archives / name) as archive:
            archive.extractall(extracted)
    options = {"images": [extracted], "annotations": extracted, "split_file": extracted}
    if not nested:
        options = {
            "images": [extracted / "val2014", extracted / "train2014"],
            "annotations": extracted / "annotations" / "instances_val2014.json",
            "split_file": extracted / "dataset_coco.json",
        }
    prepare("coco", **given(archives, **options))
    check_contents(archives.parent / "data")


def test_blips_lists(archives: Path) -> None:
    """Their train contains restval, captions have no ids, and those of val and test are without image ids."""
    parts: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for split, ids in SPLITS.items():
        for i in ids:
            entry = {"image": f"{place_of(split)}/{file_name(i, place_of(split))}", "image_id": f"coco_{i}"}
            texts = [text.strip() for _, text in captions_of(i)]
            if split in ("train", "restval"):
                parts["train"] += [{**entry, "caption": text} for text in texts]
            else:
                parts[split].append({"image": entry["image"], "caption": texts})
    for split, entries in parts.items():
        (archives / f"coco_karpathy_{split}.json").write_text(json.dumps(entries))
    prepare("coco", **given(archives, split_file=archives / "coco_karpathy_val.json"))
    check_contents(archives.parent / "data")
    (archives / "coco_karpathy_test.json").unlink()
    with pytest.raises(UserError, match=r"coco_karpathy_test\.json is missing; pass Karpathy's dataset_coco\.json"):
        prepare("coco", **given(archives, data_dir=archives, split_file=archives / "coco_karpathy_val.json"))


def wrong_split(images: list[Any]) -> None:
    images[0]["split"] = "val"


def wrong_count(images: list[Any]) -> None:
    del images[-1]


def wrong_id(images: list[Any]) -> None:
    images[1]["cocoid"] = 11


def unknown_image(images: list[Any]) -> None:
    images[1]["filename"] = "COCO_train2014_000000000011.jpg"


def repeated_image(images: list[Any]) -> None:
    images[1] = images[0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (wrong_split, r"images\[0\]: COCO_train2014_000000000009\.jpg is in train2014, and cannot be in .* 'val'"),
        (
            wrong_count,
            r"\(train 3, restval 2, val 3\) than Karpathy's \(train 3, .* test 1\); dataset.*kaggle",
        ),
        (wrong_id, r"images\[1\]: COCO has no image COCO_train2014_000000000005\.jpg with the id 11"),
        (unknown_image, r"images\[1\]: COCO has no image COCO_train2014_000000000011\.jpg with the id 5"),
        (repeated_image, r"other\.zip lists 1 image twice \(first: COCO_train2014_000000000009\.jpg\); use"),
    ],
)
def test_files_with_other_splits_are_refused(edit: Callable[[list[Any]], None], message: str, archives: Path) -> None:
    write_zip(archives / "other.zip", {"dataset_coco.json": json.dumps(karpathy(edit)).encode()})
    with pytest.raises(UserError, match=message) as raised:
        prepare("coco", **given(archives, split_file=archives / "other.zip"))
    assert str(archives / "other.zip") in str(raised.value)
    assert not (archives.parent / "data" / "coco_captions").exists()


def test_other_captions_are_noted(archives: Path) -> None:
    def translate(images: list[Any]) -> None:
        images[0]["sentences"][0]["raw"] = "ein Hund"

    (archives / "dataset_coco.json").write_text(json.dumps(karpathy(translate)))
    said: list[str] = []
    prepare("coco", **given(archives, split_file=archives / "dataset_coco.json"), say=said.append)
    assert said[0].endswith("the captions of 1 image are not COCO's (first: COCO_train2014_000000000009.jpg)")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": ["train2014.zip"]}, r"6 of val2014 are missing \(first: COCO_val2014_.* pass .* with --images"),
        ({"images": ["caption_datasets.zip"]}, "3 of train2014 and 6 of val2014 are missing"),
        ({"images": ["absent"]}, "absent does not exist"),
        ({"images": ["photos.tar.gz"]}, r"photos\.tar\.gz is an archive that is not read; extract it"),
        ({"images": ["cut.zip"]}, r"cut\.zip is not a zip archive, or the end of it is missing; download it again"),
        ({"annotations": "train2014.zip"}, r"train2014\.zip contains none of these files: instances_train2014"),
        ({"annotations": "absent.zip"}, r"absent\.zip does not exist; check the path$"),
        ({"annotations": "annotations"}, r"instances_val2014\.json is missing: pass COCO's annotations_trainval2014"),
        ({"annotations": "damaged"}, r"instances_train2014\.json is damaged \('bbox' is missing\)"),
        (
            {"split_file": "absent.json"},
            r"absent\.json does not exist; check the path; dataset_coco\.json is in https://www\.kaggle",
        ),
        ({"split_file": "val2014.zip"}, r"val2014\.zip contains none of these files: dataset_coco\.json, coco_k"),
        ({"split_file": "empty"}, r"coco_karpathy_train\.json is missing; pass Karpathy's dataset_coco\.json"),
    ],
)
def test_missing_and_damaged_files(changed: dict[str, Any], message: str, archives: Path) -> None:
    (archives / "photos.tar.gz").write_bytes(b"\x1f\x8b")
    (archives / "cut.zip").write_bytes((archives / "train2014.zip").read_bytes()[:-30])
    for name in ("annotations", "damaged", "empty"):
        (archives / name).mkdir()
    train = annotations("instances", "train2014")
    (archives / "annotations" / "instances_train2014.json").write_text(json.dumps(train))
    del train["annotations"][0]["bbox"]
    (archives / "damaged" / "instances_train2014.json").write_text(json.dumps(train))
    options = {
        name: [archives / one for one in value] if isinstance(value, list) else archives / value
        for name, value in changed.items()
    }
    with pytest.raises(UserError, match=message) as raised:
        prepare("coco", **given(archives, **options))
    assert "\n" not in str(raised.value)


def test_a_damaged_photo_is_named(archives: Path) -> None:
    path = archives / "val2014.zip"
    content = path.read_bytes()
    path.write_bytes(content.replace(jpeg(6), jpeg(6)[:-20] + bytes(20)))
    with pytest.raises(UserError, match=r"2014\.zip/val2014/COCO_val2014_000000000006\.jpg cannot be read \(damaged"):
        prepare("coco", **given(archives))
    with zipfile.ZipFile(archives / "train2014.zip") as archive:
        archive.extractall(archives / "photos")
    path.write_bytes(content)
    photo = archives / "photos" / "train2014" / file_name(7, "train2014")
    photo.write_bytes(jpeg(7)[:200])
    with pytest.raises(UserError, match=r"000000000007\.jpg cannot be read \(.*\); download or extract it again"):
        prepare("coco", **given(archives, images=[archives / "photos", path]))
    assert not (archives.parent / "data" / "coco_captions").exists()


def test_coco_is_downloaded(served: Any, tmp_path: Path) -> None:
    data_dir, said = tmp_path / "data", list[str]()
    prepare("coco", data_dir=data_dir, progress=False, say=said.append)
    check_contents(data_dir)
    place = data_dir / "downloads" / "coco"
    names = ["annotations_trainval2014.zip", "caption_datasets.zip", "train2014.zip", "val2014.zip"]
    assert said[:4] == [f"coco_captions: downloaded {place / name}" for name in names]
    assert sorted(file.name for file in place.iterdir() if file.name[0] != ".") == names
    shutil.rmtree(data_dir / "coco_captions")
    served.asked.clear()
    prepare("coco", data_dir=data_dir, progress=False)
    assert served.asked == []  # the archives are still there


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_resumed(ranges: bool, served: Any, tmp_path: Path) -> None:
    cut = len(served.files["/train2014.zip"]) // 2
    # The annotations, the page that is gone, and the splits arrive as a whole.
    served.limits = [None, None, cut, 0]
    with pytest.raises(UserError, match=r"train2014\.zip stopped after .*; run the same command again to resume it"):
        prepare("coco", data_dir=tmp_path, download_dir=tmp_path / "zips", progress=False)
    assert (tmp_path / "zips" / "train2014.zip.part").stat().st_size == cut
    served.limits, served.ranges = [None], ranges
    served.asked.clear()
    prepare("coco", data_dir=tmp_path, download_dir=tmp_path / "zips", progress=False)
    assert served.asked == [("/train2014.zip", f"bytes={cut}-"), ("/val2014.zip", None)]
    check_contents(tmp_path)


def test_a_wrong_archive_is_refused(served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, whole = tmp_path / "zips", served.files["/val2014.zip"]
    command = ["data", "prepare", "coco", "--data-dir", str(tmp_path), "--download-dir", str(place)]

    def refusal() -> str:
        capsys.readouterr()
        assert main(command) == 2
        return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("downloading ")][-1]

    served.files["/val2014.zip"] = whole[:-1] + b"x"
    assert "/val2014.zip is not the published file: its SHA-256 starts with" in refusal()
    served.files["/val2014.zip"] = b"<html>"
    assert "val2014.zip is not the published file: the server sends 6 bytes instead of" in refusal()
    del served.files["/val2014.zip"]
    assert refusal().endswith(
        "val2014.zip can't be downloaded (the server answers 404 Not Found); download it by other means into "
        f"{place}, or pass it with --images"
    )
    (place / "val2014.zip").write_bytes(whole[:-1])
    assert f"val2014.zip has {len(whole) - 1:,} bytes instead of {len(whole):,}; delete it" in refusal()
    (place / "val2014.zip").write_bytes(whole)
    assert main(command) == 0


def test_without_a_network_the_addresses_of_the_files_are_printed(
    archives: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(downloads, "_open", lambda request, redirects: raise_unreachable())
    # The real archives need 41 GB, which the machine of the tests need not have.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**12))  # type: ignore
    data_dir = archives.parent / "data"
    assert main(["data", "prepare", "coco", "--data-dir", str(data_dir)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "annotations_trainval2014.zip can't be downloaded (no route); download it by other means" in err
    assert out.splitlines() == list(coco.GUIDE)
    # Only the splits are missing.
    photos = [f"--images={archives / name}" for name in NAMES[:2]]
    command = ["data", "prepare", "coco", "--data-dir", str(data_dir), *photos, f"--annotations={archives / NAMES[2]}"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "no copy of Karpathy's splits can be downloaded (https://huggingface.co/datasets/gpantaz/" in err
    assert "caption_datasets.zip: no route; https://github.com/Delphboy/" in err
    assert "dataset_coco.json: no route); pass it with --split-file; dataset_coco" in err


def raise_unreachable() -> None:
    raise downloads._Unreachable("no route")


def swapped(images: list[Any]) -> None:
    """Other splits of the same sizes."""
    for image in images:
        image["split"] = {6: "test", 3: "val"}.get(image["cocoid"], image["split"])


def test_a_copy_with_other_splits_of_the_same_sizes_is_not_used(served: Any, archives: Path) -> None:
    write_zip(archives / "other.zip", {"dataset_coco.json": json.dumps(karpathy(swapped)).encode()})
    served.files["/gone.zip"] = (archives / "other.zip").read_bytes()
    options = given(archives, split_file=None, download_dir=archives.parent / "zips")
    said: list[str] = []
    prepare("coco", **options, say=said.append)
    assert said[0] == f"coco_captions: downloaded {archives.parent / 'zips' / 'caption_datasets.zip'}"
    assert not (archives.parent / "zips" / "gone.zip").exists()
    check_contents(archives.parent / "data")


def test_a_file_of_splits_that_was_never_checked_is_downloaded_again(served: Any, archives: Path) -> None:
    place = archives.parent / "zips"
    place.mkdir()
    write_zip(place / "caption_datasets.zip", {"dataset_coco.json": json.dumps(karpathy(swapped)).encode()})
    said: list[str] = []
    prepare("coco", **given(archives, split_file=None, download_dir=place), say=said.append)
    path = place / "caption_datasets.zip"
    assert said[:2] == [
        f"coco_captions: {path} is not the published file; downloading it again",
        f"coco_captions: downloaded {path}",
    ]
    check_contents(archives.parent / "data")


def test_a_known_file_with_another_digest_is_refused(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, other = (json.dumps(karpathy(edit)).encode() for edit in (lambda images: None, swapped))
    assert len(true) == len(other)
    known = {len(true): ("dataset_coco.json", hashlib.sha256(true).hexdigest())}
    monkeypatch.setattr("imgcap_jax.data.builders.karpathy.KNOWN", known)
    prepare("coco", **given(archives))  # the true file, in its archive
    shutil.rmtree(archives.parent / "data")
    (archives / "dataset_coco.json").write_bytes(other)
    write_zip(archives / "other.zip", {"dataset_coco.json": other})
    for name in ("dataset_coco.json", "other.zip"):
        with pytest.raises(UserError, match=r"has the size of Karpathy's dataset_coco\.json, but another SHA-256"):
            prepare("coco", **given(archives, split_file=archives / name))


def extracted_photos(archives: Path, place: Path) -> None:
    for name in NAMES[:2]:
        with zipfile.ZipFile(archives / name) as archive:
            archive.extractall(place)


def resize(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for photo in source.glob("*/*.jpg"):
        Image.open(photo).resize((7, 5)).save(target / photo.name)


def test_resized_copies_are_not_used(archives: Path) -> None:
    photos = archives / "photos"
    extracted_photos(archives, photos)
    resize(photos, photos / "a_resized")
    prepare("coco", **given(archives, images=[photos]))
    check_contents(archives.parent / "data")
    shutil.rmtree(archives.parent / "data")
    with pytest.raises(
        UserError, match=r"jpg cannot be read \(it has 7 x 5 pixels instead of COCO's 14 x 10\); download"
    ):
        prepare("coco", **given(archives, images=[photos / "a_resized"]))


def test_photos_in_several_places(archives: Path) -> None:
    extracted_photos(archives, archives / "photos")
    options = given(archives, images=[archives / "photos", archives / "photos" / "val2014"])  # the same files
    prepare("coco", **options)
    check_contents(archives.parent / "data")
    shutil.rmtree(archives.parent / "data")
    places = [archives / "photos", archives / "val2014.zip"]
    with pytest.raises(
        UserError, match=r"6 photos found more than once \(first: .* and .*\); pass only one of these places"
    ):
        prepare("coco", **given(archives, images=places))
    # Archives next to their extracted folders are not opened.
    (archives / "photos" / "val2014.zip").write_bytes(b"damaged")
    prepare("coco", **given(archives, images=[archives / "photos"]))


def test_a_pipe_is_no_photo(archives: Path) -> None:
    extracted_photos(archives, archives / "photos")
    photo = archives / "photos" / "train2014" / file_name(7, "train2014")
    photo.unlink()
    os.mkfifo(photo)
    with pytest.raises(UserError, match=r"000000000007\.jpg cannot be read \(is a device or a pipe"):
        prepare("coco", **given(archives, images=[archives / "photos"]))


def test_different_files_of_one_name_in_an_archive(archives: Path) -> None:
    files = {f"{place}/dataset_coco.json": json.dumps(karpathy()).encode() for place in ("a", "b")}
    write_zip(archives / "same.zip", files)
    prepare("coco", **given(archives, split_file=archives / "same.zip"))
    shutil.rmtree(archives.parent / "data")
    write_zip(archives / "two.zip", {**files, "b/dataset_coco.json": b"{}"})
    with pytest.raises(UserError, match=r"two\.zip contains 2 different files dataset_coco\.json; extract it"):
        prepare("coco", **given(archives, split_file=archives / "two.zip"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--images=nowhere", "nowhere does not exist; check the path"),
        ("--split-file=nope", "nope does not exist; check the path"),
        ("--licence=mine", "--licence has no effect on 'coco', whose licence and source are known; leave it out"),
        ("--source-note=mine", "--source-note has no effect on 'coco'"),
    ],
)
def test_options_are_checked_although_coco_is_prepared(
    option: str, message: str, archives: Path, refused: Callable[..., str]
) -> None:
    prepare("coco", **given(archives))
    assert message in refused(["data", "prepare", "coco", "--data-dir", str(archives.parent / "data"), option])


def test_prepared_coco_is_listed(archives: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare("coco", **given(archives))
    command = ["data", "list", "--data-dir", str(archives.parent / "data")]
    assert main(command) == 0
    assert "train 5, val 3, test 1" in capsys.readouterr().out
    (folder / "dataset_info.json").unlink()
    assert main(command) == 0
    assert "1.1.0/dataset_info.json is missing: delete its folder" in capsys.readouterr().out


def test_disk_space_is_checked_first(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(len(served.files[f"/{name}"]) for name in NAMES[:2])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * total))  # type: ignore
    with pytest.raises(UserError, match=r"GB needed, .* GB free; use another --download-dir or --data-dir"):
        prepare("coco", data_dir=tmp_path / "data", progress=False)
    assert served.asked == []


def test_disk_space_for_given_photos_is_checked(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))  # type: ignore
    with pytest.raises(UserError, match=r"GB needed, .* GB free; use another --data-dir"):
        prepare("coco", **given(archives))


@pytest.mark.slow
def test_a_killed_process_leaves_the_archives_and_the_next_one_completes(archives: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from imgcap_jax.data.builders import coco, coco_builder
        from imgcap_jax.data.prepare import prepare
        archives = Path(sys.argv[1])
        coco.SPLITS = {"train": 3, "restval": 2, "val": 3, "test": 1}
        coco_builder.CocoBuilder._read = lambda self, i: time.sleep(600)
        prepare("coco", data_dir=archives.parent / "data", images=[archives], annotations=archives / sys.argv[2],
                split_file=archives / sys.argv[3], progress=False)
        """
    home = archives.parent / "data" / "coco_captions"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), archives, *NAMES[2:]])
    try:
        while not list(home.glob("incomplete.*/*/*/*incomplete*")):
            assert process.poll() is None
            time.sleep(0.1)
        (leftover,) = home.glob("incomplete.????????")
        prepare("coco", **given(archives))  # at the same time
        assert leftover.exists()
        shutil.rmtree(home / "2014")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    prepare("coco", **given(archives))
    assert not leftover.exists()
    check_contents(archives.parent / "data")


@pytest.mark.slow
def test_records_equal_those_of_the_official_builder(
    archives: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Needs TensorFlow: `pip install tensorflow-cpu` on a Python that has it, then run the slow tests of this file."""
    pytest.importorskip("tensorflow", reason="the official builder needs TensorFlow")
    import tensorflow_datasets as tfds
    from tensorflow_datasets.object_detection.coco_captions import CocoCaptions

    def extracted(self: Any, urls: dict[str, str]) -> dict[str, str]:
        folders = {}
        for key, url in urls.items():
            folders[key] = str(tmp_path / "extracted" / url.rsplit("/", 1)[1])
            with contextlib.suppress(FileNotFoundError), zipfile.ZipFile(archives / url.rsplit("/", 1)[1]) as archive:
                archive.extractall(folders[key])
        return folders

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", extracted)
    official = CocoCaptions(data_dir=tmp_path / "official", config="2014")
    official.download_and_prepare(file_format="array_record")
    folder = prepare("coco", **given(archives))
    ours = tfds.builder_from_directory(folder)
    assert json.loads((folder / "features.json").read_text()) == json.loads(
        (Path(official.data_dir) / "features.json").read_text()
    )
    assert ours.info.features["objects"]["label"].names == official.info.features["objects"]["label"].names
    assert set(ours.info.splits) == set(official.info.splits) == set(SPLITS)
    raw = {"image": tfds.decode.SkipDecoding()}
    for split in SPLITS:
        pairs = list(
            zip(ours.as_data_source(split, decoders=raw), official.as_data_source(split, decoders=raw), strict=True)
        )
        assert len(pairs) == len(SPLITS[split])
        for one, other in pairs:  # in the same order
            assert flat(one) == flat(other)
    # The official class reads our records, and would not build them again.
    opened = CocoCaptions(data_dir=archives.parent / "data", config="2014")
    opened.download_and_prepare()
    assert len(opened.as_data_source("val")) == len(SPLITS["val"])
    # Our reader reads the official records.
    assert contents(tmp_path / "official") == contents(archives.parent / "data")


def flat(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: flat(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [flat(one) for one in value]
    return (value.dtype.str, value.tolist()) if isinstance(value, np.ndarray | np.generic) else value


def test_a_coco_training_split_of_the_wrong_size_is_refused(archives: Path, tmp_path: Path) -> None:
    """Prepares the same images as a folder under the official name."""
    for name in NAMES:
        with zipfile.ZipFile(archives / name) as archive:
            archive.extractall(tmp_path / "photos")
    found = scan_folder(tmp_path / "photos" / "dataset_coco.json")
    builder = FolderBuilder(found, name=coco.NAME, data_dir=tmp_path / "data", origin=coco.ORIGIN)
    builder.download_and_prepare(file_format="array_record")
    coco.SPLITS["train"] = 82_783
    with pytest.raises(UserError, match=r"5 training images .* not COCO's 82,785"):
        open_source("coco", "train", tmp_path / "data")
    val = open_source("coco", "val", tmp_path / "data")
    assert {example.image_id for example in val} == set(SPLITS["val"])  # the COCO id, not Karpathy's imgid
