"""Layers that ViT and ConvNeXt share: patches, layer norm, linear layers, with pretrained or random weights."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.models.encoders.pretrained.sources import Pixel, WeightedNetwork, load_tensors, usual_normalisation
from imgcap_jax.models.encoders.pretrained.state_dict import normal_tensors
from imgcap_jax.models.encoders.pretrained.weights import FrozenVariable

Tensors = Mapping[str, np.ndarray | jax.Array]


def load_network(network: WeightedNetwork, weights: str, *, rngs: nnx.Rngs) -> tuple[Tensors, Pixel, Pixel]:
    """The tensors of a network, and the mean and standard deviation that normalise its pixels.

    Args:
        network: the network.
        weights: "random", or a source that ``load_tensors`` accepts.
        rngs: the stream `params` initialises random weights.

    Raises:
        UserError: the weights are missing, unreadable or belong to another network.
    """
    shapes = network.shapes()
    if weights == "random":
        return _random_tensors(tuple(shapes.items()), rngs.params()), *usual_normalisation(network.family)
    read = load_tensors(weights, family=network.family, network=network.name, shapes=shapes)
    return read.tensors, read.mean, read.std


@functools.partial(jax.jit, static_argnums=0)
def _random_tensors(shapes: tuple[tuple[str, tuple[int, ...]], ...], key: jax.Array) -> dict[str, jax.Array]:
    """Normal weights with a deviation of 0.02; norms are the identity, biases 0, scales of blocks 1."""
    drawn = {name: shape for name, shape in shapes if len(shape) > 1 or name == "cls_token"}
    tensors = {name: 0.02 * normal for name, normal in normal_tensors(drawn, key).items()}
    for name, shape in shapes:
        if name not in drawn:
            tensors[name] = jnp.full(shape, 0.0 if name.endswith("bias") or "grn" in name else 1.0)
    return tensors


def variable(values: np.ndarray | jax.Array, *, trained: bool) -> nnx.Variable:
    """Weights as an `nnx.Param`, or as a `FrozenVariable` that is not trained."""
    # A copy, because the training step donates the buffers of trained parameters.
    held = jax.device_put(values, may_alias=False)
    return nnx.Param(held) if trained else FrozenVariable(held)


def patches(x: jax.Array, side: int) -> jax.Array:
    """Cuts x [B,h,w,C] into patches of side x side cells -> [B,h//side,w//side,side*side*C].

    Cells that do not fill a patch are left out, as by a convolution whose stride is its kernel.
    """
    b, h, w, c = x.shape
    rows, columns = h // side, w // side
    x = x[:, : rows * side, : columns * side].reshape(b, rows, side, columns, side, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows, columns, side * side * c)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in float32."""

    def __init__(self, tensors: Tensors, name: str, epsilon: float, *, trained: bool) -> None:
        self.scale = variable(tensors[f"{name}.weight"], trained=trained)
        self.bias = variable(tensors[f"{name}.bias"], trained=trained)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [...,D] -> float32 [...,D]."""
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...] + self.bias[...]


class Linear(nnx.Module):
    """A linear layer, or the same of patches. Products have the type of the encoder; the bias is added in float32."""

    def __init__(self, tensors: Tensors, name: str, *, trained: bool, dtype: DTypeLike) -> None:
        weight = tensors[f"{name}.weight"]
        # [O,I] -> [I,O]; patches [O,C,k,k] -> [k*k*C,O]
        weight = weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
        self.kernel = variable(weight, trained=trained)
        bias = tensors.get(f"{name}.bias")
        self.bias = None if bias is None else variable(bias, trained=trained)
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [...,I] -> float32 [...,O]."""
        kernel = self.kernel[...].astype(self.dtype)
        # A product of two matrices: for a product of higher rank, XLA:CPU transposes all of x to compute the gradient.
        y = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ kernel
        y = y.reshape(*x.shape[:-1], -1).astype(jnp.float32)
        return y if self.bias is None else y + self.bias[...]
