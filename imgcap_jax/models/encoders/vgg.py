"""VGG-16 and VGG-19 (Simonyan and Zisserman 2015, arXiv:1409.1556), with and without batch norm.

Tensor names and layout are torchvision's: the convolutions have biases even if batch norm follows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.convolution import ConvNorm, adaptive_average_pool, max_pool
from imgcap_jax.models.encoders.pretrained.state_dict import ConvolutionSpec, Layer, LinearSpec, Network, load_layers
from imgcap_jax.models.encoders.pretrained.weights import FrozenVariable
from imgcap_jax.models.encoders.staged import Staged, StagedEncoder

_CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # per stage
_STAGES = 5
_CHANNELS = (64, 128, 256, 512, 512)
_HIDDEN = 4096
_CLASSIFIER_SIDE = 7
# Images per chunk of the frozen stages on a CPU. Values from 1 to 8 differ by at most a tenth in speed.
_CHUNK = 2


def network(depth: int, batch_norm: bool) -> Network:
    """Describes VGG-`depth` as a list of its tensors."""
    convolutions: list[ConvolutionSpec] = []
    inputs, place = 3, 0
    for stage, (count, channels) in enumerate(zip(_CONVOLUTIONS[depth], _CHANNELS, strict=True), start=1):
        for _ in range(count):
            norm = f"features.{place + 1}" if batch_norm else None
            convolutions.append(ConvolutionSpec(f"features.{place}", norm, (channels, inputs, 3, 3), stage, bias=True))
            inputs = channels
            place += 3 if batch_norm else 2  # the convolution, its batch norm (if any) and the ReLU
        place += 1  # the max pool
    flat = _CHANNELS[-1] * _CLASSIFIER_SIDE**2
    return Network(
        family="vgg",
        name=f"vgg{depth}_bn" if batch_norm else f"vgg{depth}",
        stages=_STAGES,
        convolutions=tuple(convolutions),
        classifier=(
            LinearSpec("classifier.0", (_HIDDEN, flat)),
            LinearSpec("classifier.3", (_HIDDEN, _HIDDEN)),
            LinearSpec("classifier.6", (1000, _HIDDEN)),
        ),
        epsilon=1e-5,
    )


def tensor_shapes(depth: int, batch_norm: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of the state dict by name, except the batch-norm counters."""
    return network(depth, batch_norm).shapes()


class VGGStage(nnx.Module):
    """3x3 convolutions with ReLU, then a 2x2 max pool."""

    def __init__(self, layers: list[Layer], *, pool: bool) -> None:
        self.convolutions = nnx.List([ConvNorm(layer) for layer in layers])
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,C] -> [B,h//2,w//2,C'], or [B,h,w,C'] without the pool."""
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return max_pool(x, window=2, stride=2) if self.pool else x


class VGGClassifier(nnx.Module):
    """Averages the map to 7x7, flattens it, and applies three linear layers."""

    def __init__(self, layers: Mapping[str, Layer], *, pool: bool) -> None:
        first, *others = (layers[name] for name in ("classifier.0", "classifier.3", "classifier.6"))
        # PyTorch flattens a map [C,h,w]; the map here is [h,w,C].
        kernel = first["kernel"].reshape(_CHANNELS[-1], _CLASSIFIER_SIDE**2, _HIDDEN).transpose(1, 0, 2)
        kernels = [kernel.reshape(-1, _HIDDEN), *(layer["kernel"] for layer in others)]
        self.kernels = nnx.List([FrozenVariable(jnp.asarray(kernel)) for kernel in kernels])
        self.shifts = nnx.List([FrozenVariable(jnp.asarray(layer["shift"])) for layer in (first, *others)])
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,512] -> logits [B,1000]."""
        x = max_pool(x, window=2, stride=2) if self.pool else x
        x = adaptive_average_pool(x, _CLASSIFIER_SIDE)
        x = x.reshape(x.shape[0], -1) @ self.kernels[0][...] + self.shifts[0][...]
        for kernel, shift in zip(self.kernels[1:], self.shifts[1:], strict=True):
            x = jax.nn.relu(x) @ kernel[...] + shift[...]
        return x


@dataclass(frozen=True)
class VGG(Staged):
    """VGG encoder: N = floor(image size / 32)^2 regions of D = 512 features.

    Without the last pool, N = floor(image size / 16)^2. Each of the five stages ends at a max pool.
    """

    depth: Literal[16, 19] = 16
    batch_norm: bool = False
    last_pool: bool = True
    """Takes regions after the last max pool (7x7 at 224 pixels). Xu et al. (2015) took them before it (14x14)."""

    def __post_init__(self) -> None:
        if self.depth not in _CONVOLUTIONS:
            raise UserError(f"VGG-{self.depth} is not supported; choose 16 or 19.")
        self.check(_STAGES)

    @property
    def region_size(self) -> int:
        """D."""
        return _CHANNELS[-1]

    def architecture(self) -> Network:
        """See `Staged`."""
        return network(self.depth, self.batch_norm)

    def build(
        self, image_size: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, classifier: bool = False
    ) -> StagedEncoder:
        """Builds the encoder for square images of `image_size` pixels.

        Args:
            image_size: side of the images in pixels, at least 32.
            dtype: dtype of the convolutions; weights and features are float32.
            rngs: the stream `params` initialises random weights.
            classifier: whether to include the classifier, which `classify` needs. It has most of VGG's parameters.

        Raises:
            UserError: the images are too small, or the weights are missing, unreadable or belong to another network.
        """
        if image_size < 32:
            raise UserError(
                f"VGG: the image size is {image_size}; it must be at least 32, because VGG halves images five times."
            )
        described = self.architecture()
        layers, mean, std = load_layers(
            described, self.weights, self.trainable_stages, rngs=rngs, classifier=classifier
        )
        stages = [
            VGGStage(
                [layers[convolution.name] for convolution in described.convolutions if convolution.stage == stage],
                pool=stage < _STAGES or self.last_pool,
            )
            for stage in range(1, _STAGES + 1)
        ]
        return StagedEncoder(
            self,
            stages,
            VGGClassifier(layers, pool=not self.last_pool) if classifier else None,
            image_size=image_size,
            side=image_size // (32 if self.last_pool else 16),
            region_size=self.region_size,
            mean=mean,
            std=std,
            dtype=dtype,
            chunk=_CHUNK,
        )
