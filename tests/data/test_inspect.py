"""Statistics of a dataset, compared with a count by hand."""

import json
from pathlib import Path

import pytest
from PIL import Image

from imgcap_jax.data.inspect import inspect
from imgcap_jax.data.prepare import prepare


def test_counts_lengths_and_coverage(tmp_path: Path) -> None:
    lists = {
        "a.png": ("train", ["A dog runs.", "a dog"]),
        "b.png": ("train", ["a cat"]),
        "c.png": ("val", ["A zebra, a dog!"]),
    }
    for number, name in enumerate(lists):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    lines = [
        json.dumps({"image": name, "split": split, "captions": captions}) for name, (split, captions) in lists.items()
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    prepare(tmp_path, name="tiny", data_dir=tmp_path / "data", licence="CC0", progress=False)
    report = inspect("tiny", tmp_path / "data", min_count=2)
    train, val = report.splits["train"], report.splits["val"]
    assert report.vocabulary_size == 4 + 2  # a and dog
    assert (train.images, train.captions, train.captions_per_image) == (2, 3, (1, 1.5, 2))
    assert train.word_counts == (0, 0, 2, 1)  # punctuation does not count as a word
    assert train.mean_words == pytest.approx(7 / 3)
    assert [train.percentile_words(p) for p in (50, 66, 67, 100)] == [2, 2, 3, 3]
    assert train.share_longer(2) == pytest.approx(1 / 3)
    assert val.known == pytest.approx(3 / 4)  # all except "zebra"
    text = "\n".join(report.lines())
    assert "CC0" in text
    assert str(tmp_path) in text
    assert "75.00%" in text
