"""How likely a caption is right: a probability that is fitted to the scores of captions of a validation split.

A caption counts as right if its CIDEr-D reaches a threshold. Its probability is a logistic function of the caption's
log-probability under the model and of its number of words. (Of the log-probabilities of single words, the least one,
the mean over content words, and the agreement of the beams, none tells right captions from wrong ones better.)

Letters: C captions.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.stats import rankdata

from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.files import read_json, reading, write_text
from imgcap_jax.run.evaluation import Evaluation, decoding_fields

CONFIDENCE = "confidence.json"  # file in a run's folder
RIGHT = 0.5  # the CIDEr-D (0 to 10) from which a caption counts as right
FOLDS = 5  # of the cross-validation that measures quality
_BINS = 5
_ADVICE = "run imgcap calibrate again"


@dataclass(frozen=True)
class Quality:
    """How well confidences fit a dataset, measured on captions that they were not fitted to.

    Attributes:
        dataset, split: the captions.
        images: their number. right: the share of right captions.
        auroc: the probability that a right caption has a higher confidence than a wrong one.
        calibration_error: the mean difference between confidence and share of right captions, over bins of equally many
            captions (expected calibration error).
        bins: per bin, the mean confidence and the share of right captions.
    """

    dataset: str
    split: str
    images: int
    right: float
    auroc: float
    calibration_error: float
    bins: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Confidence:
    """The probability that a caption is right: sigmoid(bias + log_prob * its log-probability + words * its words).

    Attributes:
        bias, log_prob, words: see above.
        threshold: the CIDEr-D (0 to 10) of a right caption.
        step: the step of the parameters that wrote the captions. decoding: the settings of the search.
        quality: one per dataset.
    """

    bias: float
    log_prob: float
    words: float
    threshold: float = RIGHT
    step: int = 0
    decoding: Any = None
    quality: tuple[Quality, ...] = ()

    def of(self, log_prob: Any, words: Any) -> np.ndarray:
        """The confidence of captions.

        Args:
            log_prob: log-probabilities [C], natural logarithm.
            words: numbers of words [C].
        """
        logit = self.bias + self.log_prob * np.asarray(log_prob) + self.words * np.asarray(words)
        return np.asarray(1 / (1 + np.exp(-logit)))

    def fits(self, decoding: Decoding, step: int) -> bool:
        """Whether the best captions of a search are like those that it was fitted to."""
        same, fitted = json.loads(json.dumps(decoding_fields(decoding))), self.decoding
        return step == self.step and {**same, "n_best": 0} == {**fitted, "n_best": 0}

    def save(self, folder: Path) -> None:
        """Writes it into a run's folder."""
        write_text(folder / CONFIDENCE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Confidence | None":
        """That of a run; None: it was not calibrated. Raises UserError if the file is damaged."""
        path = folder / CONFIDENCE
        if not path.is_file():
            return None
        found = read_json(path, _ADVICE)
        with reading(path, _ADVICE):
            quality = tuple(
                Quality(**{**one, "bins": tuple((float(a), float(b)) for a, b in one["bins"])})
                for one in found["quality"]
            )
            numbers = {name: float(found[name]) for name in ("bias", "log_prob", "words", "threshold")}
            if not isinstance(found["decoding"], dict):
                raise ValueError("it has no decoding")
            return cls(**numbers, step=int(found["step"]), decoding=found["decoding"], quality=quality)


def calibrate(evaluations: Sequence[Evaluation], threshold: float = RIGHT) -> Confidence:
    """Fits the confidence to the captions of evaluations, all of which count alike, whatever their number of images.

    Args:
        evaluations: of one run with one decoding, on splits that it was not trained on.
        threshold: the CIDEr-D (0 to 10) of a right caption.

    Raises:
        UserError: too few captions of a split are right, or too few are wrong.
    """
    inputs, right = zip(*(_observed(one, threshold) for one in evaluations), strict=True)
    for one, of_split in zip(evaluations, right, strict=True):
        if min(of_split.sum(), (~of_split).sum()) < 2 * FOLDS:
            raise UserError(
                f"{one.source.name} {one.source.split}: {of_split.sum():,} of {len(of_split):,} captions are right; "
                f"confidence needs at least {2 * FOLDS} right and as many wrong ones: choose another split"
            )
    fitted = _fitted(inputs, right, threshold)
    held_out = [np.zeros(len(of_split)) for of_split in right]
    for fold in range(FOLDS):
        chosen = [np.arange(len(of_split)) % FOLDS == fold for of_split in right]
        other = _fitted(
            [own[~out] for own, out in zip(inputs, chosen, strict=True)],
            [own[~out] for own, out in zip(right, chosen, strict=True)],
            threshold,
        )
        for found, own, out in zip(held_out, inputs, chosen, strict=True):
            found[out] = other.of(own[out, 0], own[out, 1])
    quality = tuple(map(_quality, evaluations, held_out, right))
    decoding = json.loads(json.dumps(decoding_fields(evaluations[0].decoding)))
    return replace(fitted, step=evaluations[0].steps[0], decoding=decoding, quality=quality)


def _observed(evaluation: Evaluation, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and number of words [C,2] of the captions, and whether they are right [C]."""
    scores = evaluation.scores.per_image["CIDEr-D"]
    best = {image: found[0] for image, found in evaluation.captioned.hypotheses.items()}
    inputs = [(one.log_prob, len(one.caption.split())) for one in best.values()]
    return np.array(inputs, float), np.array([scores[image] >= threshold for image in best])


def _fitted(inputs: Sequence[np.ndarray], right: Sequence[np.ndarray], threshold: float) -> Confidence:
    features = np.concatenate(inputs)
    scale = features.std(0) + 1e-6
    design = np.column_stack([np.ones(len(features)), features / scale])
    target = np.concatenate(right).astype(float)
    weight = np.concatenate([np.full(len(one), 1 / len(one)) for one in right])

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ values
        value = weight @ (np.logaddexp(0, logits) - target * logits) + 1e-4 * values[1:] @ values[1:]
        slope = design.T @ (weight * (1 / (1 + np.exp(-logits)) - target))
        return value, slope + 2e-4 * np.array([0, *values[1:]])

    bias, *slopes = minimize(loss, np.zeros(3), jac=True, method="L-BFGS-B").x
    log_prob, words = np.array(slopes) / scale
    return Confidence(float(bias), float(log_prob), float(words), threshold)


def _quality(evaluation: Evaluation, confidence: np.ndarray, right: np.ndarray) -> Quality:
    order = np.array_split(np.argsort(confidence, kind="stable"), _BINS)
    bins = tuple((float(confidence[part].mean()), float(right[part].mean())) for part in order)
    error = sum(len(part) * abs(a - b) for part, (a, b) in zip(order, bins, strict=True)) / len(right)
    return Quality(
        evaluation.source.name,
        evaluation.source.split,
        len(right),
        float(right.mean()),
        auroc(confidence, right),
        float(error),
        bins,
    )


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve: how often a positive value is larger than a negative one; ties count half."""
    ranks, count = rankdata(values), int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(values) - count)))
