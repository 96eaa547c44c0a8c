"""Vision transformers: CLIP, SigLIP 2, DINOv2 and DINOv3. The regions are the patch tokens.

- ViT: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929
- CLIP: Radford et al. 2021, https://arxiv.org/abs/2103.00020
- SigLIP 2: Tschannen et al. 2025, https://arxiv.org/abs/2502.14786
- DINOv2: Oquab et al. 2023, https://arxiv.org/abs/2304.07193; registers: Darcet et al. 2024,
  https://arxiv.org/abs/2309.16588
- DINOv3: Siméoni et al. 2025, https://arxiv.org/abs/2508.10104

Letters: B images, N patches, T tokens (class token, registers, patches), D features, H heads.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.blocks import LayerNorm, Linear, Tensors, load_network, patches, variable
from imgcap_jax.models.encoders.pretrained.schemes import SchemeFamily
from imgcap_jax.models.encoders.staged import Staged, StagedEncoder

# Images per chunk of the frozen blocks on a CPU.
_CHUNK = 4
_ROPE_BASE = 100.0


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS: Mapping[SchemeFamily, Callable[[jax.Array], jax.Array]] = {
    "clip": _quick_gelu,
    "siglip": _tanh_gelu,
    "dinov2": _gelu,
    "dinov3": _gelu,
}
_EPSILONS: Mapping[SchemeFamily, float] = {"clip": 1e-5, "siglip": 1e-6, "dinov2": 1e-6, "dinov3": 1e-5}


@dataclass(frozen=True)
class ViTArchitecture:
    """The sizes of a vision transformer.

    Attributes:
        name: timm's name, without "quickgelu" and "qkvb".
        family: the family.
        width: D.
        depth: the number of blocks.
        heads: H.
        mlp: the hidden size of the two-layer networks.
        patch: the side of a patch in pixels.
        side: rows, and columns, of the stored position embedding; 0 for rotary embeddings.
        registers: the number of register tokens.
    """

    name: str
    family: SchemeFamily
    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    side: int
    registers: int = 0

    @property
    def class_tokens(self) -> int:
        """The number of class tokens, 0 or 1."""
        return 0 if self.family == "siglip" else 1

    @property
    def epsilon(self) -> float:
        """Of the layer norms."""
        return _EPSILONS[self.family]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `WeightedNetwork`; see `select_by_scheme` for the differences from timm's shapes."""
        d, clip = self.width, self.family == "clip"
        shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (d, 3, self.patch, self.patch)}
        if not clip:
            shapes["patch_embed.proj.bias"] = (d,)
        if self.class_tokens:
            shapes["cls_token"] = (d,)
        if self.registers:
            shapes["reg_token"] = (self.registers, d)
        if self.side:
            shapes["pos_embed"] = (self.side**2, d)
        linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (self.mlp, d), "mlp.fc2": (d, self.mlp)}
        norms = ["norm_pre", "norm"] if clip else ["norm"]
        for i in range(self.depth):
            for name, shape in linear.items():
                shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
            if self.family in ("dinov2", "dinov3"):
                shapes |= {f"blocks.{i}.ls1.gamma": (d,), f"blocks.{i}.ls2.gamma": (d,)}
            norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        return shapes | {f"{name}.{part}": (d,) for name in norms for part in ("weight", "bias")}


# Width, depth, heads, hidden size.
_SMALL, _BASE, _LARGE = (384, 12, 6, 1536), (768, 12, 12, 3072), (1024, 24, 16, 4096)
_SO400M = (1152, 27, 16, 4304)


def _architectures() -> dict[str, ViTArchitecture]:
    found: list[ViTArchitecture] = []
    for size, sizes, patch, image in (
        ("base", _BASE, 32, 224),
        ("base", _BASE, 16, 224),
        ("large", _LARGE, 14, 224),
        ("large", _LARGE, 14, 336),
    ):
        found.append(ViTArchitecture(f"vit_{size}_patch{patch}_clip_{image}", "clip", *sizes, patch, image // patch))
    for size, sizes, patch, images in (
        ("base", _BASE, 32, (256,)),
        ("base", _BASE, 16, (224, 256, 384, 512)),
        ("large", _LARGE, 16, (256, 384, 512)),
        ("so400m", _SO400M, 14, (224, 378)),
        ("so400m", _SO400M, 16, (256, 384, 512)),
    ):
        for image in images:
            name = f"vit_{size}_patch{patch}_siglip_{image}"
            found.append(ViTArchitecture(name, "siglip", *sizes, patch, image // patch))
    for size, sizes in (("small", _SMALL), ("base", _BASE), ("large", _LARGE)):
        found.append(ViTArchitecture(f"vit_{size}_patch14_dinov2", "dinov2", *sizes, 14, 37))
        found.append(ViTArchitecture(f"vit_{size}_patch14_reg4_dinov2", "dinov2", *sizes, 14, 37, registers=4))
        found.append(ViTArchitecture(f"vit_{size}_patch16_dinov3", "dinov3", *sizes, 16, 0, registers=4))
    return {architecture.name: architecture for architecture in found}


ARCHITECTURES = _architectures()
"""The vision transformers by name."""


@dataclass(frozen=True)
class ViT(Staged):
    """Vision transformer encoder: N = (image size / patch size)^2 regions, the patch tokens after the final norm.

    The image size can differ from that of the pretraining: position embeddings are interpolated as transformers does
    it. Each stage is one block. The last includes the final norm. What comes before the first (patches, class token,
    registers, positions, the first norm of CLIP) is never trained.
    """

    weights: str = field(default="pretrained", kw_only=True)
    """pretrained (timm's file, downloaded on first use), random, or the path of a file with the names of timm,
    transformers or open_clip. CLIP: only weights that were trained with QuickGELU, such as OpenAI's."""
    model: str = "vit_small_patch14_reg4_dinov2"
    """timm's name of the network, such as vit_base_patch16_clip_224 or vit_base_patch16_siglip_256."""

    def __post_init__(self) -> None:
        if self.model not in ARCHITECTURES:
            raise UserError(f"encoder.model is {self.model!r}; it must be one of {', '.join(sorted(ARCHITECTURES))}")
        self.check(self.architecture().depth)

    @property
    def region_size(self) -> int:
        """D."""
        return self.architecture().width

    def architecture(self) -> ViTArchitecture:
        """See `Staged`."""
        return ARCHITECTURES[self.model]

    def build(self, image_size: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> StagedEncoder:
        """Builds the encoder for square images of `image_size` pixels, a multiple of the patch size.

        Args:
            image_size: side of the images in pixels.
            dtype: type of the products; weights, norms and features are float32.
            rngs: the stream `params` initialises random weights.

        Raises:
            UserError: the size does not fit, or the weights are missing, unreadable or belong to another network.
        """
        sizes = self.architecture()
        if image_size % sizes.patch:
            near = max(1, round(image_size / sizes.patch)) * sizes.patch
            raise UserError(
                f"data.image_size is {image_size}; {self.model} needs a multiple of {sizes.patch}, such as {near}"
            )
        tensors, mean, std = load_network(sizes, self.weights, rngs=rngs)
        side = image_size // sizes.patch
        first_trained = sizes.depth - self.trainable_stages
        stages = [
            ViTStage(sizes, tensors, number, side, trained=number >= first_trained, dtype=dtype)
            for number in range(sizes.depth)
        ]
        return StagedEncoder(
            self,
            stages,
            None,
            image_size=image_size,
            side=side,
            region_size=sizes.width,
            mean=mean,
            std=std,
            dtype=dtype,
            chunk=_CHUNK,
        )


class Embedding(nnx.Module):
    """Images to tokens: patches with their position embeddings, after the class token and the registers."""

    def __init__(self, sizes: ViTArchitecture, tensors: Tensors, side: int, dtype: DTypeLike) -> None:
        self.project = Linear(tensors, "patch_embed.proj", trained=False, dtype=dtype)
        self.patch = sizes.patch
        positions = _positions(sizes, tensors["pos_embed"], side) if sizes.side else None
        self.positions = None if positions is None else variable(positions, trained=False)
        first = [tensors[name].reshape(-1, sizes.width) for name in ("cls_token", "reg_token") if name in tensors]
        self.first = variable(jnp.concatenate(first), trained=False) if first else None
        self.norm = LayerNorm(tensors, "norm_pre", sizes.epsilon, trained=False) if sizes.family == "clip" else None

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised images [B,h,w,3] -> tokens float32 [B,T,D]."""
        x = self.project(patches(images, self.patch))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.positions is not None:
            x = x + self.positions[...]
        if self.first is not None:
            first = self.first[...]
            x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], *first.shape)), x], axis=1)
        return x if self.norm is None else self.norm(x)


class ViTStage(nnx.Module):
    """One block: attention and a two-layer network, each of the norm of its input, to which it is added.

    The first block begins with the embedding; the last ends with the norm of the patch tokens.
    """

    def __init__(
        self, sizes: ViTArchitecture, tensors: Tensors, number: int, side: int, *, trained: bool, dtype: DTypeLike
    ) -> None:
        """Makes block `number` of a network for side x side patches."""

        def scale(name: str) -> nnx.Variable | None:
            return variable(tensors[name], trained=trained) if name in tensors else None

        def norm(name: str) -> LayerNorm:
            return LayerNorm(tensors, name, sizes.epsilon, trained=trained)

        block = f"blocks.{number}"
        self.embedding = Embedding(sizes, tensors, side, dtype) if number == 0 else None
        self.norm1, self.norm2 = norm(f"{block}.norm1"), norm(f"{block}.norm2")
        self.qkv, self.proj, self.fc1, self.fc2 = (
            Linear(tensors, f"{block}.{name}", trained=trained, dtype=dtype)
            for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        )
        self.scale1, self.scale2 = scale(f"{block}.ls1.gamma"), scale(f"{block}.ls2.gamma")
        self.last_norm = norm("norm") if number == sizes.depth - 1 else None
        self.sizes, self.side, self.dtype = sizes, side, jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens float32 [B,T,D] -> [B,T,D]; the first takes normalised images, the last returns [B,side,side,D]."""
        if self.embedding is not None:
            x = self.embedding(x)
        x = x + _scaled(self._attention(self.norm1(x)), self.scale1)
        hidden = _ACTIVATIONS[self.sizes.family](self.fc1(self.norm2(x)))
        x = x + _scaled(self.fc2(hidden), self.scale2)
        if self.last_norm is None:
            return x
        return self.last_norm(x[:, -(self.side**2) :]).reshape(x.shape[0], self.side, self.side, -1)

    def _attention(self, x: jax.Array) -> jax.Array:
        b, t, d = x.shape
        heads = self.qkv(x).reshape(b, t, 3, self.sizes.heads, -1)
        if self.sizes.family == "dinov3":
            turned = rotated(heads[:, :, :2], rotary_angles(self.side, heads.shape[-1]))
            heads = jnp.concatenate([turned, heads[:, :, 2:]], axis=2)
        query, key, value = (heads[:, :, part].astype(self.dtype) for part in range(3))
        return self.proj(jax.nn.dot_product_attention(query, key, value).reshape(b, t, d))


def _scaled(x: jax.Array, scale: nnx.Variable | None) -> jax.Array:
    return x if scale is None else x * scale[...]


def rotary_angles(side: int, size: int) -> jax.Array:
    """The angles [N,size/2] of DINOv3's rotary position embedding for side x side patches and heads of `size` features.

    The first half of the angles are those of the row, the second half those of the column. Positions are the centres of
    the patches, with the image from -1 to 1.
    """
    # Not NumPy: its arrays would be constants of the program, in every block.
    frequencies = _ROPE_BASE ** -(jnp.arange(size // 4) * 4 / size)
    centres = (2 * jnp.arange(side) + 1) / side - 1
    positions = jnp.stack(jnp.meshgrid(centres, centres, indexing="ij"), axis=-1).reshape(-1, 2)
    return (2 * jnp.pi * positions[:, :, None] * frequencies).reshape(side**2, -1)


def rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the last N tokens of x [B,T,...,S] by angles [N,S/2]; feature i is paired with feature i + S/2."""
    angles = angles.reshape(angles.shape[0], *(1,) * (x.ndim - 3), -1)
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    first = x.shape[1] - angles.shape[0]
    left, right = jnp.split(x[:, first:], 2, axis=-1)
    turned = jnp.concatenate([left * cosines - right * sines, right * cosines + left * sines], axis=-1)
    return jnp.concatenate([x[:, :first], turned], axis=1)


def _positions(sizes: ViTArchitecture, stored: np.ndarray | jax.Array, side: int) -> np.ndarray | jax.Array:
    """Position embeddings [side^2,D], interpolated from those that are stored [N,D]."""
    if side == sizes.side:
        return stored
    square = stored.reshape(sizes.side, sizes.side, sizes.width)
    matrix = bicubic(sizes.side, side, antialias=sizes.registers > 0).astype(np.float32)
    interpolated = jnp.einsum("ia,jb,abd->ijd", matrix, matrix, square, precision=jax.lax.Precision.HIGHEST)
    return interpolated.reshape(side**2, sizes.width)


def bicubic(size: int, target: int, *, antialias: bool) -> np.ndarray:
    """The matrix [target,size] of torch's bicubic interpolation between the centres of cells, with its two kernels.

    Args:
        size: the number of cells.
        target: the number of cells of the result.
        antialias: widens the kernel if the result is smaller, and drops cells beyond the border instead of repeating
            the last one. DINOv2 with registers was made with it, the other networks without.
    """
    sharpness = -0.5 if antialias else -0.75
    width = max(size / target, 1.0) if antialias else 1.0
    matrix = np.zeros((target, size))
    for row in range(target):
        centre = (row + 0.5) * size / target - 0.5
        for cell in range(math.floor(centre - 2 * width), math.ceil(centre + 2 * width) + 1):
            weight = _cubic(abs(cell - centre) / width, sharpness)
            if not antialias or 0 <= cell < size:
                matrix[row, min(max(cell, 0), size - 1)] += weight
    return matrix / matrix.sum(1, keepdims=True)


def _cubic(distance: float, a: float) -> float:
    """The kernel of Keys (1981, https://doi.org/10.1109/TASSP.1981.1163711)."""
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    if distance < 2:
        return a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return 0.0
