"""The model that comes with the package, on real photos: a part of the validation split scores as its card says."""

import json
from pathlib import Path

import pytest

from imgcap_jax.captioner import Captioner
from imgcap_jax.metrics.scoring import CaptionScorer, available_metrics

PHOTOS = 64


@pytest.mark.slow
def test_captions_of_photos_score_as_the_card_says(shared: Path) -> None:
    folder = shared / "flickr8k"
    listed = json.loads((folder / "dataset_flickr8k.json").read_text())["images"]
    photos = [image for image in listed if image["split"] == "val"][-PHOTOS:]
    captions = Captioner.load()([folder / "images" / photo["filename"] for photo in photos])
    references = {i: tuple(one["raw"] for one in photo["sentences"]) for i, photo in enumerate(photos)}
    scores = CaptionScorer(references, available_metrics()).score({i: one.text for i, one in enumerate(captions)})
    # The document frequencies are those of 64 photos, and a score of few photos varies.
    assert 0.45 < scores.values["CIDEr-D"] < 0.9
    assert scores.values["BLEU-1"] > 0.6
