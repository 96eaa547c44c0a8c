"""ResNet-50, 101 and 152 (He et al. 2016, arXiv:1512.03385).

As in torchvision, the stride of a stage is in the 3x3 convolution of its first block, not in the 1x1 convolution before
it ("v1.5"). All current ImageNet weights are trained for this version. Tensor names are torchvision's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.convolution import ConvNorm, max_pool
from imgcap_jax.models.encoders.pretrained.state_dict import ConvolutionSpec, Layer, LinearSpec, Network, load_layers
from imgcap_jax.models.encoders.staged import MeanClassifier, Staged, StagedEncoder

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # per stage
_STAGES = 4
_STEM = 64
_EXPANSION = 4
_FEATURES = 2048
# Images per chunk of the frozen stages on a CPU. Values from 1 to 8 differ by at most a tenth in speed.
_CHUNK = 4


@dataclass(frozen=True)
class BlockShape:
    """One bottleneck block; `name` is its prefix in the state dict."""

    name: str
    stage: int
    stride: int
    inputs: int
    width: int

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return self.width * _EXPANSION

    @property
    def projects(self) -> bool:
        """Whether the shortcut needs a 1x1 convolution."""
        return self.stride > 1 or self.inputs != self.outputs


def blocks(depth: int) -> tuple[tuple[BlockShape, ...], ...]:
    """The blocks of each of the four stages of ResNet-`depth`."""
    result: list[tuple[BlockShape, ...]] = []
    inputs = _STEM
    for stage, count in enumerate(_BLOCKS[depth], start=1):
        width, shapes = _STEM * 2 ** (stage - 1), []
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            shapes.append(BlockShape(f"layer{stage}.{index}", stage, stride, inputs, width))
            inputs = shapes[-1].outputs
        result.append(tuple(shapes))
    return tuple(result)


def network(depth: int) -> Network:
    """Describes ResNet-`depth` as a list of its tensors."""
    convolutions = [ConvolutionSpec("conv1", "bn1", (_STEM, 3, 7, 7), 1)]
    for b in (block for stage in blocks(depth) for block in stage):
        shapes = ((b.width, b.inputs, 1, 1), (b.width, b.width, 3, 3), (b.outputs, b.width, 1, 1))
        for number, shape in enumerate(shapes, start=1):
            convolutions.append(ConvolutionSpec(f"{b.name}.conv{number}", f"{b.name}.bn{number}", shape, b.stage))
        if b.projects:
            shape = (b.outputs, b.inputs, 1, 1)
            convolutions.append(ConvolutionSpec(f"{b.name}.downsample.0", f"{b.name}.downsample.1", shape, b.stage))
    return Network(
        family="resnet",
        name=f"resnet{depth}",
        stages=_STAGES,
        convolutions=tuple(convolutions),
        classifier=(LinearSpec("fc", (1000, _FEATURES)),),
        epsilon=1e-5,
    )


def tensor_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of the state dict by name, except the batch-norm counters."""
    return network(depth).shapes()


class Bottleneck(nnx.Module):
    """1x1 to fewer channels, 3x3, 1x1 to more; the input is added, through a 1x1 if the shapes differ."""

    def __init__(self, shape: BlockShape, layers: Mapping[str, Layer]) -> None:
        self.reduce = ConvNorm(layers[f"{shape.name}.conv1"])
        self.filter = ConvNorm(layers[f"{shape.name}.conv2"], shape.stride)
        self.expand = ConvNorm(layers[f"{shape.name}.conv3"])
        self.shortcut = ConvNorm(layers[f"{shape.name}.downsample.0"], shape.stride) if shape.projects else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,inputs] -> [B,h',w',outputs]."""
        y = self.expand(jax.nn.relu(self.filter(jax.nn.relu(self.reduce(x)))))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNetStage(nnx.Module):
    """A sequence of blocks. The first stage starts with the stem: 7x7 convolution and 3x3 max pool, stride 2 each."""

    def __init__(self, shapes: tuple[BlockShape, ...], layers: Mapping[str, Layer]) -> None:
        self.stem = ConvNorm(layers["conv1"], stride=2) if shapes[0].stage == 1 else None
        self.blocks = nnx.List([Bottleneck(shape, layers) for shape in shapes])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,C] -> [B,h',w',C']."""
        if self.stem is not None:
            x = max_pool(jax.nn.relu(self.stem(x)), window=3, stride=2, padding=1)
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class ResNet(Staged):
    """ResNet encoder: N = ceil(image size / 32)^2 regions of D = 2048 features.

    The four stages are layer1 (with the stem), layer2, layer3 and layer4.
    """

    depth: Literal[50, 101, 152] = 101

    def __post_init__(self) -> None:
        if self.depth not in _BLOCKS:
            raise UserError(f"ResNet-{self.depth} is not supported; choose 50, 101 or 152.")
        self.check(_STAGES)

    @property
    def region_size(self) -> int:
        """D."""
        return _FEATURES

    def architecture(self) -> Network:
        """See `Staged`."""
        return network(self.depth)

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
        return StagedEncoder(
            self,
            [ResNetStage(shapes, layers) for shapes in blocks(self.depth)],
            MeanClassifier(layers["fc"]) if classifier else None,
            image_size=image_size,
            side=-(-image_size // 32),
            region_size=_FEATURES,
            mean=mean,
            std=std,
            dtype=dtype,
            chunk=_CHUNK,
        )
