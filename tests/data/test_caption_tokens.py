"""The tokens of a split: counted, encoded as the vocabulary does, and computed once per source."""

import gc

import numpy as np
import pytest

from imgcap_jax.data import caption_tokens
from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.caption_tokens import CaptionTokens, total_counts
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.tokenizers import DEFAULT, Characters, PennTreebank

IMAGES = [["A dog runs.", "the dog"], [], ["", "a very long caption of a dog that runs", "<unk> 狗"]]


class Source:
    """Stands for a source of captions. Counts how often it is read."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return len(IMAGES)

    def captions(self, i: int) -> list[str]:
        self.read += 1
        return IMAGES[i]


def test_tokens_are_counted() -> None:
    tokens = CaptionTokens.of_images(IMAGES, DEFAULT)
    assert tokens.words[:4] == ("a", "dog", "runs", "the")
    assert tokens.lengths.tolist() == [3, 2, 0, 9, 2]
    assert tokens.per_image.tolist() == [2, 0, 3]
    assert tokens.places.tolist() == [*range(3), *range(2), *range(9), *range(2)]
    assert [tokens.words[n] for n in tokens.numbers[:5]] == ["a", "dog", "runs", "the", "dog"]
    assert tokens.characters == len("Adogruns.thedogaverylongcaptionofadogthatruns<unk>狗")
    counts = total_counts([tokens, CaptionTokens.of_images([["a dog"]], DEFAULT)])
    assert (counts["a"], counts["dog"], counts["狗"]) == (4, 4, 1)
    assert CaptionTokens.of_images([], DEFAULT).counts() == {}


@pytest.mark.parametrize("length", [3, 5, 11, 12])
def test_rows_are_those_of_the_vocabulary(length: int) -> None:
    vocabulary = Vocabulary.build(["a dog runs", "the very"], 1)
    source = Source()
    table = CaptionTable.for_training([source, source], vocabulary, length)  # type: ignore[list-item]
    captions = [caption for image in IMAGES * 2 for caption in image]
    np.testing.assert_array_equal(table.tokens, [vocabulary.encode(caption, length) for caption in captions])
    assert table.tokens.dtype == np.int32
    assert table.counts(np.arange(6)).tolist() == [2, 0, 3, 2, 0, 3]


def test_a_source_is_tokenised_once_per_tokeniser() -> None:
    source = Source()
    gc.collect()
    kept = len(caption_tokens._KEPT)
    first = CaptionTokens.of(source, PennTreebank())  # type: ignore[arg-type]
    assert CaptionTokens.of(source, DEFAULT) is first  # type: ignore[arg-type]
    assert source.read == len(IMAGES)
    assert "狗" in CaptionTokens.of(source, Characters()).words  # type: ignore[arg-type]
    assert source.read == 2 * len(IMAGES)
    del source
    gc.collect()
    assert len(caption_tokens._KEPT) == kept
