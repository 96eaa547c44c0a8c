"""The paired bootstrap: scores of samples, confidence interval and p-value."""

import random

import numpy as np
import pytest

from imgcap_jax.metrics.compare import paired_bootstrap
from imgcap_jax.metrics.corpus import mean_score
from imgcap_jax.metrics.scoring import CaptionScorer

WORDS = ["a", "the", "dog", "cat", "red", "runs", "on", "grass"]


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 10)))


def test_scores_of_a_sample_equal_scoring_the_drawn_images() -> None:
    """An image drawn twice counts as two images. CIDEr is different: it keeps the idf of the whole set."""
    rng = random.Random(0)
    references = {i: [sentence(rng) for _ in range(rng.randint(1, 4))] for i in range(30)}
    candidates = {i: sentence(rng) for i in references}
    found = CaptionScorer(references).score(candidates).metrics
    drawn = np.random.default_rng(0).integers(0, 30, 30)
    again = CaptionScorer({i: references[k] for i, k in enumerate(drawn)})
    expected = again.score({i: candidates[k] for i, k in enumerate(drawn)}).values
    counts = np.bincount(drawn, minlength=30)[None].astype(float)
    for name, metric in found.items():
        if name != "CIDEr-D":
            assert metric.corpus(counts)[0] == pytest.approx(expected[name], abs=1e-12), name
    cider = found["CIDEr-D"]
    assert cider.corpus(counts)[0] == pytest.approx(cider.images[drawn].mean())


def test_interval_of_a_mean_is_the_normal_interval() -> None:
    rng = np.random.default_rng(1)
    ours = rng.normal(0.5, 0.2, 2000)
    other = ours - rng.normal(0.01, 0.1, 2000)
    found = paired_bootstrap(mean_score(ours), mean_score(other), samples=4000)
    difference, error = (ours - other).mean(), (ours - other).std() / 2000**0.5
    assert found.ours - found.other == pytest.approx(difference)
    # The comparison is paired: without pairing the error would be about three times as large.
    assert found.low == pytest.approx(difference - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(difference + 1.96 * error, abs=0.15 * error)


def test_p_value_of_a_normal_difference() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 1, 1000)
    noise -= noise.mean()
    for errors, expected in ((1.0, 0.317), (1.96, 0.05), (0.0, 1.0), (6.0, 1 / 4001)):
        spread = (expected * (1 - expected) / 4000) ** 0.5
        ours = noise + errors * noise.std() / 1000**0.5
        found = paired_bootstrap(mean_score(ours), mean_score(np.zeros(1000)), samples=4000)
        assert found.p_value == pytest.approx(expected, abs=4 * spread)


def test_one_image_has_a_p_value_of_1() -> None:
    assert paired_bootstrap(mean_score(np.array([0.9])), mean_score(np.array([0.1]))).p_value == 1
    with pytest.raises(ValueError, match="1 and 2 images"):
        paired_bootstrap(mean_score(np.zeros(1)), mean_score(np.zeros(2)))


def test_equal_systems_do_not_differ() -> None:
    scores = mean_score(np.random.default_rng(0).random(50))
    found = paired_bootstrap(scores, scores)
    assert (found.low, found.high, found.p_value) == (0, 0, 1)
