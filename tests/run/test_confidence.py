"""The confidence of captions: a logistic function that is fitted as scikit-learn would, and what is shown of it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from imgcap_jax.captioner import Captioner
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.run.confidence import Confidence, auroc, calibrate
from imgcap_jax.run.evaluation import Hypothesis
from imgcap_jax.run.exporting import export_run
from imgcap_jax.run.folder import Run


def evaluation(count: int, seed: int, weights: tuple[float, float, float], name: str = "photos") -> Any:
    """Captions whose probability of being right is a known function of log-probability and length."""
    rng = np.random.default_rng(seed)
    words, log_probs = rng.integers(4, 14, count), -rng.gamma(4.0, 2.0, count)
    bias, of_log_prob, of_words = weights
    chance = 1 / (1 + np.exp(-(bias + of_log_prob * log_probs + of_words * words)))
    right = rng.random(count) < chance
    return SimpleNamespace(
        source=SimpleNamespace(name=name, split="val"),
        decoding=Decoding(beam=2),
        steps=(10,),
        scores=SimpleNamespace(per_image={"CIDEr-D": {n: 0.5 if yes else 0.499 for n, yes in enumerate(right)}}),
        captioned=SimpleNamespace(
            hypotheses={
                n: [Hypothesis(" ".join(["word"] * int(words[n])), float(log_probs[n]), 0.0), Hypothesis("x", 0.0, 0.0)]
                for n in range(count)
            }
        ),
    )


def test_the_weights_that_made_the_data_are_found() -> None:
    true = (1.5, 0.4, 0.15)
    found = calibrate([evaluation(40_000, 0, true)])
    np.testing.assert_allclose([found.bias, found.log_prob, found.words], true, atol=0.08)
    (quality,) = found.quality
    assert quality.images == 40_000
    assert quality.calibration_error < 0.01
    for confidence, right in quality.bins:
        assert abs(confidence - right) < 0.02
    # The best possible AUROC: that of the true probabilities.
    inputs = [
        (one[0].log_prob, len(one[0].caption.split()))
        for one in evaluation(40_000, 0, true).captioned.hypotheses.values()
    ]
    log_probs, words = np.array(inputs).T
    right = np.array([score >= 0.5 for score in evaluation(40_000, 0, true).scores.per_image["CIDEr-D"].values()])
    assert abs(quality.auroc - auroc(Confidence(*true).of(log_probs, words), right)) < 0.005


def test_datasets_count_alike_whatever_their_size() -> None:
    small, large = evaluation(300, 1, (-2.0, 0.0, 0.0), "a"), evaluation(30_000, 2, (2.0, 0.0, 0.0), "b")
    share = [
        sum(score >= 0.5 for score in one.scores.per_image["CIDEr-D"].values()) / len(one.captioned.hypotheses)
        for one in (small, large)
    ]
    found = calibrate([small, large])
    typical = found.of(np.array([-8.0]), np.array([9]))[0]
    assert abs(typical - np.mean(share)) < 0.05


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(3)
    values, positive = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in values[positive] for b in values[~positive]]
    np.testing.assert_allclose(auroc(values, positive), np.mean(pairs))


def test_a_confidence_is_stored_exported_and_shown(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_run(Run.load(trained), folder)
    photos = [np.full((40, 40, 3), 100, np.uint8)]
    assert Captioner.load(folder)(photos)[0].confidence is None
    step = Captioner.load(folder)._steps[0]
    fitted = replace(calibrate([evaluation(200, 4, (1.0, 0.3, 0.1))]), step=step)
    fitted.save(folder)
    assert Confidence.load(folder) == fitted
    export_run(Run.load(folder), tmp_path / "again")
    assert Confidence.load(tmp_path / "again") == fitted
    captioner = Captioner.load(folder, decoding=Decoding(beam=2, n_best=2))
    ((caption, second),) = captioner.n_best(photos)
    np.testing.assert_allclose(caption.confidence, fitted.of(caption.log_prob, len(caption.words)))
    assert second.confidence is None
    # It was fitted to the best captions of this search, by these parameters.
    for other in (Decoding(beam=3), Decoding(beam=2, length_norm=0.1), Decoding(samples=2), Decoding(beam=1)):
        assert captioner.with_decoding(other)(photos)[0].confidence is None
    replace(fitted, step=step + 1).save(folder)
    assert Captioner.load(folder, decoding=Decoding(beam=2))(photos)[0].confidence is None
    (folder / "confidence.json").write_text('{"bias": 1')
    with pytest.raises(UserError, match=r"confidence\.json"):
        Captioner.load(folder)


def test_too_few_captions_are_refused() -> None:
    with pytest.raises(UserError, match="photos val: 200 of 200 captions are right; confidence needs"):
        calibrate([evaluation(200, 5, (50.0, 0.0, 0.0))])
    with pytest.raises(UserError, match="at least 10"):
        calibrate([evaluation(6, 5, (0.0, 0.0, 0.0))])
