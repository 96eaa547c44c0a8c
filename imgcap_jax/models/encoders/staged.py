"""What all pretrained encoders share: a sequence of stages, of which the last can be trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.convolution import adaptive_average_pool, on_device
from imgcap_jax.models.encoders.pretrained.sources import Pixel, WeightedNetwork, weights_digest
from imgcap_jax.models.encoders.pretrained.state_dict import Layer
from imgcap_jax.models.encoders.pretrained.weights import FrozenVariable


@dataclass(frozen=True, kw_only=True)
class Staged:
    """The settings that all families share. Each family adds fields, checks all fields and builds the encoder."""

    weights: str = "imagenet"
    """imagenet, random, the path of a weights file, or a name such as torchvision/resnet50.IMAGENET1K_V2."""
    trainable_stages: int = 0
    """The number of stages to train, counted from the last; 0 freezes all. Batch norm stays frozen. A stage of a ViT is
    one block."""
    grid: int | None = None
    """Averages regions to this number of rows and columns, as torch's adaptive_avg_pool2d does; None: no averaging."""
    checkpoint_stages: bool = False
    """Recomputes trained stages in the backward pass instead of storing their activations: less memory, more time."""

    def check(self, stages: int) -> None:
        """Raises UserError unless the shared settings fit a network with this number of stages."""
        if not 0 <= self.trainable_stages <= stages:
            raise UserError(
                f"encoder.trainable_stages is {self.trainable_stages}; it must be at least 0 and at most {stages}"
            )
        if self.grid is not None and self.grid < 1:
            raise UserError(f"encoder.grid is {self.grid}; it must be at least 1, or None")

    @property
    def frozen(self) -> bool:
        """Whether no stage is trained."""
        return self.trainable_stages == 0

    def architecture(self) -> WeightedNetwork:
        """The network whose weights are read."""
        raise NotImplementedError

    def weights_digest(self) -> str | None:
        """See `contract.weights_digest`."""
        if self.weights == "random":
            return None
        network = self.architecture()
        return weights_digest(self.weights, family=network.family, network=network.name, shapes=network.shapes())

    def pretrained(self) -> Self:
        """See `contract.pretrained`."""
        if self.weights == "random":
            raise UserError("encoder.weights is random, so the encoder has no pretrained features")
        return replace(self, trainable_stages=0, checkpoint_stages=False)

    def with_weights(self, path: Path) -> Self:
        """See `contract.with_weights`."""
        if self.weights == "random":
            raise UserError("encoder.weights is random, so the encoder reads no file; leave out --weights")
        return replace(self, weights=str(path))


class StagedEncoder(nnx.Module):
    """A network as an encoder of image regions, built by the settings of its family.

    Trained parameters are `nnx.Param`s: all weights of the last `trainable_stages` stages except batch norm. Everything
    else is a `FrozenVariable`. Batch norm is entirely frozen (statistics, scale and bias), like the FrozenBatchNorm of
    detection models.

    Attributes:
        region_count: N, regions per image.
        region_size: D, features per region.
    """

    def __init__(
        self,
        settings: Staged,
        stages: Sequence[Callable[[jax.Array], jax.Array]],
        classifier: Callable[[jax.Array], jax.Array] | None,
        *,
        image_size: int,
        side: int,
        region_size: int,
        mean: Pixel,
        std: Pixel,
        dtype: DTypeLike,
        chunk: int,
    ) -> None:
        """Combines the stages.

        Args:
            settings: the settings of the family.
            stages: applied in order, [B,h,w,C] -> [B,h',w',C'] each; the first receives normalised images.
            classifier: the last map -> logits [B,1000]; None if only regions are needed.
            image_size: side of the images in pixels.
            side: the number of rows, and of columns, of the last map.
            region_size: the number of channels of the last map.
            mean: subtracted from the pixels (0..255), one value per channel.
            std: the divisor after that, one value per channel.
            dtype: dtype of convolutions and products; weights and features are float32.
            chunk: the number of images that pass through the frozen stages at once on a CPU; 0: all.
        """
        self.image_size = image_size
        self.grid = None if settings.grid in (None, side) else settings.grid
        self.region_count = (settings.grid or side) ** 2
        self.region_size = region_size
        self.mean, self.std = mean, std
        self.dtype = jnp.dtype(dtype)
        self.chunk = chunk
        self.frozen_stages = len(stages) - settings.trainable_stages
        self.checkpoint_stages = settings.checkpoint_stages
        self.stages = nnx.List(stages)
        self.classifier = classifier

    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes region features: images uint8 [B,h,w,3], h = w = image_size -> float32 [B,N,D], row by row.

        Raises:
            ValueError: the images do not have the size that the encoder was built for.
        """
        x = self._map(images)
        if self.grid is not None:
            x = adaptive_average_pool(x.astype(jnp.float32), self.grid)
        return x.reshape(x.shape[0], self.region_count, self.region_size).astype(jnp.float32)

    def classify(self, images: jax.Array) -> jax.Array:
        """Computes ImageNet logits [B,1000], in the usual order of the classes, of images uint8 [B,h,w,3].

        Raises:
            ValueError: the images do not have the size that the encoder was built for, or the encoder was built without
                its classifier.
        """
        if self.classifier is None:
            raise ValueError("this encoder was built without its classifier; use build(..., classifier=True)")
        return self.classifier(self._map(images).astype(jnp.float32))

    def _map(self, images: jax.Array) -> jax.Array:
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"the encoder was built for {self.image_size} pixels, but the images have shape {images.shape}"
            )
        x = self._frozen_part(images)
        for stage in self.stages[self.frozen_stages :]:
            x = self._checkpointed(stage, x) if self.checkpoint_stages else stage(x)
        return x

    def _checkpointed(self, stage: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        # Outside a loop, XLA:CPU ignores the checkpoint and keeps the activations that should be recomputed.
        again = jax.checkpoint(stage)
        return jax.lax.platform_dependent(x, cpu=lambda x: _in_chunks(again, x, self.chunk), default=again)

    def _frozen_part(self, images: jax.Array) -> jax.Array:
        def through(images: jax.Array) -> jax.Array:
            x = (images.astype(jnp.float32) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
            x = x.astype(self.dtype)
            for stage in self.stages[: self.frozen_stages]:
                x = stage(x)
            return x

        if self.frozen_stages == 0:
            return through(images)
        # The maps of a few images stay in the cache of a CPU through all stages.
        return jax.lax.platform_dependent(
            images, cpu=lambda images: _in_chunks(through, images, self.chunk), default=through
        )


def _in_chunks(function: Callable[[jax.Array], jax.Array], x: jax.Array, size: int) -> jax.Array:
    """Applies a function of x [B,...] to `size` rows at a time, and then to the remaining rows; 0: to all rows."""
    if not size:
        return function(x)
    whole = x.shape[0] // size * size
    parts = []
    if whole:
        y = jax.lax.map(function, x[:whole].reshape(-1, size, *x.shape[1:]))
        parts.append(y.reshape(whole, *y.shape[2:]))
    if whole < x.shape[0]:
        parts.append(function(x[whole:]))
    return jnp.concatenate(parts)


class MeanClassifier(nnx.Module):
    """The mean of all regions, followed by one linear layer."""

    def __init__(self, layer: Layer) -> None:
        held = on_device(layer)
        self.kernel, self.shift = FrozenVariable(held["kernel"]), FrozenVariable(held["shift"])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,D] -> logits [B,1000]."""
        return x.mean(axis=(1, 2)) @ self.kernel[...] + self.shift[...]
