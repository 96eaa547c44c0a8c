"""ConvNeXt, also with the weights of DINOv3.

- ConvNeXt: Liu et al. 2022, https://arxiv.org/abs/2201.03545
- ConvNeXt V2: Woo et al. 2023, https://arxiv.org/abs/2301.00808
- DINOv3: Siméoni et al. 2025, https://arxiv.org/abs/2508.10104
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.blocks import LayerNorm, Linear, Tensors, load_network, patches, variable
from imgcap_jax.models.encoders.convolution import convolve
from imgcap_jax.models.encoders.pretrained.schemes import SchemeFamily
from imgcap_jax.models.encoders.staged import Staged, StagedEncoder

_EPSILON = 1e-6
_STAGES = 4
_STEM = 4  # side of the first patches
# Images per chunk of the frozen stages on a CPU.
_CHUNK = 4

# Blocks and channels per stage.
_SIZES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "convnextv2_atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnextv2_femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnextv2_pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnextv2_nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnextv2_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnextv2_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnextv2_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnextv2_huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


@dataclass(frozen=True)
class ConvNeXtArchitecture:
    """The sizes of a ConvNeXt.

    Attributes:
        name: timm's name.
        depths: blocks per stage.
        widths: channels per stage.
    """

    name: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def family(self) -> SchemeFamily:
        """See `WeightedNetwork`."""
        return "convnext"

    @property
    def response_norm(self) -> bool:
        """Whether blocks have a global response norm instead of a scale."""
        return self.name.startswith("convnextv2")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `WeightedNetwork`. The names and shapes are timm's."""
        shapes: dict[str, tuple[int, ...]] = {}

        def add(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"] = shape
            shapes[f"{name}.bias"] = shape[:1]

        add("stem.0", self.widths[0], 3, _STEM, _STEM)
        add("stem.1", self.widths[0])
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage:
                add(f"stages.{stage}.downsample.0", self.widths[stage - 1])
                add(f"stages.{stage}.downsample.1", width, self.widths[stage - 1], 2, 2)
            for number in range(depth):
                block = f"stages.{stage}.blocks.{number}"
                if not self.response_norm:
                    shapes[f"{block}.gamma"] = (width,)
                add(f"{block}.conv_dw", width, 1, 7, 7)
                add(f"{block}.norm", width)
                add(f"{block}.mlp.fc1", 4 * width, width)
                if self.response_norm:
                    add(f"{block}.mlp.grn", 4 * width)
                add(f"{block}.mlp.fc2", width, 4 * width)
        add("head.norm", self.widths[-1])
        return shapes


ARCHITECTURES = {name: ConvNeXtArchitecture(name, *sizes) for name, sizes in _SIZES.items()}
"""The ConvNeXts by name."""


@dataclass(frozen=True)
class ConvNeXt(Staged):
    """ConvNeXt encoder: N = floor(image size / 32)^2 regions, each after the final norm.

    The stem belongs to the first of the four stages; the final norm, which the classifier applies to the mean of the
    regions, belongs to the last.
    """

    model: str = "convnext_tiny"
    """timm's name of the network, such as convnext_base or convnextv2_tiny."""

    def __post_init__(self) -> None:
        if self.model not in ARCHITECTURES:
            raise UserError(f"encoder.model is {self.model!r}; it must be one of {', '.join(ARCHITECTURES)}")
        self.check(_STAGES)

    @property
    def region_size(self) -> int:
        """D."""
        return self.architecture().widths[-1]

    def architecture(self) -> ConvNeXtArchitecture:
        """See `Staged`."""
        return ARCHITECTURES[self.model]

    def build(self, image_size: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> StagedEncoder:
        """Builds the encoder for square images of `image_size` pixels, at least 32.

        Args:
            image_size: side of the images in pixels.
            dtype: type of the products and convolutions; weights, norms, residual sums and features are float32.
            rngs: the stream `params` initialises random weights.

        Raises:
            UserError: the images are too small, or the weights are missing, unreadable or belong to another network.
        """
        sizes = self.architecture()
        side = image_size // (_STEM * 2 ** (_STAGES - 1))
        if side == 0:
            raise UserError(f"data.image_size is {image_size}; {self.model} needs at least 32")
        tensors, mean, std = load_network(sizes, self.weights, rngs=rngs)
        first_trained = _STAGES - self.trainable_stages
        return StagedEncoder(
            self,
            [
                ConvNeXtStage(sizes, tensors, stage, trained=stage >= first_trained, dtype=dtype)
                for stage in range(_STAGES)
            ],
            None,
            image_size=image_size,
            side=side,
            region_size=sizes.widths[-1],
            mean=mean,
            std=std,
            dtype=dtype,
            chunk=_CHUNK,
        )


class Block(nnx.Module):
    """A depthwise 7x7 convolution, a norm, and a two-layer network; the input is added."""

    def __init__(self, tensors: Tensors, name: str, *, trained: bool, dtype: DTypeLike) -> None:
        def held(part: str) -> nnx.Variable | None:
            values = tensors.get(f"{name}.{part}")
            return None if values is None else variable(values, trained=trained)

        kernel = tensors[f"{name}.conv_dw.weight"][:, 0].transpose(1, 2, 0)
        self.kernel = variable(kernel, trained=trained)
        self.bias = variable(tensors[f"{name}.conv_dw.bias"], trained=trained)
        self.norm = LayerNorm(tensors, f"{name}.norm", _EPSILON, trained=trained)
        self.fc1 = Linear(tensors, f"{name}.mlp.fc1", trained=trained, dtype=dtype)
        self.fc2 = Linear(tensors, f"{name}.mlp.fc2", trained=trained, dtype=dtype)
        self.scale = held("gamma")
        self.response_weight, self.response_bias = held("mlp.grn.weight"), held("mlp.grn.bias")
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x float32 [B,h,w,C] -> [B,h,w,C]."""
        y = convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype), 1, "symmetric")
        y = self.norm(y.astype(jnp.float32) + self.bias[...])
        y = jax.nn.gelu(self.fc1(y), approximate=False)
        if self.response_weight is not None and self.response_bias is not None:
            y = y + y * _response(y) * self.response_weight[...] + self.response_bias[...]
        y = self.fc2(y)
        return x + (y if self.scale is None else y * self.scale[...])


def _response(x: jax.Array) -> jax.Array:
    """The norm of each channel of x [B,h,w,C] over the map, divided by the mean over the channels -> [B,1,1,C]."""
    squares = jnp.square(x).sum((1, 2), keepdims=True)
    # The gradient of a square root is not finite at 0.
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return norm / (norm.mean(-1, keepdims=True) + 1e-6)


class ConvNeXtStage(nnx.Module):
    """Patches of the map (with norms), and a sequence of blocks. The last stage ends with the final norm."""

    def __init__(
        self, sizes: ConvNeXtArchitecture, tensors: Tensors, stage: int, *, trained: bool, dtype: DTypeLike
    ) -> None:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(tensors, name, _EPSILON, trained=trained)

        downsample = f"stages.{stage}.downsample"
        self.patch = 2 if stage else _STEM
        self.norm_before = norm(f"{downsample}.0") if stage else None
        self.project = Linear(tensors, f"{downsample}.1" if stage else "stem.0", trained=trained, dtype=dtype)
        self.norm_after = None if stage else norm("stem.1")
        self.blocks = nnx.List(
            [
                Block(tensors, f"stages.{stage}.blocks.{number}", trained=trained, dtype=dtype)
                for number in range(sizes.depths[stage])
            ]
        )
        self.last_norm = norm("head.norm") if stage == _STAGES - 1 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,C] -> float32 [B,h',w',C']."""
        if self.norm_before is not None:
            x = self.norm_before(x)
        x = self.project(patches(x, self.patch))
        if self.norm_after is not None:
            x = self.norm_after(x)
        for block in self.blocks:
            x = block(x)
        return x if self.last_norm is None else self.last_norm(x)
