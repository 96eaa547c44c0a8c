"""The vocabulary: which words have ids, their order, encoding and decoding, saving and loading."""

import json
from pathlib import Path

import numpy as np
import pytest

from imgcap_jax.data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from imgcap_jax.errors import UserError

CAPTIONS = ["A dog runs.", "a dog sits", "the cat sits, a dog!", "a <unk> <pad>"]


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary.build(CAPTIONS, min_count=2)


def test_order_is_by_count_then_alphabetical() -> None:
    built = Vocabulary.build(CAPTIONS, min_count=1)
    assert built.words == ("<pad>", "<bos>", "<eos>", "<unk>", "a", "dog", "sits", "cat", "runs", "the")
    assert built.counts == (0, 0, 0, 2, 4, 3, 2, 1, 1, 1)
    assert Vocabulary.build(reversed(CAPTIONS), min_count=1) == built


def test_rare_words_are_unknown(vocabulary: Vocabulary) -> None:
    assert vocabulary.words[4:] == ("a", "dog", "sits")
    assert vocabulary.counts[UNK] == 5
    assert len(vocabulary) == 7


def test_encode(vocabulary: Vocabulary) -> None:
    encoded = vocabulary.encode("A cat sits.", 6)
    assert encoded.dtype == np.int32
    assert encoded.tolist() == [BOS, 4, UNK, 6, EOS, PAD]


def test_cut_caption_has_no_eos(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode("a dog sits", 5).tolist() == [BOS, 4, 5, 6, EOS]
    assert vocabulary.encode("a dog sits a", 5).tolist() == [BOS, 4, 5, 6, PAD]


def test_special_tokens_in_a_caption_are_unknown_words(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode("<pad> <eos> dog", 6).tolist() == [BOS, UNK, UNK, 5, EOS, PAD]


def test_decode_stops_at_eos(vocabulary: Vocabulary) -> None:
    assert vocabulary.decode(np.array([BOS, 4, 5, PAD, UNK, EOS, 6, EOS])) == "a dog <unk>"
    assert vocabulary.decode([EOS]) == ""


def test_coverage_counts_tokens(vocabulary: Vocabulary) -> None:
    assert vocabulary.coverage(["a cat", "a dog sits"]) == pytest.approx(4 / 5)


def test_save_and_load(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    assert Vocabulary.load(path) == vocabulary
    assert [file.name for file in tmp_path.iterdir()] == ["vocabulary.json"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        json.dumps({"words": ["a", "b"], "counts": [1, 2]}),
        json.dumps({"words": ["<pad>", "<bos>", "<eos>", "<unk>", "a", "a"], "counts": [0] * 6}),
        json.dumps({"words": ["<pad>", "<bos>", "<eos>", "<unk>", "a"], "counts": [0] * 4}),
        json.dumps({"words": ["<pad>", "<bos>", "<eos>", "<unk>", ["a"]], "counts": [0] * 5}),
    ],
)
def test_error_of_a_bad_file_names_it_on_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "vocabulary.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        Vocabulary.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_without_frequent_words_names_min_count() -> None:
    with pytest.raises(UserError, match=r"no word occurs 9 times.*'a', 4 times.*min-count"):
        Vocabulary.build(CAPTIONS, min_count=9)
    with pytest.raises(UserError, match="there are none"):
        Vocabulary.build([], min_count=1)
