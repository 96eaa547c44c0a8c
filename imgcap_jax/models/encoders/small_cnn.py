"""A small residual CNN with group norm, trained from scratch: for drawn scenes and quick experiments."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError


@dataclass(frozen=True)
class SmallCNN:
    """Settings of the small CNN: one stage per width, each halving the image; regions are the last stage's cells."""

    widths: tuple[int, ...] = (32, 64, 128)
    blocks: tuple[int, ...] = (0, 1, 1)
    """Residual blocks per stage, after its strided convolution. Blocks of early stages cost the most time."""

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.widths) or not self.widths:
            raise UserError(
                f"encoder.widths is {self.widths} and encoder.blocks is {self.blocks}; they must have the same length"
            )
        if any(width < 8 or width % 8 for width in self.widths):
            raise UserError(f"encoder.widths is {self.widths}; they must be positive multiples of 8")
        if min(self.blocks) < 0:
            raise UserError(f"encoder.blocks is {self.blocks}; they must be at least 0")

    @property
    def frozen(self) -> bool:
        """Always False: there are no pretrained weights."""
        return False

    @property
    def region_size(self) -> int:
        """D."""
        return self.widths[-1]

    def build(self, image_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "SmallCNNEncoder":
        """Builds the encoder for square images of ``image_size`` pixels."""
        return SmallCNNEncoder(self, image_size, dtype=dtype, rngs=rngs)


class SmallCNNEncoder(nnx.Module):
    """Pixels -> [conv 3x3 stride 2, group norm, ReLU, residual blocks] per stage -> regions + positions.

    Group norm (Wu & He 2018) has no running statistics, so that training is the same on any number of devices. A learnt
    vector per region encodes its position, as in vision transformers (Dosovitskiy et al. 2021), so that relations such
    as "left of" can be learnt.
    """

    def __init__(self, config: SmallCNN, image_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        grid = image_size
        for _ in config.widths:
            grid = (grid + 1) // 2
        self.region_count = grid * grid
        self.region_size = config.region_size
        inputs = (3, *config.widths[:-1])
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (self.region_count, self.region_size)))
        self.downs = nnx.List(
            _Convolution(a, b, stride=2, dtype=dtype, rngs=rngs) for a, b in zip(inputs, config.widths, strict=True)
        )
        self.blocks = nnx.List(
            nnx.List(
                nnx.List(_Convolution(width, width, stride=1, dtype=dtype, rngs=rngs) for _ in range(2))
                for _ in range(count)
            )
            for width, count in zip(config.widths, config.blocks, strict=True)
        )

    def __call__(self, images: Array) -> Array:
        """images [B,h,w,3] uint8 -> regions [B,N,D] float32."""
        x = (images.astype(self.dtype) - 127.5) / 63.75
        for down, stage in zip(self.downs, self.blocks, strict=True):
            x = jax.nn.relu(down(x))
            for first, second in stage:
                x = jax.nn.relu(x + second(jax.nn.relu(first(x))))
        regions = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
        return regions + self.position[...]


class _Convolution(nnx.Module):
    """A 3x3 convolution without bias, followed by group norm with 8 channels per group."""

    def __init__(self, inputs: int, width: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(inputs, width, (3, 3), strides=(stride, stride), use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = nnx.GroupNorm(width, num_groups=None, group_size=8, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.conv(x))
