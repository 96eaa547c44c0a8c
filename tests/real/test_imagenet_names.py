"""The packaged classifier recognises ten photos, so weights, normalisation and class order fit together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite

# COCO val photo -> the ImageNet-1k class that it clearly shows (index in the order of the synset ids).
PHOTOS = {
    228858: (340, "zebra"),
    486112: (386, "African elephant"),
    160012: (963, "pizza"),
    440334: (954, "banana"),
    58304: (874, "trolleybus"),
    248631: (681, "notebook computer"),
    105249: (861, "toilet seat"),
    531134: (920, "traffic light"),
    252332: (919, "street sign"),
    466137: (850, "teddy bear"),
}


@pytest.mark.parametrize(
    "variant", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_top_five_contain_the_evident_class(variant: Any, shared: Path) -> None:
    files = {path.name: path for path in (shared / "coco_subset" / "images").rglob("*.jpg")}
    photos = [Image.open(files[f"{number:012d}.jpg"]).convert("RGB") for number in PHOTOS]
    images = np.stack([np.asarray(photo.resize((224, 224), Image.Resampling.BICUBIC)) for photo in photos])
    encoder = EfficientNetLite(variant=variant).build(224, rngs=nnx.Rngs(0), classifier=True)
    logits = np.asarray(nnx.jit(lambda encoder, x: encoder.classify(x))(encoder, images))
    best = np.argsort(-logits, axis=1)
    rank = {name: int(np.argmax(row == index)) for row, (index, name) in zip(best, PHOTOS.values(), strict=True)}
    print(f"EfficientNet-Lite{variant}, rank of the evident class (0 = first): {rank}")
    assert max(rank.values()) < 5, rank
    assert sum(place == 0 for place in rank.values()) >= 8, rank
