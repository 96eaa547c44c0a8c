"""Kendall's tau between scores and ratings, and its intervals."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from imgcap_jax.metrics import judgements
from imgcap_jax.metrics.judgements import Correlation, correlate


def by_definition(x: list[float], y: list[float]) -> tuple[float, float]:
    """Tau-b and tau-c from all pairs of observations."""
    excess = tied_x = tied_y = 0
    pairs = list(itertools.combinations(range(len(x)), 2))
    for i, j in pairs:
        product = (x[i] - x[j]) * (y[i] - y[j])
        excess += (product > 0) - (product < 0)
        tied_x += x[i] == x[j]
        tied_y += y[i] == y[j]
    classes = min(len(set(x)), len(set(y)))
    tau_b = excess / math.sqrt((len(pairs) - tied_x) * (len(pairs) - tied_y))
    return tau_b, excess / (len(x) ** 2 / 2 * (classes - 1) / classes)


def draw(seed: int, pairs: int = 40) -> tuple[list[float], list[list[float]], list[int]]:
    """Scores with ties, one to three ratings per pair, and several pairs per image."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.random(pairs), 1).tolist()
    ratings = [(1.0 + rng.integers(0, 4, rng.integers(1, 4))).tolist() for _ in range(pairs)]
    return scores, ratings, rng.integers(0, 12, pairs).tolist()


def values(found: Correlation) -> tuple[float, float]:
    return found.tau_b.value, found.tau_c.value


@pytest.mark.parametrize("seed", range(3))
def test_tau_by_definition(seed: int) -> None:
    scores, ratings, images = draw(seed)
    rows = [(score, rating) for score, found in zip(scores, ratings, strict=True) for rating in found]
    x, y = [row[0] for row in rows], [row[1] for row in rows]
    assert values(correlate(scores, ratings, images, samples=2)) == pytest.approx(by_definition(x, y))
    means = [sum(found) / len(found) for found in ratings]
    assert values(correlate(scores, ratings, images, mean=True, samples=2)) == pytest.approx(
        by_definition(scores, means)
    )


def test_tau_is_1_for_a_metric_that_equals_the_rating() -> None:
    images = list(range(60))
    ratings = [float(1 + image % 4) for image in images]
    found = correlate(ratings, [[rating] for rating in ratings], images)
    assert values(found) == pytest.approx((1, 1))
    assert (found.tau_b.low, found.tau_b.high) == pytest.approx((1, 1))
    opposite = correlate([-rating for rating in ratings], [[rating] for rating in ratings], images)
    assert values(opposite) == pytest.approx((-1, -1))


@pytest.mark.parametrize("mean", [False, True])
def test_the_table_and_the_sort_give_the_same_intervals(mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table serves few different ratings. Without it, each sample is an ordinary call of SciPy."""
    scores, ratings, images = draw(5)
    table = correlate(scores, ratings, images, mean=mean, samples=40)
    monkeypatch.setattr(judgements, "_MANY", 0)
    sort = correlate(scores, ratings, images, mean=mean, samples=40)
    for one, other in ((table.tau_b, sort.tau_b), (table.tau_c, sort.tau_c)):
        assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))
        assert one.low < one.value < one.high


def test_the_interval_is_that_of_drawn_images() -> None:
    scores, ratings, images = draw(6)
    names = sorted(set(images))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(30):
        chosen = [names[place] for place in rng.integers(0, len(names), len(names))]
        rows = [
            (scores[pair], rating)
            for image in chosen
            for pair in range(len(images))
            if images[pair] == image
            for rating in ratings[pair]
        ]
        drawn.append(kendalltau(*zip(*rows, strict=True), variant="c").statistic)
    found = correlate(scores, ratings, images, samples=30).tau_c
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_repeating_the_pairs_of_an_image_does_not_shrink_the_interval() -> None:
    rng = np.random.default_rng(7)
    images = list(range(80))
    scores = rng.random(80).tolist()
    ratings = [[float(rating)] for rating in rng.integers(1, 5, 80)]
    once = correlate(scores, ratings, images, samples=200).tau_b
    often = correlate(scores * 9, ratings * 9, images * 9, samples=200).tau_b
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.05)


@pytest.mark.parametrize(
    ("scores", "ratings"), [([0.5] * 4, [[1.0], [2.0], [3.0], [4.0]]), ([1.0, 2.0, 3.0, 4.0], [[2.0, 2.0]] * 4)]
)
def test_tau_is_undefined_if_all_scores_or_all_ratings_are_equal(
    scores: list[float], ratings: list[list[float]]
) -> None:
    found = correlate(scores, ratings, [1, 2, 3, 4], samples=5)
    assert all(map(math.isnan, (*values(found), found.tau_b.low, found.tau_c.high)))


def test_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 scores, ratings of 2 pairs and 2 images"):
        correlate([1, 2, 3], [[1], [2]], [1, 2])
