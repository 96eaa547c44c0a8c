"""What the pretrained families share as encoders: stages, of which the last ones may be trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.convolution import adaptive_average_pool
from imgcap_jax.models.encoders.pretrained.sources import Pixel
from imgcap_jax.models.encoders.pretrained.state_dict import Layer
from imgcap_jax.models.encoders.pretrained.weights import FrozenVariable


@dataclass(frozen=True, kw_only=True)
class Staged:
    """The settings that the families share; each adds its own, checks them all, and builds."""

    weights: str = "imagenet"
    """imagenet, random, the path of a file, or a name such as torchvision/resnet50.IMAGENET1K_V2."""
    trainable_stages: int = 0
    """How many stages are trained, counted from the last; 0 freezes all. Batch norm stays frozen."""
    grid: int | None = None
    """Regions are averaged to so many rows and columns, as torch's adaptive_avg_pool2d; None: as they come."""
    checkpoint_stages: bool = False
    """Trained stages are computed again in the backward pass instead of kept: less memory, more time."""

    def check(self, stages: int) -> None:
        """Raises UserError unless the shared settings fit a network of so many stages."""
        name = type(self).__name__
        if not 0 <= self.trainable_stages <= stages:
            raise UserError(f"{name} can't train {self.trainable_stages} stages; choose 0 to {stages}.")
        if self.grid is not None and self.grid < 1:
            raise UserError(f"{name}: a grid of {self.grid} holds no region; choose 1 or more, or None.")

    @property
    def frozen(self) -> bool:
        """Whether nothing of it is trained."""
        return self.trainable_stages == 0


class StagedEncoder(nnx.Module):
    """A convolutional network as an encoder of image regions; built by the settings of its family.

    What is trained, the kernels of the last `trainable_stages` stages (and the biases of those that have no batch
    norm behind them), are `nnx.Param`s; all else is `FrozenVariable`. Batch norm is frozen whole (statistics, scale and
    bias), like the FrozenBatchNorm of detection models.

    Attributes:
        region_count: N.
        region_size: D.
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
        """Puts the stages together.

        Args:
            settings: of the family.
            stages: maps [B,h,w,C] -> [B,h',w',C'] one after the other; the first gets normalised images.
            classifier: the last map -> logits [B,1000]; None where only regions are wanted.
            image_size: side of the images in pixels.
            side: rows and columns of the last map.
            region_size: its channels.
            mean: taken from the pixels (0..255) first.
            std: what they are divided by then.
            dtype: what the convolutions compute in; weights and features are float32.
            chunk: images that go through the frozen stages together on a CPU.
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
        """Region features: images uint8 [B,h,w,3], h = w = image_size -> float32 [B,N,D], row by row.

        Raises:
            ValueError: the images are of another size than the encoder was built for.
        """
        x = self._map(images)
        if self.grid is not None:
            x = adaptive_average_pool(x.astype(jnp.float32), self.grid)
        return x.reshape(x.shape[0], self.region_count, self.region_size).astype(jnp.float32)

    def classify(self, images: jax.Array) -> jax.Array:
        """ImageNet logits [B,1000], in the usual order of the 1000 classes, of images uint8 [B,h,w,3].

        Raises:
            ValueError: the images are of another size, or the encoder was built without its classifier.
        """
        if self.classifier is None:
            raise ValueError("this encoder was built without its classifier; use build(..., classifier=True)")
        return self.classifier(self._map(images).astype(jnp.float32))

    def _map(self, images: jax.Array) -> jax.Array:
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(f"encoder built for {self.image_size} pixels got images {images.shape}")
        x = self._frozen_part(images)
        for stage in self.stages[self.frozen_stages :]:
            x = self._checkpointed(stage, x) if self.checkpoint_stages else stage(x)
        return x

    def _checkpointed(self, stage: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        if jax.default_backend() != "cpu":
            return jax.checkpoint(stage)(x)
        # XLA:CPU sees through the checkpoint and keeps what was to be computed again, unless it is in a loop.
        return _in_chunks(jax.checkpoint(stage), x, self.chunk)

    def _frozen_part(self, images: jax.Array) -> jax.Array:
        def through(images: jax.Array) -> jax.Array:
            x = (images.astype(jnp.float32) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
            x = x.astype(self.dtype)
            for stage in self.stages[: self.frozen_stages]:
                x = stage(x)
            return x

        if jax.default_backend() != "cpu" or self.frozen_stages == 0:
            return through(images)
        # A few images at a time stay in a CPU's cache all the way down.
        return _in_chunks(through, images, self.chunk)


def _in_chunks(function: Callable[[jax.Array], jax.Array], x: jax.Array, size: int) -> jax.Array:
    """A function of x [B,...] applied to `size` rows at a time, and to what is left."""
    whole = x.shape[0] // size * size
    parts = []
    if whole:
        y = jax.lax.map(function, x[:whole].reshape(-1, size, *x.shape[1:]))
        parts.append(y.reshape(whole, *y.shape[2:]))
    if whole < x.shape[0]:
        parts.append(function(x[whole:]))
    return jnp.concatenate(parts)


class MeanClassifier(nnx.Module):
    """The mean of all regions, then one linear layer."""

    def __init__(self, layer: Layer) -> None:
        self.kernel = FrozenVariable(jnp.asarray(layer["kernel"]))
        self.shift = FrozenVariable(jnp.asarray(layer["shift"]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,D] -> logits [B,1000]."""
        return x.mean(axis=(1, 2)) @ self.kernel[...] + self.shift[...]
