"""Features of a frozen encoder, computed once into a store."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from imgcap_jax.data.features import FeatureStore
from imgcap_jax.data.images import Augmentation
from imgcap_jax.data.sources import CaptionSource
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.encoders.weights import fingerprint

BATCH = 32  # images an encoder pass; one shape, so one compilation


def uses_store(experiment: Experiment) -> bool:
    """A frozen encoder that sees a fixed number of versions of each image needs to see them only once."""
    data = experiment.data
    return experiment.encoder.frozen and (data.views > 1 or data.augmentation == Augmentation())


def feature_store(
    experiment: Experiment, source: CaptionSource, *, views: int, cache: Path, progress: bool = True
) -> FeatureStore:
    """Opens the store of a split's regions [I,views,N,D], computing what is missing.

    Args:
        experiment: says the encoder, its image size and how pixels are resized.
        source: the split.
        views: versions of each image: the plain one, its mirror image, random crops.
        cache: folder that holds the stores, each under a key of all that decides its content.
        progress: whether to show images/s and the time left.
    """
    data = experiment.data
    encoder = experiment.encoder.build(data.image_size, dtype=jnp.dtype(experiment.training.dtype), rngs=nnx.Rngs(0))
    graph, state = nnx.split(encoder)
    encode = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    return FeatureStore.build(
        source,
        lambda images: encode(state, images),
        key={
            "dataset": source.name,
            "split": source.split,
            "records": source.fingerprint,
            "encoder": repr(experiment.encoder),
            "weights": fingerprint(encoder),
            "dtype": experiment.training.dtype,
        },
        root=cache,
        views=views,
        image_size=data.image_size,
        resize=data.resize,
        augmentation=data.augmentation,
        batch_size=BATCH,
        progress=progress,
    )
