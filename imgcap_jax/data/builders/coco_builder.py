"""Writes COCO's records as the official TFDS builder `coco_captions/2014` does, without TensorFlow."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from imgcap_jax.data.builders import coco
from imgcap_jax.data.builders.archives import ZipMember, read_ahead, read_photo
from imgcap_jax.data.builders.base import CaptionBuilder, CaptionRecord, RecordShard, shard_ranges
from imgcap_jax.data.image_files import ImageError, open_image, storable
from imgcap_jax.errors import UserError

_DESCRIPTION = (
    "COCO 2014 with captions, bounding boxes and the splits of Karpathy and Li (2015), as in TFDS's coco_captions."
)


class CocoBuilder(CaptionBuilder):
    """Writes `CocoContents`. The encoded photos are stored unchanged, in the order of the official dataset."""

    VERSION = tfds.core.Version(coco.VERSION)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=coco.CONFIG, version=coco.VERSION, description=_DESCRIPTION)]

    def __init__(
        self, contents: coco.CocoContents, *, data_dir: Path, on_image: Callable[[], None] = lambda: None
    ) -> None:
        """Plans the records.

        Args:
            contents: the images, their files and the names of categories.
            data_dir: folder of prepared datasets.
            on_image: called after each image.
        """
        self._contents = contents
        self._on_image = on_image
        super().__init__(name=coco.NAME, data_dir=data_dir, origin=coco.ORIGIN, description=_DESCRIPTION)

    def extra_features(self) -> dict[str, Any]:
        return {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=self._contents.categories),
                    "is_crowd": np.bool_,
                }
            ),
        }

    def record_shards(self) -> Mapping[str, Sequence[RecordShard]]:
        contents = self._contents
        shards: dict[str, list[RecordShard]] = {}
        for split in coco.SPLITS:
            members = [i for i, image in enumerate(contents.images) if image.split == split]
            ranges = shard_ranges([contents.sizes[i] for i in members])
            shards[split] = [functools.partial(self._records, [members[k] for k in shard]) for shard in ranges]
        return shards

    def _records(self, members: Sequence[int]) -> Iterator[CaptionRecord]:
        for i, future in read_ahead(self._read, members):
            image = self._contents.images[i]
            try:
                encoded = future.result()
            except (ValueError, OSError) as error:
                raise UserError(
                    f"{self._contents.files[i]} cannot be read ({error}); download or extract it again"
                ) from error
            objects = [
                {
                    "id": found.id,
                    "area": found.area,
                    "bbox": tfds.features.BBox(*found.box),
                    "label": found.label,
                    "is_crowd": found.is_crowd,
                }
                for found in image.objects
            ]
            self._on_image()
            yield CaptionRecord(encoded, image.filename, image.image_id, image.captions, {"objects": objects})

    def _read(self, i: int) -> bytes:
        file, image = self._contents.files[i], self._contents.images[i]
        encoded = read_photo(file)
        if not encoded:
            raise ImageError("the file is empty")
        if not isinstance(file, ZipMember):  # which has a checksum
            storable(encoded)
        found = open_image(encoded)
        if sorted((found.width, found.height)) != sorted((image.width, image.height)):
            raise ImageError(
                f"it has {found.width} x {found.height} pixels instead of COCO's {image.width} x {image.height}"
            )
        return encoded
