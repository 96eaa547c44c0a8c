"""Which captions count as degenerate, and which do not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from imgcap_jax.metrics import degeneration_device
from imgcap_jax.metrics.degeneration import Degeneration, repeated_words, repeats
from imgcap_jax.metrics.degeneration_device import FunctionWords
from imgcap_jax.special_tokens import EOS, PAD
from imgcap_jax.text import tokenize


@pytest.mark.parametrize(
    ("caption", "bad"),
    [
        ("a man in a red shirt", False),
        ("the the dog", True),
        ("a man in a man in", True),
        ("a woman and a woman", False),  # "a woman" twice, but not in a row
        ("a dog on a beach on a beach", True),
        ("two dogs and two cats play with two balls", False),
        ("a man in a red shirt and a woman in a red shirt", True),  # "in a red shirt"
        ("a black and white dog jumps", False),
        ("", False),
        ("dog", False),
    ],
)
def test_repetitions(caption: str, bad: bool) -> None:
    assert repeats(caption.split()) is bad


@pytest.mark.parametrize(
    ("caption", "count"),
    [
        ("a man sits on a car in a car", 1),
        ("people on a bus with a bus", 1),
        ("a dog in the window of a window", 1),
        ("a man in a hat and a hat and hat", 2),
        ("a man in a red jacket and a red jacket is skiing", 1),  # a phrase
        ("a man in a red shirt and a man in a red shirt", 1),
        ("a man in a red shirt and a woman in a red shirt", 0),
        ("a black dog and a white dog", 0),
        ("a man and another man", 0),
        ("two men and a man", 0),
        ("a black and black dog", 1),
        ("a baby is playing with a baby", 1),
        ("a white dog is playing with a white dog", 1),
        ("a white dog is playing with a brown dog", 0),
        ("a man on a bench and a woman on a bench", 0),
        ("a soccer player is playing soccer with a ball", 0),
        ("a man jumps up and up on the on the grass", 0),  # function words
        ("two men stand side by side", 0),
        ("a man plays tennis on a tennis court", 1),  # correct English, which the definition cannot distinguish
        ("a train at a train station", 1),
        ("dog dog dog", 2),
        ("the the", 0),
        ("", 0),
    ],
)
def test_repeated_words(caption: str, count: int) -> None:
    assert repeated_words(caption.split()) == count


FUNCTION_IDS = FunctionWords((4, 5), conjunctions=(5,))


def completions(words: Sequence[int]) -> set[int]:
    """The words that would be repeated words after these, from the text of each continued caption."""
    texts = {4: "a", 5: "and"}

    def count(ids: Sequence[int]) -> int:
        return repeated_words([texts.get(word, str(word)) for word in ids])

    return {word for word in range(EOS + 1, 9) if count([*words, word]) > count(words)}


@pytest.mark.parametrize(
    ("length", "platform"), [(1, "cpu"), (2, "cpu"), (3, "cpu"), (8, "cpu"), (13, "cpu"), (8, "tpu")]
)
def test_device_finds_the_repeated_words_of_plain_python(length: int, platform: str, as_on: Any) -> None:
    as_on(platform)
    rng = np.random.default_rng(length)
    words = [rng.integers(EOS + 1, 9, rng.integers(0, length + 1)).tolist() for _ in range(300)]
    ended = np.array([(row + [EOS] * (len(row) < length) + [PAD] * length)[:length] for row in words], np.int32)
    repeated = jax.jit(lambda tokens: degeneration_device.repeated_words(tokens, FUNCTION_IDS))
    counts = repeated(ended.reshape(100, 3, length))
    assert np.ravel(counts).tolist() == [sum(row[i] in completions(row[:i]) for i in range(len(row))) for row in words]
    assert counts.any() == (length > 1)


def test_shares_and_warnings() -> None:
    good = [f"a dog number {i} runs on the beach".split() for i in range(96)]
    bad = ["a man with a", "dog dog", "", "a hat and a hat"]
    found = Degeneration.of([*good, *(caption.split() for caption in bad)], unfinished=0.01)
    assert found == Degeneration(100, (96 * 8 + 11) / 100, 0.01, 0.01, 0.02, 0.01)
    references = Degeneration(500, 9.0, 0.0, 0.0, 0.0)
    assert found.warnings(references) == ()
    worse = Degeneration(1000, 6.0, 0.05, 0.04, 0.07, 0.03)
    said = worse.warnings(references)
    assert len(said) == 5
    parts = ("5.0 % of the captions end with", "4.0 %", "7.0 % of the captions repeat a word", "3.0 %", "6.0 words")
    for line, part in zip(said, parts, strict=True):
        assert part in line
    assert "--decode.forbid-repeated-words true" in said[2]
    # Only the missing ends are worse than in these references.
    assert worse.warnings(Degeneration(500, 6.0, 0.05, 0.04, 0.07)) == (said[3],)


def test_order_of_captions_does_not_matter() -> None:
    """The language is that of all captions, not of those before."""
    captions = [["dog", "dog"], ["a", "man"]]
    assert Degeneration.of(captions).repeated_words == Degeneration.of(captions[::-1]).repeated_words == 0.5


def test_words_are_not_repeated_in_a_language_without_the_function_words() -> None:
    """Reduplication, as in Chinese, counts only as a repetition."""
    captions = [list("人人看球"), list("一个人看看球")]
    found = Degeneration.of(captions)
    assert (found.repetitions, found.repeated_words) == (1.0, 0.0)


def test_small_excess_in_few_captions_gives_no_warning() -> None:
    references = Degeneration(5000, 10.9, 0.013, 0.002, 0.003)
    assert Degeneration(16, 10.0, *[1 / 16] * 4).warnings(references) == ()
    assert len(Degeneration(16, 10.0, *[8 / 16] * 4).warnings(references)) == 4


def test_human_captions_give_no_warning(shared: Path) -> None:
    karpathy = json.loads((shared / "flickr8k" / "dataset_flickr8k.json").read_text())
    by_person = [[tokenize(image["sentences"][k]["raw"]) for image in karpathy["images"]] for k in range(5)]
    everyone = Degeneration.of(caption for captions in by_person for caption in captions)
    for captions in by_person:
        assert Degeneration.of(captions, unfinished=0.0).warnings(everyone) == ()


def test_summary_has_the_shares_that_are_worse_than_those_of_the_references() -> None:
    references = Degeneration(500, 10.0, 0.0, 0.0, 0.2)
    assert Degeneration(200, 10.0, 1.0, 0.3, 0.2, 0.0).summary(references) == (
        "captions: bad endings 100 %, repeated phrases 30 %"
    )
    assert references.summary(references) == ""
