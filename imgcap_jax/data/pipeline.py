"""The input pipeline: reads what ``data/order.py`` draws, in threads or worker processes (Grain).

Row r of batch k depends only on the seed, k and r, not on the number of threads, worker processes or hosts. The state
of an iterator is therefore the number of batches it has returned.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import grain
import numpy as np
import numpy.typing as npt
from absl import flags

from imgcap_jax.data.builders.layout import PREPARE_AGAIN
from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.feature_files import DTYPES, Dtype
from imgcap_jax.data.image_files import ImageError
from imgcap_jax.data.images import Augmentation, Resize, augment, decode
from imgcap_jax.data.regions import RegionSource, read_regions
from imgcap_jax.data.rows import Batch, TrainingRows, check_store
from imgcap_jax.errors import UserError
from imgcap_jax.tokenizers import DEFAULT, Tokenizer, check_tokenizer

if TYPE_CHECKING:
    from imgcap_jax.data.sources import CaptionSource
    from imgcap_jax.data.vocabulary import Vocabulary

# Largest tolerated share of unreadable images. Above it, the dataset as a whole is broken.
_UNREADABLE_MAX = 0.01
# Number of batches: one being consumed, one ready, and slack for slow images.
_BUFFER = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionData:
    """The training data, and how images and captions become batches."""

    dataset: str = "scenes"
    """Name of a prepared dataset, or a mixture such as flickr8k*2+mine. A weight is the number of times that an epoch
    repeats each image of the dataset (default: 1)."""
    data_dir: Path | None = None
    """Folder of the prepared datasets; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    image_size: int = 224
    """Side length of the images in pixels."""
    resize: Resize = "squash"
    """squash: ignore the aspect ratio; crop: resize the shorter side to image_size, then cut out the centre."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Augmentation of the training images, or of the views of a feature store."""
    batch_size: int = 64
    """Images per batch, over all processes and devices (B)."""
    captions_per_image: int = 5
    """Captions per image in a batch (M), drawn without replacement. (Self-critical training samples its own.)"""
    max_words: int = 20
    """Longer captions are cut to this number of words; T = max_words + 2."""
    min_count: int = 5
    """Words that occur less often in the training captions become <unk>."""
    tokenizer: Tokenizer = DEFAULT
    """How captions become words: ptb (English and other text with blanks between words), characters (Chinese, Japanese,
    Thai; keeps emoji), or your own."""
    views: int = 1
    """Feature views per image if the encoder is frozen: plain, mirrored, crops."""
    feature_dtype: Dtype = "float16"
    """Type of the stored features of a frozen encoder. bfloat16 is for features beyond 65,504, the largest float16."""
    feed: Literal["auto", "host", "device"] = "auto"
    """What gives the devices their batches if the encoder is frozen, and views is above 1 or augmentation is off. host:
    the host sends each batch. device: all features stay in the memory of the devices, which read their batches there,
    many steps per call. auto: device on TPU and GPU, host on CPU. If the features do not fit, the host sends the
    batches. They are the same either way."""
    threads: int = 2
    """Threads that decode images and look up features ahead of time (per worker process, if there are any)."""
    workers: int = 0
    """Worker processes; useful only if threads are too slow."""

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, "data.tokenizer")
        if self.feature_dtype not in DTYPES:
            raise UserError(f"data.feature_dtype is {self.feature_dtype!r}; it must be {' or '.join(DTYPES)}")
        if self.feed not in ("auto", "host", "device"):
            raise UserError(f"data.feed is {self.feed!r}; it must be auto, host or device")
        lowest = {"threads": 0, "workers": 0}
        for name in ("image_size", "batch_size", "captions_per_image", "max_words", "min_count", "views", *lowest):
            if getattr(self, name) < lowest.get(name, 1):
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least {lowest.get(name, 1)}")


class TrainBatches:
    """Endless iterator over batches. Its position can be saved and restored. See `train_batches`."""

    def __init__(self, rows: TrainingRows, process_index: int, process_count: int) -> None:
        self.rows = rows
        self._batches = _batches(rows, process_index, process_count)
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
        config = self.rows.config
        batches = self._batches[count:].to_iter_dataset(_read_options(config))
        if not config.workers:
            return batches
        # Grain reads its absl flags here, and only absl's own main parses them.
        flags.FLAGS.mark_as_parsed()
        return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))

    def get_state(self) -> dict[str, Any]:
        """The position after the last returned batch, as JSON values."""
        return self.rows.position(self._count)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at the position at which `state` was saved, with any number of processes.

        Raises:
            UserError: the state belongs to other data, another batch size or another seed.
        """
        count = self.rows.batches_before(state)
        self.close()
        self._count = count

    def close(self) -> None:
        """Stops threads and worker processes. If the iterator is used again, it continues at the same position."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _batches(rows: TrainingRows, process_index: int, process_count: int) -> grain.MapDataset[Batch]:
    """The part that a process has of each batch, from batch 0 on."""
    mine = slice(process_index, None, process_count)
    if rows.stores is not None:
        return grain.MapDataset.range(sys.maxsize).map(_RegionBatches(rows, mine))
    # One row at a time, because threads decode the images of a batch together.
    per_process = rows.config.batch_size // process_count
    return grain.MapDataset.range(sys.maxsize).map(_ImageRows(rows, mine)).batch(per_process, drop_remainder=True)


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
    """Returns an endless iterator over batches in random order.

    Each epoch is a new permutation of the images. The last batch of an epoch is completed with images of the next.

    With several processes, row r of the global batch is row r // process_count of process r % process_count.
    Together, the processes therefore see the same batches as a single process would.

    Args:
        config: sizes and augmentation.
        sources: a source, or a mixture of (source, weight) pairs. An epoch has each image of a source as often as
            its weight says (see `mixtures`).
        vocabulary: encodes the captions, once, before the first batch.
        seed: determines order, captions, views and augmentation.
        process_index: index of this process.
        process_count: number of processes that share each batch.
        features: the regions of each source, in the order of the sources. Batches then contain the regions of a
            randomly drawn view instead of the image, and no image is read.
        references: the references of all sources, in the order of the sources. Batches then also contain all
            references of each image: "references" int32 [B, R, T] and "reference_count" float32 [B].

    Returns:
        Iterator over batches: "image" uint8 [B, h, w, 3], or "regions" [B, N, D] in the store's dtype (with
        "region_mask" bool [B, N] if the number of regions varies); "tokens" int32 [B, M, T], with rows of pad if an
        image has fewer than M captions; "image_id" int64 [B]; "weight" float32 [B], all ones. B is
        config.batch_size / process_count.

    Raises:
        UserError: the batch size is not a multiple of the number of processes, or a store does not belong to its
            source. While iterating: more than 1 % of a source's images cannot be decoded. (Up to 1 % are reported in
            warnings, and each is replaced by the next image of the source.)
    """
    if config.batch_size % process_count:
        raise UserError(
            f"batch_size {config.batch_size} cannot be divided among {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    mixture = list(sources) if isinstance(sources, Sequence) else [(sources, 1.0)]
    stores = features if features is None or isinstance(features, Sequence) else [features]
    rows = TrainingRows(config, mixture, vocabulary, seed=seed, features=stores, references=references)
    return TrainBatches(rows, process_index, process_count)


class _RegionBatches(grain.transforms.Map):
    """Reads the part of a batch that a process has, from the number of the batch."""

    def __init__(self, rows: TrainingRows, mine: slice) -> None:
        self._rows, self._mine = rows, mine

    def map(self, element: int) -> Batch:
        return self._rows.region_batch(int(element), self._mine)


class _ImageRows(grain.transforms.Map):
    """Reads one row that a process has, from its number in the sequence of rows of that process."""

    def __init__(self, rows: TrainingRows, mine: slice) -> None:
        self._rows, self._mine = rows, mine
        self._unreadable: list[dict[int, str]] = [{} for _ in rows.sources]

    def map(self, element: int) -> Batch:
        size = self._rows.config.batch_size
        batch, place = divmod(int(element), len(range(*self._mine.indices(size))))
        row = range(*self._mine.indices(size))[place]
        images, _, captions = self._rows.order[batch].of(slice(row, row + 1))
        rng = self._rows.order.rng(batch, row)
        wanted = int(images[0])
        number, image = self._readable(wanted, rng)
        if number != wanted:
            images = np.array([number])
            keys = rng.random((1, self._rows.captions.most), np.float32)
            captions = self._rows.captions.choose(images, keys, self._rows.config.captions_per_image)
        return {"image": image, **{name: value[0] for name, value in self._rows.text(images, captions).items()}}

    def _readable(self, number: int, rng: np.random.Generator) -> tuple[int, npt.NDArray[np.uint8]]:
        """The number and the pixels of an image, or of the next image of its source that can be decoded."""
        first, config = self._rows.order.first, self._rows.config
        of = int(np.searchsorted(first, number, side="right")) - 1
        source, start = self._rows.sources[of], int(first[of])
        i = number - start
        while True:
            example = source[i]
            try:
                return start + i, augment(
                    example.image, example.captions, config.image_size, rng, config.augmentation, config.resize
                )
            except ImageError as error:
                self._count_unreadable(of, i, f"{example.filename}: {error}")
            i = (i + 1) % len(source)

    def _count_unreadable(self, of: int, i: int, what: str) -> None:
        source, unreadable = self._rows.sources[of], self._unreadable[of]
        if i not in unreadable:
            unreadable[i] = what
            _log.warning("%s: image skipped: %s", source.name, what)
        if len(unreadable) > _UNREADABLE_MAX * len(source):
            raise UserError(
                f"{source.name}: {len(unreadable)} of {len(source)} images cannot be read, more than 1 % "
                f"(the last: {what}); {PREPARE_AGAIN}"
            )


class EvalBatches:
    """All images in order, without augmentation. Can be iterated any number of times. See `eval_batches`."""

    def __init__(self, rows: "_EvalRows", count: int, config: CaptionData) -> None:
        self._rows = rows
        self._batches = grain.MapDataset.range(count).map(rows)
        self._config = config

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches.to_iter_dataset(_read_options(self._config)))

    def of(self, images: Sequence[int]) -> Batch:
        """One batch of the images with these numbers, without padding. Raises as iterating does."""
        return self._rows.batch(images)


def eval_batches(
    config: CaptionData,
    source: "CaptionSource",
    *,
    batch_size: int,
    rows: npt.NDArray[np.int_] | None = None,
    features: RegionSource | None = None,
    vocabulary: "Vocabulary | None" = None,
) -> EvalBatches:
    """Returns all images in order, without augmentation (view 0 of a feature store). The last batch is padded.

    Args:
        config: image size, resize and threads; with a vocabulary also M and T.
        source: the images.
        batch_size: images per batch (B).
        rows: the rows of each batch that this process computes, in ascending order; None: all of them. No other image
            is read, and the batches consist of these rows only.
        features: the regions of the source, used instead of its images.
        vocabulary: if given, batches contain "tokens" int32 [B, M, T]: the first M captions, for the
            teacher-forced loss.

    Returns:
        Batches: "image" or "regions" (with "region_mask") as in training, "image_id" int64 [B], "weight"
        float32 [B]. Padding rows of the last batch are zeros, with image_id -1 and weight 0.

    Raises:
        UserError: the store does not belong to the source. While iterating: an image cannot be decoded.
    """
    rows = np.arange(batch_size) if rows is None else rows
    reader = _EvalRows(config, source, vocabulary, features, batch_size, rows)
    return EvalBatches(reader, -(-len(source) // batch_size), config)


def images_of_rows(images: int, batch_size: int, rows: npt.NDArray[np.int_]) -> list[int]:
    """The numbers of the images that ``eval_batches`` reads with these rows, in ascending order.

    It is never empty: padding gets its shape from an image.
    """
    starts = np.arange(0, images, batch_size)
    numbers = (starts[:, None] + rows).ravel()
    return numbers[numbers < images].tolist() or [0]


class _EvalRows(grain.transforms.Map):
    """Computes one evaluation batch from its number."""

    def __init__(
        self,
        config: CaptionData,
        source: "CaptionSource",
        vocabulary: "Vocabulary | None",
        store: RegionSource | None,
        batch_size: int,
        rows: npt.NDArray[np.int_],
    ) -> None:
        if store is not None:
            check_store(source, store)
        self._config = config
        self._source = source
        self._store = store
        self._size = batch_size
        self._rows = rows
        self._image_ids = np.asarray(source.image_ids(), np.int64)
        self._captions = None
        if vocabulary is not None:
            self._captions = CaptionTable.for_training([source], vocabulary, config.max_words + 2)

    def map(self, element: int) -> Batch:
        images = self._rows + int(element) * self._size
        images = images[images < len(self._source)].tolist()
        missing = len(self._rows) - len(images)
        if not images:  # all rows are padding, which has the shape of an image
            batch = self.batch(images_of_rows(len(self._source), self._size, self._rows)[:1])
            batch = {name: values[:0] for name, values in batch.items()}
        else:
            batch = self.batch(images)
        if missing:
            batch = {
                name: np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)) for name, values in batch.items()
            }
            batch["image_id"][-missing:] = -1
        return batch

    def batch(self, images: Sequence[int]) -> Batch:
        """The images with these numbers, without padding."""
        batch: Batch = {}
        if self._store is not None:
            numbers = np.asarray(images, np.int64)
            batch["regions"], mask = read_regions(self._store, numbers, np.zeros(len(numbers), np.int32))
            if mask is not None:
                batch["region_mask"] = mask
        else:
            batch["image"] = np.stack([self._image(i) for i in images])
        if self._captions is not None:
            count = self._config.captions_per_image
            batch["tokens"] = self._captions.read(self._captions.first_rows(np.asarray(images, np.int64), count))
        batch["image_id"] = self._image_ids[list(images)]
        batch["weight"] = np.ones(len(images), np.float32)
        return batch

    def _image(self, i: int) -> npt.NDArray[np.uint8]:
        example = self._source[i]
        try:
            return decode(example.image, self._config.image_size, self._config.resize)
        except ImageError as error:
            raise UserError(
                f"{self._source.name}, split {self._source.split}: {example.filename}: {error}; {PREPARE_AGAIN}"
            ) from error


def _read_options(config: CaptionData) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=_BUFFER if config.threads else 0)
