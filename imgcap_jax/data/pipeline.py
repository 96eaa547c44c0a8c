"""The input pipeline (Grain): shuffle, choose captions, decode or look up features, shard, batch.

What row r of batch k holds depends on the seed and on k and r only: not on the number of threads, worker
processes or hosts. So the state of an iterator is the number of batches it gave.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
import numpy.typing as npt
from absl import flags

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.images import Augmentation, ImageError, Resize, augment, decode
from imgcap_jax.data.regions import RegionSource
from imgcap_jax.errors import UserError

if TYPE_CHECKING:
    from imgcap_jax.data.sources import CaptionSource
    from imgcap_jax.data.vocabulary import Vocabulary

Batch = dict[str, npt.NDArray[Any]]

# Above this share of unreadable images a dataset is broken rather than blemished.
_UNREADABLE_MAX = 0.01
# In batches; one being consumed, one ready, and slack for a slow image.
_BUFFER = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionData:
    """What a run trains on, and how images and captions become batches."""

    dataset: str = "scenes"
    """A prepared dataset, or a mixture with weights: flickr8k*2+coco_subset."""
    data_dir: Path | None = None
    """Where datasets are prepared; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    image_size: int = 224
    """Side of the images in pixels."""
    resize: Resize = "squash"
    """squash: ignore the aspect ratio; crop: shorter side to the size, then cut the centre out."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Of training images, or of the views of a feature store."""
    batch_size: int = 64
    """Images a batch, over all processes and devices (B)."""
    captions_per_image: int = 5
    """Captions of an image in a batch (M), drawn without replacement. (Self-critical training samples its own.)"""
    max_words: int = 20
    """Longer captions are cut; T = max_words + 2."""
    min_count: int = 5
    """A word seen less often in the training captions is <unk>."""
    views: int = 1
    """Feature views an image, where the encoder is frozen: plain, mirrored, crops."""
    threads: int = 2
    """Threads that decode and look up batches ahead of time (in each worker process, where there are any)."""
    workers: int = 0
    """Worker processes; worth it only where threads don't keep up."""

    def __post_init__(self) -> None:
        lowest = {"threads": 0, "workers": 0}
        for name in ("image_size", "batch_size", "captions_per_image", "max_words", "min_count", "views", *lowest):
            if getattr(self, name) < lowest.get(name, 1):
                raise UserError(f"data.{name} is {getattr(self, name)}; give {lowest.get(name, 1)} or more")


class TrainBatches:
    """Endless iterator over batches whose position can be saved and restored. See `train_batches`."""

    def __init__(self, batches: grain.MapDataset[Batch], config: CaptionData, identity: Mapping[str, Any]) -> None:
        self._batches = batches
        self._config = config
        self._identity = dict(identity)
        self._count = 0
        self._iterator: grain.DatasetIterator[Batch] | None = None

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._read_from(self._count))
        batch = next(self._iterator)
        self._count += 1
        return batch

    def _read_from(self, count: int) -> grain.IterDataset[Batch]:
        batches = self._batches[count:].to_iter_dataset(_read_options(self._config))
        if not self._config.workers:
            return batches
        # Grain reads its flags here, which nobody parses outside absl's own main.
        flags.FLAGS.mark_as_parsed()
        return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._config.workers))

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch given, as JSON values."""
        return {"batches": self._count, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batches that had been given when `state` was got, with any number of processes.

        Raises:
            UserError: the state is of other data, another batch size or another seed.
        """
        saved = {name: value for name, value in state.items() if name != "batches"}
        if saved != self._identity or "batches" not in state:
            changed = ", ".join(
                f"{name} {saved.get(name)} -> {self._identity.get(name)}"
                for name in sorted({*saved, *self._identity})
                if saved.get(name) != self._identity.get(name)
            )
            raise UserError(
                f"the saved position is not of this data ({changed or 'no batches'}): resume with the "
                "settings and the prepared dataset of the run, or start a new run"
            )
        self.close()
        self._count = int(state["batches"])

    def close(self) -> None:
        """Stops threads and worker processes. The iterator goes on where it was if it is used again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def train_batches(
    config: CaptionData,
    sources: "CaptionSource | Sequence[tuple[CaptionSource, float]]",
    vocabulary: "Vocabulary",
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    features: RegionSource | Sequence[RegionSource] | None = None,
    references: CaptionTable | None = None,
) -> TrainBatches:
    """Endless batches in random order; each epoch is a new permutation, and batches run across its end.

    With several processes, row r of the global batch is row r // process_count of process r % process_count,
    so that together they see what a single process would.

    Args:
        config: sizes and augmentation.
        sources: a source, or a mixture of (source, weight): a share of the rows in proportion to its weight,
            whatever its size (Grain keeps weights to a hundredth of the smallest).
        vocabulary: encodes the captions, once, before the first batch.
        seed: decides order, captions, views and augmentation.
        process_index: which process this is.
        process_count: how many processes share each batch.
        features: for each source its regions, in the same order; batches then carry regions in place of images,
            of a view drawn at random, and no image is read.
        references: of all sources in their order; batches then carry all references of each image as well:
            "references" int32 [B, R, T] and "reference_count" float32 [B].

    Returns:
        Iterator of batches: "image" uint8 [B, h, w, 3] or "regions" [B, N, D] in the store's dtype (with
        "region_mask" bool [B, N] where their number differs); "tokens"
        int32 [B, M, T], rows of pad where an image has fewer than M captions; "image_id" int64 [B]; "weight"
        float32 [B], all ones. B is config.batch_size / process_count.

    Raises:
        UserError: the batch cannot be divided among the processes, or a store is not of its source. While
            iterating: more than 1 % of a source's images cannot be decoded (fewer are named in a warning, and
            the next image of the source stands in).
    """
    if config.batch_size % process_count:
        raise UserError(
            f"batch_size {config.batch_size} cannot be divided among {process_count} processes; "
            f"take a multiple of {process_count}"
        )
    mixture = list(sources) if isinstance(sources, Sequence) else [(sources, 1.0)]
    stores = features if features is None or isinstance(features, Sequence) else [features]
    rows = _TrainRows(config, [source for source, _ in mixture], vocabulary, stores, references)
    seeds = [int(value) for value in np.random.SeedSequence(seed).generate_state(len(mixture) + 1)]
    # Every source is a range of numbers: image `number` of the mixture.
    numbers = [
        grain.MapDataset.range(first, first + len(source)).shuffle(seed=source_seed).repeat()
        for (source, _), first, source_seed in zip(mixture, rows.first, seeds[1:], strict=True)
    ]
    images = grain.MapDataset.mix(numbers, [weight for _, weight in mixture])
    # Rows are made before the slice: their random numbers come from their place in the global sequence.
    mine = images.random_map(rows, seed=seeds[0])[process_index::process_count]
    batches = mine.batch(config.batch_size // process_count, drop_remainder=True)
    identity = {
        "seed": seed,
        "batch_size": config.batch_size,
        "captions": rows.fingerprint,
        "sources": [[source.name, source.split, len(source), float(weight)] for source, weight in mixture],
    }
    if references is not None:
        identity["references"] = references.fingerprint
    return TrainBatches(batches, config, identity)


class EvalBatches:
    """All images in order, without augmentation; may be gone through again and again. See `eval_batches`."""

    def __init__(self, batches: grain.MapDataset[Batch], config: CaptionData) -> None:
        self._batches = batches
        self._config = config

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches.to_iter_dataset(_read_options(self._config)))


def eval_batches(
    config: CaptionData,
    source: "CaptionSource",
    *,
    batch_size: int,
    features: RegionSource | None = None,
    vocabulary: "Vocabulary | None" = None,
) -> EvalBatches:
    """All images in order, without augmentation (view 0 of a feature store); the last batch is filled up.

    Args:
        config: image size, resize, threads; with a vocabulary M and T as well.
        source: the images.
        batch_size: images a batch (B).
        features: the source's regions, in place of its images.
        vocabulary: where given, batches carry "tokens" int32 [B, M, T]: the first M captions, for
            teacher-forced loss.

    Returns:
        Batches: "image" or "regions" (with "region_mask") as in training, "image_id" int64 [B], "weight"
        float32 [B]. Rows that fill the last batch are zeros, with image_id -1 and weight 0.

    Raises:
        UserError: the store is not of this source. While iterating: an image cannot be decoded.
    """
    rows = _EvalRows(config, source, vocabulary, features, batch_size)
    return EvalBatches(grain.MapDataset.range(-(-len(source) // batch_size)).map(rows), config)


class _TrainRows(grain.transforms.RandomMap):
    """One training row from the number of an image in the mixture."""

    def __init__(
        self,
        config: CaptionData,
        sources: "list[CaptionSource]",
        vocabulary: "Vocabulary",
        stores: Sequence[RegionSource] | None,
        references: CaptionTable | None,
    ) -> None:
        self._config = config
        self._sources = sources
        self._stores = stores
        if stores is not None:
            for source, store in zip(sources, stores, strict=True):
                _check_store(source, store)
        self.first = [0, *np.cumsum([len(source) for source in sources]).tolist()][:-1]
        self._captions = CaptionTable.for_training(sources, vocabulary, config.max_words + 2)
        self._references = references
        self._image_ids = np.concatenate([np.asarray(source.image_ids(), np.int64) for source in sources])
        self._unreadable: list[dict[int, str]] = [{} for _ in sources]

    @property
    def fingerprint(self) -> str:
        """Of all captions as tokens, so that a state isn't resumed with others."""
        return self._captions.fingerprint

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        number = int(element)
        of = int(np.searchsorted(self.first, number, side="right")) - 1
        i = number - self.first[of]
        row: dict[str, Any] = {}
        if self._stores is not None:
            store = self._stores[of]
            row["regions"], mask = store.read(i, int(rng.integers(store.views)))
            if mask is not None:
                row["region_mask"] = mask
        else:
            i, row["image"] = self._readable(of, i, rng)
            number = self.first[of] + i
        count = self._config.captions_per_image
        chosen = rng.permutation(self._captions.count(number))[:count]
        row["tokens"] = self._captions.rows(number, chosen, count)
        if self._references is not None:
            real = self._references.count(number)
            row["references"] = self._references.rows(number, range(real), self._references.most)
            row["reference_count"] = np.float32(real)
        row["image_id"] = self._image_ids[number]
        row["weight"] = np.float32(1)
        return row

    def _readable(self, of: int, i: int, rng: np.random.Generator) -> tuple[int, npt.NDArray[np.uint8]]:
        """The image, or the next one that can be decoded, and its number in its source."""
        source, config = self._sources[of], self._config
        while True:
            example = source[i]
            try:
                return i, augment(
                    example.image,
                    example.captions,
                    config.image_size,
                    rng,
                    config.augmentation,
                    config.resize,
                )
            except ImageError as error:
                self._count_unreadable(of, i, f"{example.filename}: {error}")
            i = (i + 1) % len(source)

    def _count_unreadable(self, of: int, i: int, what: str) -> None:
        source, unreadable = self._sources[of], self._unreadable[of]
        if i not in unreadable:
            unreadable[i] = what
            _log.warning("%s: image skipped: %s", source.name, what)
        if len(unreadable) > _UNREADABLE_MAX * len(source):
            raise UserError(
                f"{source.name}: {len(unreadable)} of {len(source)} images cannot be read, more than 1 % "
                f"(the last: {what}); prepare the dataset again"
            )


class _EvalRows(grain.transforms.Map):
    """One evaluation batch from its number."""

    def __init__(
        self,
        config: CaptionData,
        source: "CaptionSource",
        vocabulary: "Vocabulary | None",
        store: RegionSource | None,
        batch_size: int,
    ) -> None:
        if store is not None:
            _check_store(source, store)
        self._config = config
        self._source = source
        self._store = store
        self._size = batch_size
        self._image_ids = np.asarray(source.image_ids(), np.int64)
        self._captions = None
        if vocabulary is not None:
            self._captions = CaptionTable.for_training([source], vocabulary, config.max_words + 2)

    def map(self, element: int) -> Batch:
        start = int(element) * self._size
        images = range(start, min(start + self._size, len(self._source)))
        batch: Batch = {}
        if self._store is not None:
            regions, masks = zip(*(self._store.read(i, 0) for i in images), strict=True)
            batch["regions"] = np.stack(regions)
            if masks[0] is not None:
                batch["region_mask"] = np.stack(masks)
        else:
            batch["image"] = np.stack([self._image(i) for i in images])
        if self._captions is not None:
            count = self._config.captions_per_image
            batch["tokens"] = np.stack(
                [self._captions.rows(i, range(min(count, self._captions.count(i))), count) for i in images]
            )
        batch["image_id"] = self._image_ids[images.start : images.stop]
        batch["weight"] = np.ones(len(images), np.float32)
        missing = self._size - len(images)
        if missing:
            batch = {
                name: np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)) for name, values in batch.items()
            }
            batch["image_id"][-missing:] = -1
        return batch

    def _image(self, i: int) -> npt.NDArray[np.uint8]:
        example = self._source[i]
        try:
            return decode(example.image, self._config.image_size, self._config.resize)
        except ImageError as error:
            raise UserError(
                f"{self._source.name}, split {self._source.split}: {example.filename}: {error}; "
                "prepare the dataset again"
            ) from error


def _read_options(config: CaptionData) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=_BUFFER if config.threads else 0)


def _check_store(source: "CaptionSource", store: RegionSource) -> None:
    if len(store) != len(source):
        raise UserError(
            f"the features are of {len(store)} images, {source.name} split {source.split} has {len(source)}: "
            "delete the folder of features to compute them again"
        )
