"""The model that comes with the package: it loads, it is small, and its card says what was measured."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from imgcap_jax.captioner import Captioner
from imgcap_jax.errors import UserError
from imgcap_jax.run import folder as module
from imgcap_jax.run.confidence import Confidence
from imgcap_jax.run.folder import Run, shipped_model

FOLDER = shipped_model()


def test_it_is_small_and_knows_nothing_of_the_machine_that_made_it() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 25e6
    assert Run.load(FOLDER).experiment.data.data_dir is None
    for path in FOLDER.glob("*.json"):
        assert not re.search(r'"/\w', path.read_text()), path.name


def test_the_card_has_the_scores_and_the_confidence_that_were_measured() -> None:
    card = (FOLDER / "README.md").read_text()
    files = [json.loads((FOLDER / f"scores_{name}.json").read_text()) for name in ("val", "coco_subset_val")]
    for found in files:
        row = " | ".join(f"{100 * value:.1f}" for value in found["scores"].values())
        assert f"| {row} |" in card
        assert found["signature"] in card
        assert found["decoding"]["beam"] == 3
    confidence = Confidence.load(FOLDER)
    assert confidence is not None
    for quality in confidence.quality:
        assert f"{quality.auroc:.3f}" in card
        assert f"{quality.calibration_error:.3f}" in card


@pytest.mark.slow
def test_captions_are_sentences_with_a_confidence() -> None:
    grey = np.full((60, 80, 3), 128, np.uint8)
    (caption,) = Captioner.load()([grey])
    assert len(caption.words) > 3
    assert caption.confidence is not None
    assert 0 < caption.confidence < 1


def test_an_installation_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHIPPED", tmp_path)
    with pytest.raises(UserError, match="has no model; train one"):
        Captioner.load()
