"""Regions that don't change in training: of a frozen encoder, computed once into a store, or ready-made ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imgcap_jax.data.features import FeatureStore
from imgcap_jax.data.images import Augmentation
from imgcap_jax.data.regions import ReadyRegions, RegionFiles, RegionSource
from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.encoders.pretrained.weights import fingerprint

BATCH = 32  # images an encoder pass; one shape, so one compilation


def uses_store(experiment: Experiment) -> bool:
    """A frozen encoder that sees a fixed number of versions of each image needs to see them only once."""
    data = experiment.data
    if isinstance(experiment.encoder, RegionFiles):
        return True
    return experiment.encoder.frozen and (data.views > 1 or data.augmentation == Augmentation())


def extract(experiment: Experiment, splits: Sequence[str], cache: Path) -> None:
    """Computes the stores that training and evaluating an experiment on these splits will look for.

    Raises:
        UserError: the experiment reads images in training, or ready-made regions; no such split; see `Extraction`.
    """
    if not uses_store(experiment) or isinstance(experiment.encoder, RegionFiles):
        if isinstance(experiment.encoder, RegionFiles):
            why = "reads ready-made regions"
        elif experiment.encoder.frozen:
            why = "augments images without end (data.views is 1)"
        else:
            why = "trains its encoder"
        raise UserError(f"the experiment {why}, so there are no features to keep")
    extraction = Extraction(experiment, cache)
    data = experiment.data
    names = [name for name, _ in parse_mixture(data.dataset)]
    for split in splits:
        # As in training: the whole mixture, but validation and tests on its first dataset.
        for name in names if split == "train" else names[:1]:
            source = open_source(name, split, data.data_dir)
            if split == "val":
                source = source.first(experiment.training.validation_images or len(source))
            extraction.regions(source, views=data.views if split == "train" else 1)


def _identity(settings: Any) -> str:
    """The settings of an encoder, less what doesn't change its features."""
    same = {"checkpoint_stages": False} if hasattr(settings, "checkpoint_stages") else {}
    return repr(replace(settings, **same))


class Extraction:
    """Gives the regions of splits as an experiment wants them, computing what is missing."""

    def __init__(self, experiment: Experiment, cache: Path, *, progress: bool = True) -> None:
        """Computes nothing yet.

        Args:
            experiment: says the encoder, its image size and how pixels are resized.
            cache: folder that holds the stores, each under a key of all that decides its content.
            progress: whether to show images/s and the time left.
        """
        self.experiment = experiment
        self._cache = cache
        self._progress = progress

    def regions(self, source: CaptionSource, *, views: int) -> RegionSource:
        """The regions of a split, in so many views of each image: the plain one, its mirror image, random crops.

        Raises:
            UserError: see `FeatureStore.build` and `ReadyRegions`.
        """
        data, settings = self.experiment.data, self.experiment.encoder
        if isinstance(settings, RegionFiles):
            return ReadyRegions(settings, source)
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
                "dtype": self.experiment.training.dtype,
            },
            root=self._cache,
            views=views,
            image_size=data.image_size,
            resize=data.resize,
            augmentation=data.augmentation,
            batch_size=BATCH,
            progress=self._progress,
        )

    @cached_property
    def _encoder(self) -> tuple[Any, Callable[[Any], np.ndarray], str]:
        """The encoder, the compiled function of images, and a fingerprint of all that it computes with."""
        settings = self.experiment.encoder
        assert not isinstance(settings, RegionFiles)
        dtype = jnp.dtype(self.experiment.training.dtype)
        # As `Run.model` builds it, random weights too.
        rngs = nnx.Rngs(self.experiment.training.seed)
        encoder = settings.build(self.experiment.data.image_size, dtype=dtype, rngs=rngs)
        graph, state = nnx.split(encoder)

        @jax.jit
        def encode(state: Any, images: Any) -> Any:
            # Whatever the device's default: what is kept under "float32" is the same everywhere.
            with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
                return nnx.merge(graph, state)(images)

        return encoder, lambda images: np.asarray(encode(state, images)), fingerprint(encoder)
