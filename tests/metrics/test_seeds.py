"""Differences between settings with several seeds: simulated under no difference, and in cases with known answers."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from imgcap_jax.metrics import bleu, cider
from imgcap_jax.metrics.corpus import MetricScore, mean_score
from imgcap_jax.metrics.scoring import CaptionScorer
from imgcap_jax.metrics.seeds import compare_seeds, holm

IMAGES = 200


def runs(
    rng: np.random.Generator, seeds: int, images: npt.NDArray[np.float64], *, seed: float, interaction: float
) -> list[MetricScore]:
    """Runs of one setting: effects of the images, of the seeds and of both together with these standard deviations."""
    return [mean_score(images + rng.normal(0, seed) + rng.normal(0, interaction, len(images))) for _ in range(seeds)]


# The standard deviations of the effects: of seeds, of their interaction with images, and of images that differ
# between the settings. Those of CIDEr-D on 1,000 photos are about 0.006, 0.5 and 0.3.
EFFECTS = {
    "interaction": (0.0, 0.5, 0.0),
    "seeds": (0.1, 0.5, 0.0),
    "images": (0.0, 0.5, 0.5),
    "all": (0.03, 0.5, 0.3),
}


@pytest.mark.parametrize("trials", [300, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seeds", [pytest.param(2, marks=pytest.mark.slow), 3, 5])
@pytest.mark.parametrize("effects", EFFECTS)
def test_intervals_exclude_no_difference_in_five_percent_of_the_cases(effects: str, seeds: int, trials: int) -> None:
    """If there is no difference. The test is a little conservative where the images add nothing, as v is at least 0."""
    of_seed, interaction, differing = EFFECTS[effects]
    rng = np.random.default_rng(seeds)
    excluded, small = 0, 0
    for trial in range(trials):
        images = rng.normal(0.5, 0.6, IMAGES)
        ours, other = (
            runs(rng, seeds, images + rng.normal(0, differing, IMAGES), seed=of_seed, interaction=interaction)
            for _ in range(2)
        )
        found = compare_seeds(ours, other, samples=100, seed=trial)
        excluded += not found.low <= 0 <= found.high
        small += found.p_value < 0.05
    assert excluded == small
    print(f"{effects}, {seeds} seeds: {excluded / trials:.3f}")
    error = np.sqrt(0.05 * 0.95 / trials)
    assert 0.015 < excluded / trials < 0.05 + 3 * error


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_of_corpus_scores(seeds: int) -> None:
    """BLEU-4 is no mean over images. Runs draw captions from the same pool; some seeds draw right ones more often."""
    rng = np.random.default_rng(seeds)
    scenes = [[describe(rng) for _ in range(8)] for _ in range(120)]
    references = {i: tuple(texts[:4]) for i, texts in enumerate(scenes)}
    metrics = {"BLEU:closest": bleu.prepare, "CIDEr-D": lambda of: cider.ClippedScorer(cider.Vectors(of, None))}
    scorer = CaptionScorer(references, metrics)
    trials, excluded = 400, dict.fromkeys(("BLEU-4", "CIDEr-D"), 0)
    for trial in range(trials):
        arms = []
        for _ in range(2):
            scored = []
            for _ in range(seeds):
                right = rng.random(len(scenes)) < 0.5 + rng.normal(0, 0.05)
                chosen = np.where(right, rng.integers(0, 4, len(scenes)), rng.integers(4, 8, len(scenes)))
                scored.append(
                    scorer.score({i: texts[n] for i, (texts, n) in enumerate(zip(scenes, chosen, strict=True))})
                )
            arms.append(scored)
        for name in excluded:
            found = compare_seeds(*([one.metrics[name] for one in arm] for arm in arms), samples=200, seed=trial)
            excluded[name] += not found.low <= 0 <= found.high
    for name, count in excluded.items():
        print(f"{name}, {seeds} seeds: {count / trials:.3f}")
        assert 0.01 < count / trials < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def describe(rng: np.random.Generator) -> str:
    """A random description of a drawing."""
    parts = (["small", "large"], ["red", "blue", "green", "white"], ["circle", "square", "star"], ["near", "above"])
    first, second = ([str(rng.choice(words)) for words in parts] for _ in range(2))
    return " ".join(["a", *first[:3], first[3], "a", *second[:3]])


def test_effects_of_seeds_alone_give_welchs_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.02, 3), rng.normal(0.5, 0.05, 5)
    found = compare_seeds(*([mean_score(np.full(IMAGES, value)) for value in values] for values in (a, b)), samples=50)
    expected = stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.degrees == pytest.approx(expected.df)


def test_effects_of_images_alone_give_the_paired_test() -> None:
    """Equal runs of each setting: only the images are a sample."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.5, IMAGES), rng.normal(0.5, 0.5, IMAGES)
    found = compare_seeds([mean_score(a)] * 3, [mean_score(b)] * 3, samples=4000)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.05)


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_of_the_same_runs(seeds: int) -> None:
    """Two decodings of the same runs, without a difference: large effects of the seeds cancel."""
    rng = np.random.default_rng(seeds)
    trials, excluded, widths = 300, 0, []
    for trial in range(trials):
        images, differing = rng.normal(0.5, 0.6, IMAGES), rng.normal(0, 0.1, IMAGES)
        ours = runs(rng, seeds, images, seed=1.0, interaction=0.5)
        other = [mean_score(run.images + differing + rng.normal(0, 0.2, IMAGES)) for run in ours]
        found = compare_seeds(ours, other, same_runs=True, samples=100, seed=trial)
        excluded += not found.low <= 0 <= found.high
        widths.append(found.high - found.low)
    error = np.sqrt(0.05 * 0.95 / trials)
    assert 0.015 < excluded / trials < 0.05 + 3 * error
    assert np.median(widths) < 0.1  # a tenth of the deviation between seeds


def test_the_same_runs_without_effect_of_images_give_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0.6, 0.02, 4)
    b = a + rng.normal(0.01, 0.001, 4)
    ours, other = ([mean_score(np.full(IMAGES, value)) for value in values] for values in (a, b))
    found = compare_seeds(ours, other, same_runs=True, samples=50)
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_one_seed_gives_no_interval() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=IMAGES)
    found = compare_seeds(
        runs(rng, 1, images, seed=1, interaction=1), runs(rng, 3, images, seed=1, interaction=1), samples=10
    )
    assert np.isnan([found.low, found.high, found.p_value]).all()
    assert np.isfinite([found.ours, found.other]).all()


def test_runs_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[9, 10\] images"):
        compare_seeds([mean_score(np.zeros(10))], [mean_score(np.zeros(9))])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02, float("nan"), 0.01], [0.04, float("nan"), 0.03]),
        ([], []),
    ],
)
def test_holm(given: list[float], expected: list[float]) -> None:
    assert holm(given) == pytest.approx(expected, nan_ok=True)
