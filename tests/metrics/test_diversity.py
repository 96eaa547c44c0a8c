"""Diversity, compared with values worked out by hand."""

import math

import pytest

from imgcap_jax.metrics.diversity import diversity, set_diversity
from imgcap_jax.tokenizers import Characters


def test_diversity_of_one_caption_per_image() -> None:
    found = diversity(["A dog runs.", "a dog runs", "a cat"], training=["The cat", "a dog runs!"])
    assert found.vocabulary == 4
    assert found.length == pytest.approx(8 / 3)
    assert found.distinct == (pytest.approx(4 / 8), pytest.approx(3 / 8))
    assert found.unique == pytest.approx(1 / 3)
    assert found.novel == pytest.approx(1 / 3)
    assert diversity(["a dog"]).novel is None


REFERENCES = {1: ["a dog runs fast"], 2: ["two cats sleep there"], 3: ["some people ski down"]}


def self_cider(captions: list[str]) -> float:
    found = set_diversity({1: captions}, REFERENCES)
    assert found is not None
    return found.self_cider


def test_self_cider_of_identical_and_of_disjoint_captions() -> None:
    assert self_cider(["a dog runs fast"] * 5) == pytest.approx(0, abs=1e-9)
    assert self_cider(["a dog runs fast", "two cats sleep there", "some people ski down"]) == pytest.approx(1)


def test_self_cider_of_two_captions() -> None:
    """The kernel is [[1, c], [c, 1]], with eigenvalues 1 + c and 1 - c."""
    # Common n-grams: three of four words, two of three bigrams, one of two trigrams, no 4-gram. All have the same idf.
    cosine = (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4
    large, small = math.sqrt(1 + cosine), math.sqrt(1 - cosine)
    assert self_cider(["a dog runs fast", "a dog runs there"]) == pytest.approx(-math.log2(large / (large + small)))


def test_self_cider_without_positive_idf_is_nan() -> None:
    found = set_diversity(
        {1: ["a dog", "two cats"], 2: ["the end", "no more"]}, {1: ["a dog two cats the end no more"]}
    )
    assert found is not None
    assert math.isnan(found.self_cider)


def test_diversity_of_several_captions_per_image() -> None:
    sets = {1: ["a dog", "a dog runs"], 2: ["one caption only"], 3: ["a cat", "a cat"]}
    found = set_diversity(sets, REFERENCES)
    assert found is not None
    assert (found.images, found.captions) == (2, 2)
    assert found.distinct == (pytest.approx((3 / 5 + 2 / 4) / 2), pytest.approx((2 / 5 + 1 / 4) / 2))
    assert set_diversity({2: ["one caption only"]}, REFERENCES) is None


def test_characters_are_the_words_of_another_tokeniser() -> None:
    found = diversity(["红色狗", "红猫"], training=["红色 狗"], tokenizer=Characters())
    assert (found.vocabulary, found.length, found.novel) == (4, 2.5, 0.5)
    several = set_diversity({1: ["红色狗", "红猫"]}, {1: ["红狗"], 2: ["红猫"]}, Characters())
    assert several is not None
    assert several.distinct == (pytest.approx(4 / 5), pytest.approx(3 / 5))
    spaced = set_diversity({1: ["红 色 狗", "红 猫"]}, {1: ["红 狗"], 2: ["红 猫"]})
    assert spaced is not None
    assert several.self_cider == pytest.approx(spaced.self_cider)
