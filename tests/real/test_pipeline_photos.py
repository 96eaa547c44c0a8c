"""Decoding and the pipeline on real photos."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.data.images import Augmentation, decode, names_side
from imgcap_jax.data.pipeline import CaptionData, train_batches
from imgcap_jax.data.vocabulary import Vocabulary

PHOTOS = 150


@dataclass(frozen=True)
class Photo:
    image: bytes
    filename: str
    image_id: int
    captions: tuple[str, ...]


class Flickr8k:
    """A stand-in for CaptionSource: the first photos of the training split, read from the folder."""

    name, split = "flickr8k", "train"

    def __init__(self, folder: Path) -> None:
        listed = json.loads((folder / "dataset_flickr8k.json").read_text())["images"]
        self._folder = folder
        self._images = [image for image in listed if image["split"] == "train"][:PHOTOS]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> Photo:
        name = self._images[i]["filename"]
        return Photo((self._folder / "images" / name).read_bytes(), name, i, self.captions(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(sentence["raw"] for sentence in self._images[i]["sentences"])

    def image_ids(self) -> list[int]:
        return list(range(len(self)))


# Every word is unknown.
EMPTY = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>"), (0, 0, 0, 0))


@pytest.fixture(scope="module")
def photos(shared: Path) -> Flickr8k:
    return Flickr8k(shared / "flickr8k")


@pytest.mark.parametrize(("size", "difference"), [(96, 2.5), (48, 3.2), (24, 4.0)])
def test_decoding_at_reduced_scale_is_close_to_full_decoding(photos: Flickr8k, size: int, difference: float) -> None:
    errors = []
    for i in range(40):
        data = photos[i].image
        full = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        errors.append(decode(data, size).astype(float) - np.asarray(full))
    # In grey levels of 255. A shift by one pixel would give more than 10. The mean detects a bias of the colours.
    assert np.abs(errors).mean() < difference
    assert np.abs(np.mean(errors, (1, 2, 3))).max() < 0.6


def test_photos_of_the_requested_size_are_decoded_exactly(photos: Flickr8k) -> None:
    for i in range(25):
        data = photos[i].image
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (224, 224)
            np.testing.assert_array_equal(decode(data, 224), np.asarray(picture.convert("RGB")))
            np.testing.assert_array_equal(decode(data, 224, "crop"), decode(data, 224))


def test_every_kind_of_photo_in_coco_can_be_decoded(shared: Path) -> None:
    files = sorted((shared / "coco_subset" / "images").rglob("*.jpg"))
    large = [file for file in files[:1500] if Image.open(file).size != (224, 224)]
    for file in [*files[:40], *large[:60]]:
        for resize in ("squash", "crop"):
            pixels = decode(file.read_bytes(), 224, resize)
            assert pixels.shape == (224, 224, 3)
            assert pixels.std() > 5


def test_batches_of_augmented_photos(photos: Flickr8k) -> None:
    augmented = CaptionData(batch_size=32, augmentation=Augmentation(0.4, True, 0.3))
    batches = train_batches(augmented, photos, EMPTY, seed=0)
    plain = train_batches(CaptionData(batch_size=32), photos, EMPTY, seed=0)
    sided = 0
    for _ in range(6):
        batch, unchanged = next(batches), next(plain)
        np.testing.assert_array_equal(batch["image_id"], unchanged["image_id"])
        assert batch["tokens"].shape == (32, 5, 22)
        assert (batch["tokens"][:, :, 0] == 1).all()
        difference = np.abs(batch["image"].astype(float) - unchanged["image"]).mean((1, 2, 3))
        assert (difference > 2).mean() > 0.9
        # A crop with jitter still has about the same colours.
        colours = [given["image"].mean((1, 2)).ravel() for given in (batch, unchanged)]
        assert np.corrcoef(*colours)[0, 1] > 0.5
        sided += sum(names_side(photos.captions(i)) for i in batch["image_id"])
    # Some photos have a caption that names a side; most have none.
    assert 0 < sided < 60
