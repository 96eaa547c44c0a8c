"""Regions that training does not change: those of a frozen encoder, computed once and stored, and ready-made ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imgcap_jax.data.features import FeatureStore
from imgcap_jax.data.regions import ReadyRegions, RegionFiles, RegionSource, has_ready_regions
from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, classes
from imgcap_jax.files import file_digest
from imgcap_jax.models.encoders.contract import build_encoder
from imgcap_jax.models.encoders.pretrained.weights import fingerprint
from imgcap_jax.precision import compute_dtype, frozen_dtype, matmul_precision
from imgcap_jax.training.parallel import DataParallel
from imgcap_jax.user_code import source_files

BATCH = 32  # images per encoder pass and device; one shape, so one compilation


def uses_store(experiment: Experiment) -> bool:
    """Whether regions are read from a store, because the encoder would compute the same ones in each epoch."""
    data, settings = experiment.data, experiment.encoder
    return has_ready_regions(settings) or (settings.frozen and (data.views > 1 or not data.augmentation.changes_images))


def reads_stored_regions(experiment: Experiment, decodings: Sequence[Decoding]) -> bool:
    """Whether images are captioned from stored regions. Those of mirror images are not stored.

    Raises:
        UserError: mirror images are asked for, but the regions are ready-made.
    """
    if not any(decoding.mirror for decoding in decodings):
        return uses_store(experiment)
    if has_ready_regions(experiment.encoder):
        raise UserError("mirror needs photos, but this run was trained on ready-made regions; leave it out")
    return False


def why_not_stored(experiment: Experiment) -> tuple[str, str]:
    """Why the encoder computes regions in each step, and what would change that; ("", "") if they are stored."""
    if uses_store(experiment):
        return "", ""
    data, trained = experiment.data, not experiment.encoder.frozen
    drawn = data.views == 1 and data.augmentation.changes_images
    causes = [(trained, "the encoder is trained", "use a frozen one")]
    causes.append((drawn, "data.augmentation changes each image in each epoch", "set data.views above 1"))
    found = [(why, remedy) for missing, why, remedy in causes if missing]
    return " and ".join(why for why, _ in found), " and ".join(remedy for _, remedy in found)


def encoder_dtype(experiment: Experiment, platform: str | None = None) -> Literal["float32", "bfloat16"]:
    """The type of the encoder's products. Features that are stored have the same type on every platform.

    Args:
        experiment: what is computed.
        platform: see ``precision.compute_dtype``.
    """
    dtype = experiment.training.dtype
    return frozen_dtype(dtype) if uses_store(experiment) else compute_dtype(dtype, platform)


def extract(experiment: Experiment, splits: Sequence[str], cache: Path) -> None:
    """Computes the stores that training and evaluating an experiment on these splits will read.

    Raises:
        UserError: the experiment has no features to store, or a split does not exist; see also `Extraction`.
    """
    settings = experiment.encoder
    own = has_ready_regions(settings) and not isinstance(settings, RegionFiles)
    if own or not uses_store(experiment):
        if own:
            why = f"reads ready-made regions ({type(settings).__name__})"
        elif settings.frozen:
            why = "draws new augmentations in each epoch (data.views is 1)"
        else:
            why = "trains its encoder"
        raise UserError(f"the experiment {why}, so there are no features to store")
    extraction = Extraction(experiment, cache)
    data = experiment.data
    names = [name for name, _ in parse_mixture(data.dataset)]
    for split in splits:
        # As in training: the whole mixture is trained on, and its first dataset is evaluated on.
        for name in names if split == "train" else names[:1]:
            source = open_source(name, split, data.data_dir)
            if split == "val":
                source = source.first(experiment.training.validation_images or len(source))
            extraction.regions(source, views=data.views if split == "train" else 1)


def _identity(settings: Any) -> str:
    """The settings of an encoder that determine its features."""
    same = {"checkpoint_stages": False} if hasattr(settings, "checkpoint_stages") else {}
    files = source_files(classes(settings))  # of a user's own encoder, whose code determines its features too
    return " ".join([repr(replace(settings, **same)), *map(file_digest, files.values())])


class Extraction:
    """The regions of splits as an experiment needs them. What is missing is computed."""

    def __init__(
        self, experiment: Experiment, cache: Path, *, progress: bool = True, parallel: DataParallel | None = None
    ) -> None:
        """Computes nothing yet. With several processes, all of them must call it.

        Args:
            experiment: its encoder, image size and resizing are used.
            cache: folder of the stores. The key of a store covers everything that determines its content.
            progress: whether to show images/s and the time left.
            parallel: the devices, if several processes work together. If they have the same ``cache``, they share the
                work, and each of them can read everything. If not, see ``regions``.
        """
        self.shared = parallel is None or parallel.share(cache)
        self.experiment = experiment
        self._cache = cache
        self._progress = progress

    @property
    def row_bytes(self) -> int | None:
        """The size of the stored features of a view; None: they are ready-made, and their number can vary."""
        if has_ready_regions(self.experiment.encoder):
            return None
        encoder, _, _ = self._encoder
        return int(encoder.region_count * encoder.region_size * 2)

    def regions(self, source: CaptionSource, *, views: int, images: Sequence[int] | None = None) -> RegionSource:
        """The regions of a split, in this number of views per image: the image itself, its mirror image, random crops.

        Args:
            source: the split.
            views: the number of views.
            images: the numbers of the images that this process will read; None: all of them. Processes that do not
                have the same cache compute and store only these. Otherwise all images are there.

        Raises:
            UserError: see `FeatureStore.build`, `FeatureStore.of_regions` and `RegionSettings.read_regions`.
        """
        data, settings = self.experiment.data, self.experiment.encoder
        if self.shared:
            images = None
        if has_ready_regions(settings):
            ready = settings.read_regions(source)
            if not isinstance(ready, ReadyRegions):
                return ready  # of a user, who decides where they are kept
            return FeatureStore.of_regions(
                ready, root=self._cache, dtype=data.feature_dtype, progress=self._progress, images=images
            )
        encoder, encode, weights = self._encoder
        return FeatureStore.build(
            source,
            encode,
            regions=(encoder.region_count, encoder.region_size),
            key={
                "dataset": source.name,
                "split": source.split,
                "records": source.fingerprint,
                "encoder": _identity(settings),
                "weights": weights,
                "normalisation": f"{getattr(encoder, 'mean', None)} {getattr(encoder, 'std', None)}",
                "dtype": encoder_dtype(self.experiment),
            },
            root=self._cache,
            views=views,
            image_size=data.image_size,
            resize=data.resize,
            augmentation=data.augmentation,
            batch_size=BATCH * jax.local_device_count(),
            dtype=data.feature_dtype,
            progress=self._progress,
            images=images,
        )

    @cached_property
    def _encoder(self) -> tuple[Any, Callable[[Any], np.ndarray], str]:
        """The encoder, its compiled function of images, and a fingerprint of its weights."""
        settings = self.experiment.encoder
        assert not has_ready_regions(settings)
        dtype = encoder_dtype(self.experiment)
        # As in `Run.model`, so that random weights are the same.
        rngs = nnx.Rngs(self.experiment.training.seed)
        encoder = build_encoder(settings, self.experiment.data.image_size, dtype=jnp.dtype(dtype), rngs=rngs)
        graph, state = nnx.split(encoder)

        local = DataParallel(devices=jax.local_devices())
        state = local.replicate(state)

        @local.map_rows
        def encode(state: Any, images: Any) -> Any:
            with matmul_precision(dtype):
                return nnx.merge(graph, state)(images)

        def encoded(images: np.ndarray) -> np.ndarray:
            regions: np.ndarray = local.own(encode(state, local.put_rows({"image": images}, len(images))["image"]))
            return regions

        return encoder, encoded, fingerprint(encoder)
