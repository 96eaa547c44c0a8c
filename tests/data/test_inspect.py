"""Statistics of a dataset, compared with a count by hand."""

import json
from pathlib import Path

import pytest
from PIL import Image

from imgcap_jax.cli.main import main
from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.inspect import inspect
from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.sources import open_source
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.special_tokens import EOS, PAD, UNK
from imgcap_jax.tokenizers import Characters


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


@pytest.mark.parametrize(
    ("splits", "words", "missing"),
    [
        (["train"], "no word", ["val"]),
        (["val"], "no word", ["train"]),
        (["train", "val"], "no word", []),
        (["train"] * 9 + ["test"], "2 words", ["val"]),
    ],
)
def test_tiny_datasets_are_reported_without_nonsense(
    splits: list[str], words: str, missing: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for number, split in enumerate(splits):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "split": split, "captions": [f"a dog {number}"]}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    prepare(tmp_path, name="tiny", data_dir=tmp_path / "data", progress=False)
    sheet = tmp_path / "sheet.png"
    assert main(["data", "inspect", "tiny", "--data-dir", str(tmp_path / "data"), "--sheet", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert f"vocabulary of the {splits[0]} captions: {words} with at least 5 occurrences" in printed
    (row,) = (line.split()[1:] for line in printed.splitlines() if line.startswith(f"{splits[0]} "))
    count = str(splits.count(splits[0]))
    assert row[:4] == [count, count, "1.00", "3.0"]
    assert row[-1] == ("-" if words == "no word" else "66.67%")
    assert "nan" not in printed
    assert [line.split()[5].rstrip(",") for line in printed.splitlines() if "there is no split" in line] == missing
    with Image.open(sheet) as picture:
        assert picture.width > 250


def test_captions_without_blanks(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [
        {"image": f"{n}.png", "captions": [f"红色的方块在{'上下左右'[n % 4]}面。", "一个蓝色的圆"], "split": "train"}
        for n in range(10)
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said: list[str] = []
    prepare(tmp_path, name="chinese", data_dir=tmp_path / "data", progress=False, say=said.append)
    assert "chinese: note: the captions do not seem to be separated into words" in "\n".join(said)
    words = inspect("chinese", tmp_path / "data", min_count=5)
    assert words.splits["train"].mean_words < 2
    assert "note: the captions do not seem to be separated into words" in "\n".join(words.lines())
    characters = inspect("chinese", tmp_path / "data", min_count=1, tokenizer=Characters())
    assert characters.splits["train"].word_counts == (*[0] * 6, 10, 0, 10)  # 6 and 8 characters
    assert characters.notes == ("there is no split val, which training needs",)
    assert "(tokenizer characters)" in "\n".join(characters.lines())
    source = open_source("chinese", "train", tmp_path / "data")
    vocabulary = Vocabulary.build(["红色的"], 1, Characters())
    # References of self-critical training: unknown characters have ids of their own.
    table = CaptionTable.as_references([source.first(1)], vocabulary, eos=True)
    assert table.tokens.shape == (2, 9)
    assert [row[row != PAD].tolist().count(EOS) for row in table.tokens] == [1, 1]
    assert [len(row[row != PAD]) for row in table.tokens] == [9, 7]  # 8 and 6 characters, and eos
    known = {vocabulary.words[number] for number in table.tokens[0] if UNK < number < len(vocabulary)}
    assert known == set("红色的")
    assert table.words == len(vocabulary) + len(set("方块在上面一个蓝圆"))
