"""Prepares Flickr8k and the COCO subset with the folder builder."""

import json
from pathlib import Path

from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.sources import describe, open_source


def test_flickr8k(shared: Path, tmp_path: Path) -> None:
    folder = shared / "flickr8k"
    prepare(folder, data_dir=tmp_path, progress=False)
    listed = json.loads((folder / "dataset_flickr8k.json").read_text(encoding="utf-8"))["images"]
    assert describe("flickr8k", tmp_path).skipped == ()
    for split, count in (("train", 6000), ("val", 1000)):
        source = open_source("flickr8k", split, tmp_path)
        entries = [entry for entry in listed if entry["split"] == split]
        assert len(source) == count
        assert source.filenames() == [entry["filename"] for entry in entries]
        for i, entry in enumerate(entries):
            # Sentences are unchanged except for leading, trailing and repeated spaces.
            raw = tuple(" ".join(sentence["raw"].split()) for sentence in entry["sentences"])
            assert source.captions(i) == raw
        for i in range(0, count, 97):
            example = source[i]
            assert example.image == (folder / "images" / example.filename).read_bytes()
            assert example.captions == source.captions(i)


def test_coco_subset(shared: Path, tmp_path: Path) -> None:
    folder = shared / "coco_subset"
    prepare(folder / "annotations" / "captions_val.json", name="coco_val", data_dir=tmp_path, progress=False)
    source = open_source("coco_val", "val", tmp_path)
    listed = json.loads((folder / "annotations" / "captions_val.json").read_text(encoding="utf-8"))
    assert source.image_ids() == [image["id"] for image in listed["images"]]
    assert sum(len(source.captions(i)) for i in range(len(source))) == len(listed["annotations"])
    assert source[7].image == (folder / "images" / source[7].filename).read_bytes()
