"""What the TFDS builders share: one feature structure, written as array_record without TensorFlow.

`ShardBasedBuilder` and not the usual `GeneratorBasedBuilder`: the latter's shuffling buffer goes through
TensorFlow's file system above 1 GB, and the input pipeline shuffles anyway.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from imgcap_jax.data.builders.layout import (
    ORIGIN_FILE,
    SKIPPED_FILE,
    CaptionIndex,
    Origin,
    Skipped,
    write_json,
)


@dataclass(frozen=True)
class CaptionRecord:
    """One image as it is written: encoded bytes, and captions as (id, text)."""

    image: bytes
    filename: str
    image_id: int
    captions: Sequence[tuple[int, str]]
    extra: Mapping[str, Any] = field(default_factory=dict)


RecordShard = Callable[[], Iterator[CaptionRecord]]


class CaptionBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of the builders that write `CaptionRecord`s; one shard is one callable.

    Beside the records it writes `origin.json`, `skipped.json` and an index of the captions of each split. All
    of it lands in TFDS's incomplete folder, which is renamed at the very end.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, name: str, data_dir: Path, origin: Origin, description: str) -> None:
        self.name = name
        self.origin = origin
        self.skipped: list[Skipped] = []
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
        """Features beyond the common ones; they come from `CaptionRecord.extra`."""
        return {}

    def record_shards(self) -> Mapping[str, Sequence[RecordShard]]:
        """For each split, the callables that yield the records of its shards."""
        raise NotImplementedError

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[Any]]]]:
        def examples(shard: RecordShard, index: CaptionIndex) -> Iterator[tuple[int, dict[str, Any]]]:
            for record in shard():
                index.add(record.image_id, record.filename, [text for _, text in record.captions])
                yield (
                    record.image_id,
                    {
                        "image": record.image,
                        "image/filename": record.filename,
                        "image/id": record.image_id,
                        "captions": [{"id": id, "text": text} for id, text in record.captions],
                        **record.extra,
                    },
                )

        self._indices: dict[str, CaptionIndex] = {}
        iterators: dict[str, list[Callable[[], Iterator[Any]]]] = {}
        for split, shards in self.record_shards().items():
            index = self._indices[split] = CaptionIndex()
            iterators[split] = [functools.partial(examples, shard, index) for shard in shards]
        return iterators

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        folder = Path(self.data_dir)  # still TFDS's incomplete folder
        for split, index in self._indices.items():
            index.save(folder, split)
        write_json(folder / SKIPPED_FILE, [asdict(entry) for entry in self.skipped])
        write_json(folder / ORIGIN_FILE, asdict(self.origin))
