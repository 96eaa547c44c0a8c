"""The vocabulary: which words have ids, their order, encoding and decoding, saving and loading."""

import json
from pathlib import Path

import numpy as np
import pytest

from imgcap_jax.data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.tokenizers import Characters

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


def test_a_vocabulary_of_characters(tmp_path: Path) -> None:
    vocabulary = Vocabulary.build(["红色方块。", "红色的dog <unk>", "red dog"], 1, Characters())
    assert vocabulary.words[4:] == ("dog", "红", "色", "red", "块", "方", "的")
    encoded = vocabulary.encode("红色Dog", 7)
    assert encoded.tolist() == [BOS, *vocabulary.ids(["红", "色", "dog"]), EOS, PAD, PAD]
    assert vocabulary.decode([*vocabulary.ids(["红", "色", "dog", "red"]), EOS]) == "红色dog red"
    assert vocabulary.decode_words(encoded) == ["红", "色", "dog"]
    assert ["色" in vocabulary, "狗" in vocabulary, "<unk>" in vocabulary] == [True, False, False]
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    assert json.loads(path.read_text())["tokenizer"] == "characters"
    assert Vocabulary.load(path, Characters()) == vocabulary
    with pytest.raises(UserError, match=r"built with the tokenizer 'characters', but that of the experiment is 'ptb"):
        Vocabulary.load(path)


def test_a_file_of_the_default_names_its_tokenizer(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    document = json.loads(path.read_text())
    assert document["tokenizer"] == "ptb-coco"
    del document["tokenizer"]
    path.write_text(json.dumps(document))
    assert Vocabulary.load(path) == vocabulary


def test_vocabularies_of_different_tokenizers_are_not_joined(vocabulary: Vocabulary) -> None:
    characters = Vocabulary.build(["红色"], 1, Characters())
    assert characters.extended(Vocabulary.build(["红的"], 1, Characters())).words[4:] == ("红", "色", "的")
    with pytest.raises(UserError, match=r"another tokenizer \(ptb-coco, here characters\)"):
        vocabulary.extended(characters)
