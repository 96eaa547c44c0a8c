"""`scenes`: the built-in dataset of drawn scenes with five captions each. Needs no download."""

import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from imgcap_jax.data.builders.base import CaptionBuilder, CaptionRecord, RecordShard
from imgcap_jax.data.builders.layout import Origin
from imgcap_jax.data.scenes.language import scene_captions
from imgcap_jax.data.scenes.world import draw_scene, sample_scene
from imgcap_jax.errors import UserError

# The image ids of split number s start at s * _ID_STEP, so that ids of different splits do not collide.
_ID_STEP = 10_000_000


@dataclass(frozen=True)
class SceneSplits:
    """Number of scenes per split, side length of the images in pixels, and seed."""

    train: int = 8000
    val: int = 500
    test: int = 500
    test_compositional: int = 500
    image_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for split, count in self.counts.items():
            if not 1 <= count < _ID_STEP:
                raise UserError(f"scenes: {count} scenes for the split {split!r}; use 1 to {_ID_STEP - 1:,}")
        if not 16 <= self.image_size <= 1024:
            raise UserError(f"scenes: the image size is {self.image_size}; it must be from 16 to 1024 pixels")

    @property
    def counts(self) -> dict[str, int]:
        return {
            "train": self.train,
            "val": self.val,
            "test": self.test,
            "test_compositional": self.test_compositional,
        }

    def fingerprint(self) -> str:
        """A hash of the settings and of the first scenes, so that it changes if the drawing or the captions change."""
        digest = hashlib.sha256(repr(asdict(self)).encode())
        for number, split in enumerate(self.counts):
            for index in range(8):
                record = scene_record(split, number, index, self)
                digest.update(record.image + repr(record.captions).encode())
        return digest.hexdigest()


def scene_record(split: str, split_number: int, index: int, splits: SceneSplits) -> CaptionRecord:
    """Draws one scene and writes its captions. The scene itself is stored as JSON text under `scene`."""
    scene = sample_scene(split, index, splits.seed)
    # The captions of a scene must not depend on the number of scenes before it, nor repeat those of another split.
    caption_seed = int(np.random.SeedSequence([splits.seed, split_number, index]).generate_state(1)[0])
    first_id = (split_number * _ID_STEP + index) * 10
    return CaptionRecord(
        image=encode_png(draw_scene(scene, splits.image_size)),
        filename=f"{split}_{index:06d}.png",
        image_id=split_number * _ID_STEP + index,
        captions=tuple(enumerate(scene_captions(scene, caption_seed), start=first_id)),
        extra={"scene": scene.to_json()},
    )


def encode_png(image: np.ndarray) -> bytes:
    """Encodes an image, uint8 [h, w, 3], as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


class ScenesBuilder(CaptionBuilder):
    """Draws the scenes and writes them as a TFDS dataset."""

    def __init__(
        self,
        splits: SceneSplits,
        *,
        data_dir: Path,
        origin: Origin,
        name: str = "scenes",
        on_image: Callable[[], None] = lambda: None,
    ) -> None:
        self._splits = splits
        self._on_image = on_image
        description = "Drawn scenes with five true captions each, and the scene itself as JSON."
        super().__init__(name=name, data_dir=data_dir, origin=origin, description=description)

    def extra_features(self) -> dict[str, Any]:
        return {"scene": tfds.features.Text()}

    def record_shards(self) -> Mapping[str, Sequence[RecordShard]]:
        return {
            split: [functools.partial(self._records, split, number, count)]
            for number, (split, count) in enumerate(self._splits.counts.items())
        }

    def _records(self, split: str, number: int, count: int) -> Iterator[CaptionRecord]:
        for index in range(count):
            yield scene_record(split, number, index, self._splits)
            self._on_image()
