"""Which captions count as degenerate, and which do not."""

import json
from pathlib import Path

import pytest

from imgcap_jax.metrics.degeneration import Degeneration, repeats
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


def test_shares_and_warnings() -> None:
    good = [f"a dog number {i} runs on the beach".split() for i in range(97)]
    found = Degeneration.of([*good, ["a", "man", "with", "a"], ["dog", "dog"], []], unfinished=0.01)
    assert found == Degeneration(100, (97 * 8 + 6) / 100, 0.01, 0.01, 0.01)
    references = Degeneration(500, 9.0, 0.0, 0.0)
    assert found.warnings(references) == ()
    worse = Degeneration(1000, 6.0, 0.05, 0.04, 0.03)
    said = worse.warnings(references)
    assert len(said) == 4
    for line, part in zip(said, ("5.0 % of the captions end with", "4.0 %", "3.0 %", "6.0 words"), strict=True):
        assert part in line
    # Only the missing ends are worse than in these references.
    assert worse.warnings(Degeneration(500, 6.0, 0.05, 0.04))[:1] == (said[2],)


def test_small_excess_in_few_captions_gives_no_warning() -> None:
    references = Degeneration(5000, 10.9, 0.013, 0.002)
    assert Degeneration(16, 10.0, 1 / 16, 1 / 16, 1 / 16).warnings(references) == ()
    assert len(Degeneration(16, 10.0, 8 / 16, 8 / 16, 8 / 16).warnings(references)) == 3


def test_human_captions_give_no_warning(shared: Path) -> None:
    karpathy = json.loads((shared / "flickr8k" / "dataset_flickr8k.json").read_text())
    by_person = [[tokenize(image["sentences"][k]["raw"]) for image in karpathy["images"]] for k in range(5)]
    everyone = Degeneration.of(caption for captions in by_person for caption in captions)
    for captions in by_person:
        assert Degeneration.of(captions, unfinished=0.0).warnings(everyone) == ()
