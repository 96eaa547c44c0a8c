"""The official TFDS coco_captions, built by its own builder from small archives with the layout of COCO's."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.data.builders import coco
from imgcap_jax.data.builders.folder import FolderBuilder, scan_folder
from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.sources import check_dataset, describe, open_source
from imgcap_jax.errors import UserError

# Image ids by Karpathy's split. The images of train are in COCO's train2014, all others in its val2014.
SPLITS = {"train": [9, 5, 7], "restval": [2, 4], "val": [1], "test": [3]}


def file_name(image_id: int, place: str) -> str:
    return f"COCO_{place}_{image_id:012d}.jpg"


def jpeg(image_id: int) -> bytes:
    pixels = np.random.default_rng(image_id).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def archives(tmp_path: Path) -> dict[str, Path]:
    """Folders with the layout of the extracted archives of COCO and of Karpathy's splits, by archive name."""
    root = tmp_path / "archives"
    annotations = root / "annotations" / "annotations"
    annotations.mkdir(parents=True)
    places = {
        "train2014": SPLITS["train"],
        "val2014": [i for s in ("restval", "val", "test") for i in SPLITS[s]],
    }
    for place, ids in places.items():
        images = root / place / place
        images.mkdir(parents=True)
        for i in [*ids, 99]:  # 99 is an image that is not in Karpathy's list
            (images / file_name(i, place)).write_bytes(jpeg(i))
        described = {
            "categories": [{"id": number, "name": f"thing {number}"} for number in range(1, 81)],
            "images": [{"id": i, "file_name": file_name(i, place), "width": 14, "height": 10} for i in [*ids, 99]],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 18, "bbox": [1, 1, 5, 5], "area": 25.0, "iscrowd": 0}
                for i in ids[1:]
            ],
        }
        (annotations / f"instances_{place}.json").write_text(json.dumps(described))
    karpathy = root / "caption_datasets"
    karpathy.mkdir()
    listed = [
        {
            "filename": file_name(i, place := "train2014" if split == "train" else "val2014"),
            "filepath": place,
            "cocoid": i,
            "imgid": 0,
            "split": split,
            "sentences": [{"raw": f"A dog, image {i}.", "sentid": 100 + i, "tokens": ["wrong"]}] * 5,
        }
        for split, ids in SPLITS.items()
        for i in ids
    ]
    (karpathy / "dataset_coco.json").write_text(json.dumps({"images": listed}))
    return {
        "train2014.zip": root / "train2014",
        "val2014.zip": root / "val2014",
        "annotations_trainval2014.zip": root / "annotations",
        "caption_datasets.zip": karpathy,
    }


def test_preparing_without_tensorflow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorflow" else found(name, *rest)
    )
    with pytest.raises(UserError, match=r"pip install 'imgcap_jax\[coco\]'"):
        prepare("coco", data_dir=tmp_path, progress=False)


def test_a_built_dataset_is_read_and_is_up_to_date(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TensorFlow: a dataset of scenes stands for what the official builder writes."""

    def build(data_dir: Path, download_dir: Path | None = None) -> Path:
        folder = data_dir / coco.NAME / coco.CONFIG / "1.1.0"
        shutil.copytree(next((tiny_data / "scenes").iterdir()), folder)
        for name in ("origin.json", "skipped.json", "SHA256SUMS"):  # which only this package writes
            (folder / name).unlink()
        return folder

    monkeypatch.setattr(coco, "build", build)
    monkeypatch.setattr(coco, "TRAIN_IMAGES", 40)
    folder = prepare("coco", data_dir=tmp_path, progress=False)
    assert (folder / "SHA256SUMS").is_file()
    assert describe("coco", tmp_path).source == coco.ORIGIN.source
    assert len(open_source("coco", "val", tmp_path)) == 8
    assert check_dataset("coco", tmp_path) == []
    said: list[str] = []
    assert prepare("coco", data_dir=tmp_path, progress=False, say=said.append) == folder
    assert said == [f"coco_captions: already prepared in {folder}"]


def test_the_official_builder(archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorflow", reason="the official builder needs TensorFlow (extra coco)")
    import tensorflow_datasets as tfds

    def extracted(self: Any, urls: dict[str, str]) -> dict[str, str]:
        return {key: str(archives[url.rsplit("/", 1)[1]]) for key, url in urls.items()}

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", extracted)
    data_dir = tmp_path / "data"
    with pytest.raises(UserError, match=r"5 training images .* not COCO's 113,287"):
        prepare("coco", data_dir=data_dir, progress=False)
    monkeypatch.setattr(coco, "TRAIN_IMAGES", 5)
    folder = prepare("coco", data_dir=data_dir, progress=False)
    assert folder == data_dir / "coco_captions" / "2014" / "1.1.0"

    reader = """
        import sys
        from pathlib import Path
        from imgcap_jax.data.builders import coco
        from imgcap_jax.data.sources import open_source
        coco.TRAIN_IMAGES = 5
        for split in ("train", "val", "test"):
            source = open_source("coco", split, Path(sys.argv[1]))
            for i, example in enumerate(source):
                row = split, example.image_id, example.filename, example.image.hex()
                print(*row, "|".join(example.captions))
                assert source.captions(i) == example.captions
        assert "tensorflow" not in sys.modules
        """
    read = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(reader), str(data_dir)], capture_output=True, text=True
    )
    assert read.returncode == 0, read.stderr
    captions = "|".join(["A dog, image {}."] * 5)
    expected = {
        " ".join(
            [
                "train" if split == "restval" else split,
                str(i),
                file_name(i, "train2014" if split == "train" else "val2014"),
                jpeg(i).hex(),
                captions.format(*[i] * 5),
            ]
        )
        for split, ids in SPLITS.items()
        for i in ids
    }
    assert set(read.stdout.splitlines()) == expected


def test_a_coco_training_split_of_the_wrong_size_is_refused(archives: dict[str, Path], tmp_path: Path) -> None:
    """Prepares the same images as a folder under the official name, which needs no TensorFlow."""
    folder = archives["train2014.zip"].parent
    (archives["caption_datasets.zip"] / "dataset_coco.json").rename(folder / "dataset_coco.json")
    contents = scan_folder(folder / "dataset_coco.json")
    builder = FolderBuilder(contents, name=coco.NAME, data_dir=tmp_path / "data", origin=coco.ORIGIN)
    builder.download_and_prepare(file_format="array_record")
    with pytest.raises(UserError, match=r"5 training images .* not COCO's 113,287"):
        open_source("coco", "train", tmp_path / "data")
    val = open_source("coco", "val", tmp_path / "data")
    assert [example.image_id for example in val] == SPLITS["val"]  # the COCO id, not Karpathy's imgid
