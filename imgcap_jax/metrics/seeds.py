"""Significance test for the difference between two settings that were trained with several seeds each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from imgcap_jax.metrics.corpus import MetricScore

SAMPLES = 1000
_AT_A_TIME = 50  # samples per block; with COCO's 40,504 images their counts take 16 MB


@dataclass(frozen=True)
class SeedDifference:
    """The difference between the mean scores of two settings in one metric.

    Attributes:
        ours, other: the mean scores over seeds.
        low, high: the bounds of the 95 % confidence interval of ours - other; NaN with one seed per setting.
        p_value: of the two-sided test of no difference; NaN with one seed per setting.
        degrees: the degrees of freedom of the t distribution.
    """

    ours: float
    other: float
    low: float
    high: float
    p_value: float
    degrees: float


def compare_seeds(
    ours: Sequence[MetricScore],
    other: Sequence[MetricScore],
    *,
    same_runs: bool = False,
    samples: int = SAMPLES,
    seed: int = 0,
) -> SeedDifference:
    """Compares two settings, with intervals that hold for other seeds and for other images.

    The score of a run is modelled as the mean of its setting, plus the effect of its seed, plus the effects of the
    images, which the runs of a setting share, plus their interaction. The variance of the difference of the means is

        s_a^2 / n_a + s_b^2 / n_b + v

    s^2 is the sample variance of the scores of a setting's runs. It contains the seed and the interaction. v is the
    variance of the effects of the images on the difference, estimated by a paired bootstrap over images: the variance
    of the difference, minus that of the interactions, which s^2 contains. It is at least 0. The interval is that of a t
    distribution with the degrees of freedom of Welch (1947) and Satterthwaite (1946).

    If the two settings are evaluations of the same runs, as with two beam sizes, the scores of each run are subtracted
    first: the effect of its seed cancels. The variance is then s_d^2 / n + v, with the differences d of the n runs.

    The plain hierarchical bootstrap, which resamples seeds and images and takes percentiles, is not used. With n seeds
    it underestimates their variance by (n - 1) / n and takes the normal distribution in place of t; it also counts the
    interaction twice.

    The test assumes that the effects of seeds are independent, between the settings too, and about normal. If the same
    seed is better than average in both settings, the interval is too wide.

    Args:
        ours, other: one score per seed, of the same images in the same order.
        same_runs: whether the i-th scores of both are of the same run.
        samples: the number of bootstrap samples of images.
        seed: the seed of the random draws.

    Raises:
        ValueError: the scores are of different numbers of images, a setting has no run, or the runs cannot be the same.
    """
    runs = [*ours, *other]
    images = {len(run.images) for run in runs}
    if not ours or not other or len(images) != 1 or (same_runs and len(ours) != len(other)):
        raise ValueError(f"settings of {len(ours)} and {len(other)} runs with {sorted(images)} images")
    values = np.array([run.value for run in runs])
    means = float(values[: len(ours)].mean()), float(values[len(ours) :].mean())
    if min(len(ours), len(other)) < 2:
        return SeedDifference(*means, np.nan, np.nan, np.nan, np.nan)

    def groups(scores: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
        """Independent groups of scores [n,...]. The difference is the sum of their means."""
        a, b = scores[: len(ours)], scores[len(ours) :]
        return [a - b] if same_runs else [a, -b]

    of_seeds = [group.var(ddof=1) / len(group) for group in groups(values)]
    of_images = max(0.0, _image_variance(groups(_resampled(runs, samples, seed))))
    variance = sum(of_seeds) + of_images
    difference = means[0] - means[1]
    if variance == 0:
        return SeedDifference(*means, difference, difference, float(difference == 0), np.inf)
    terms = np.array([*of_seeds, of_images])
    free = [*(len(group) - 1 for group in groups(values)), max(1, images.pop() - 1)]
    degrees = variance**2 / (terms**2 / free).sum()
    error = np.sqrt(variance)
    half = stats.t.ppf(0.975, degrees) * error
    p_value = 2 * stats.t.sf(abs(difference) / error, degrees)
    return SeedDifference(*means, difference - half, difference + half, float(p_value), float(degrees))


def _resampled(runs: Sequence[MetricScore], samples: int, seed: int) -> npt.NDArray[np.float64]:
    """The scores of all runs on the same samples of images, [runs,samples]."""
    images = len(runs[0].images)
    rng = np.random.default_rng(seed)
    drawn = []
    for begin in range(0, samples, _AT_A_TIME):
        numbers = rng.integers(0, images, (min(_AT_A_TIME, samples - begin), images))
        weights = np.stack([np.bincount(draw, minlength=images) for draw in numbers]).astype(float)
        drawn.append(np.stack([run.corpus(weights) for run in runs]))
    return np.concatenate(drawn, axis=1)


def _image_variance(groups: Sequence[npt.NDArray[np.float64]]) -> float:
    """The variance of the sum of the groups' means that comes from the images alone, without their interaction.

    Args:
        groups: the scores of each group's runs on samples of images, [n,samples].
    """
    variance = float(sum(group.mean(axis=0) for group in groups).var(ddof=1))
    for group in groups:
        n = len(group)
        covariance = np.cov(group)
        diagonal = np.trace(covariance) / n
        between = (covariance.sum() - n * diagonal) / (n * (n - 1))  # of two runs: what they share
        variance -= float(diagonal - between) / n
    return variance


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for the number of comparisons (Holm, 1979), in the given order.

    Rejecting all hypotheses with a corrected p-value of at most a keeps the probability of one wrong rejection or more
    at most at a. NaN stands for a test that is not done yet, or cannot be done. It stays NaN and counts as a
    comparison: otherwise the p-values of an unfinished study would be too small.
    """
    values = np.asarray(p_values, float)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    factors = len(values) - np.arange(len(order))
    values[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return [float(value) for value in values]
