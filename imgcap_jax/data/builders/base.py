"""The contract of a dataset builder: one feature structure, written as array_record without TensorFlow.

A builder of your own is one file with a subclass of `CaptionBuilder` that implements `record_shards`. It is prepared by
``imgcap data prepare my_builder.py --name my_data``.

The base is `ShardBasedBuilder`, because above 1 GB the shuffling buffer of `GeneratorBasedBuilder` needs TensorFlow's
file system. The input pipeline shuffles anyway.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from imgcap_jax.data.builders.layout import (
    SKIPPED_FILE,
    CaptionIndex,
    Origin,
    Skipped,
    write_json,
    write_origin,
)
from imgcap_jax.data.builders.listed import shown, split_name
from imgcap_jax.errors import UserError
from imgcap_jax.image_ids import parse_image_id


@dataclass(frozen=True)
class CaptionRecord:
    """One image as it is stored.

    Attributes:
        image: the encoded bytes, JPEG or PNG.
        filename: shown to people, and used to find files of ready-made regions.
        image_id: unique in the dataset, from 0 to 2^63 - 1; it identifies the image in files of captions.
        captions: (id, text) of each reference caption, at least one. Texts are raw; the tokeniser comes later.
        extra: values of `CaptionBuilder.extra_features`.
    """

    image: bytes
    filename: str
    image_id: int
    captions: Sequence[tuple[int, str]]
    extra: Mapping[str, Any] = field(default_factory=dict)


RecordShard = Callable[[], Iterator[CaptionRecord]]
SHARD_BYTES = 128 * 2**20


def shard_ranges(sizes: Sequence[int]) -> list[range]:
    """Divides the images of a split into shards of about `SHARD_BYTES`.

    Args:
        sizes: the size of each image in bytes; at least one image.

    Returns:
        The numbers of the images of each shard, in order. No shard is empty.
    """
    count = min(-(-sum(sizes) // SHARD_BYTES) or 1, len(sizes))
    bounds = [len(sizes) * k // count for k in range(count + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


class CaptionBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes `CaptionRecord`s. A subclass implements `record_shards`.

    In addition to the records, it writes `origin.json`, `skipped.json` and an index of the captions of each split. All
    files are written to TFDS's incomplete folder, which is renamed at the end.

    Attributes:
        skipped: images and captions that were left out; a subclass can append to it.
        notes: lines for the user, shown when the dataset is prepared; a subclass can append to it.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init_subclass__(cls, **options: Any) -> None:
        # Datasets are read by folder, never by registered name.
        super().__init_subclass__(**{**options, "skip_registration": True})

    def __init__(self, *, name: str, data_dir: Path, origin: Origin, description: str) -> None:
        self.name = name
        self.origin = origin
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        self._description = description
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            features=tfds.features.FeaturesDict(
                {
                    # The names and types of the official coco_captions.
                    "image": tfds.features.Image(),
                    "image/filename": tfds.features.Text(),
                    "image/id": np.int64,
                    "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
                    **self.extra_features(),
                }
            ),
        )

    def extra_features(self) -> dict[str, Any]:
        """TFDS features in addition to the common ones. Their values are those of `CaptionRecord.extra`."""
        return {}

    def record_shards(self) -> Mapping[str, Sequence[RecordShard]]:
        """The shards of each split. A shard is a callable that yields its records, about 100 MB of them.

        Training needs the splits "train" and "val"; "validation", "valid" and "dev" are stored as "val". Each call of a
        shard must yield the same records.
        """
        raise UserError(f"{type(self).__name__} has no record_shards, which gives the records of each split")

    @classmethod
    def source_fingerprint(cls) -> str:
        """A text that changes if the images or captions change. Datasets that are up to date are not built again."""
        return ""

    def finished(self) -> None:
        """Called when all records are written, before `skipped` is. Raises an error if the dataset is not valid."""

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[Any]]]]:
        seen: set[int] = set()

        def examples(shard: RecordShard, index: CaptionIndex) -> Iterator[tuple[int, dict[str, Any]]]:
            for record in shard():
                name = f"{type(self).__name__}: image {shown(record.filename)}"
                try:
                    image_id = parse_image_id(record.image_id)
                    for text in (record.filename, *(text for _, text in record.captions)):
                        text.encode()
                except UnicodeEncodeError as error:
                    raise UserError(f"{name}: a lone surrogate in its name or captions; remove it") from error
                except ValueError as error:
                    raise UserError(f"{name}: image_id {error}") from error
                where = f"{type(self).__name__}: image {image_id} ({shown(record.filename)})"
                if image_id in seen:
                    raise UserError(f"{where} occurs twice; give each image its own image_id")
                if not record.captions:
                    raise UserError(f"{where} has no caption; leave it out")
                seen.add(image_id)
                index.add(image_id, record.filename, [text for _, text in record.captions])
                yield (
                    image_id,
                    {
                        "image": record.image,
                        "image/filename": record.filename,
                        "image/id": image_id,
                        "captions": [{"id": id, "text": text} for id, text in record.captions],
                        **record.extra,
                    },
                )

        self._indices: dict[str, CaptionIndex] = {}
        iterators: dict[str, list[Callable[[], Iterator[Any]]]] = {}
        for name, shards in self.record_shards().items():
            split = split_name(name)
            if split in iterators:
                raise UserError(f"{type(self).__name__}.record_shards: {name!r} is another name of the split {split!r}")
            if split != name:
                self.notes.append(f"the split {name!r} is stored as {split!r}")
            if not all(callable(shard) for shard in shards):
                raise UserError(f"{type(self).__name__}.record_shards: the shards of {split!r} must be callables")
            index = self._indices[split] = CaptionIndex()
            iterators[split] = [functools.partial(examples, shard, index) for shard in shards]
        return iterators

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        self.finished()
        folder = Path(self.data_dir)  # still TFDS's incomplete folder
        for split, index in self._indices.items():
            index.save(folder, split)
        write_json(folder / SKIPPED_FILE, [asdict(entry) for entry in self.skipped])
        write_origin(folder, self.origin)
