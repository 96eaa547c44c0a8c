"""A pretrained network as the list of its tensors in PyTorch's state dict, and the way from those to our layers."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imgcap_jax.models.encoders.pretrained.naming import Family
from imgcap_jax.models.encoders.pretrained.sources import Pixel, load_tensors

Layer = Mapping[str, jax.Array | np.ndarray]  # see `convert`
_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class ConvolutionSpec:
    """One convolution of a network: its name, that of its batch norm, if any, its shape and the stage it is in."""

    name: str
    norm: str | None
    shape: tuple[int, int, int, int]
    """[O,I,k,k] as PyTorch has it; depthwise [C,1,k,k]."""
    stage: int
    """1 for the first."""
    bias: bool = False


@dataclass(frozen=True)
class LinearSpec:
    """One layer of a network's classifier: [O,I] and a bias."""

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Network:
    """All of a network that has weights; `name` is torchvision's."""

    family: Family
    name: str
    stages: int
    convolutions: tuple[ConvolutionSpec, ...]
    classifier: tuple[LinearSpec, ...]
    epsilon: float
    """Batch norm's."""
    mean: Pixel = (123.675, 116.28, 103.53)
    """ImageNet's, and what random weights are given."""
    std: Pixel = (58.395, 57.12, 57.375)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the state dict by name, but for the batch-norm counters."""
        shapes: dict[str, tuple[int, ...]] = {}
        for conv in self.convolutions:
            shapes[f"{conv.name}.weight"] = conv.shape
            if conv.bias:
                shapes[f"{conv.name}.bias"] = conv.shape[:1]
            if conv.norm is not None:
                shapes |= {f"{conv.norm}.{part}": conv.shape[:1] for part in _NORM}
        for linear in self.classifier:
            shapes |= {f"{linear.name}.weight": linear.shape, f"{linear.name}.bias": linear.shape[:1]}
        return shapes


def convert(
    network: Network, trainable_stages: int, tensors: Mapping[str, Any], *, classifier: bool
) -> dict[str, Layer]:
    """State dict -> layers by name; arrays of NumPy stay NumPy's.

    A frozen convolution becomes a `kernel`, with batch norm's scale multiplied in, and a `shift`. A trained one keeps
    its `kernel` and, if it has one, its `bias`; its batch norm, if it has one, becomes a `scale` and a
    `shift`. Kernels end in the channels out: [k,k,I,O], depthwise [k,k,C], 1x1 and linear [I,O].

    Args:
        network: what the tensors belong to.
        trainable_stages: how many stages, from the last, are trained.
        tensors: the state dict; without the classifier's, if it is not wanted.
        classifier: whether the layers of the classifier are wanted.
    """
    layers: dict[str, Layer] = {}
    for conv in network.convolutions:
        kernel = tensors[f"{conv.name}.weight"].transpose(2, 3, 1, 0)
        if conv.shape[1] == 1:
            kernel = kernel[:, :, 0]
        elif conv.shape[2:] == (1, 1):
            kernel = kernel[0, 0]
        layer = {"kernel": kernel}
        if conv.bias:
            layer["bias"] = tensors[f"{conv.name}.bias"]
        if conv.norm is not None:
            scale, shift = fold_batch_norm(*(tensors[f"{conv.norm}.{part}"] for part in _NORM), epsilon=network.epsilon)
            layer |= {"scale": scale, "shift": shift}
        layers[conv.name] = layer if conv.stage > network.stages - trainable_stages else _folded(layer)
    for linear in network.classifier if classifier else ():
        layers[linear.name] = {"kernel": tensors[f"{linear.name}.weight"].T, "shift": tensors[f"{linear.name}.bias"]}
    return layers


def fold_batch_norm(weight: Any, bias: Any, mean: Any, variance: Any, *, epsilon: float) -> tuple[Any, Any]:
    """Batch norm with running statistics as `scale` and `shift` a channel, y = x * scale + shift; all [C]."""
    scale = weight * (variance + epsilon) ** -0.5
    return scale, bias - mean * scale


def _folded(layer: dict[str, Any]) -> Layer:
    scale, shift, bias = layer.get("scale", 1.0), layer.get("shift", 0.0), layer.get("bias", 0.0)
    return {"kernel": layer["kernel"] * scale, "shift": bias * scale + shift}


def load_layers(
    network: Network, weights: str, trainable_stages: int, *, rngs: nnx.Rngs, classifier: bool
) -> tuple[dict[str, Layer], Pixel, Pixel]:
    """The layers of a network, and the mean and deviation its pixels are normalised by.

    Args:
        network: which one.
        weights: "random", or a source that ``load_tensors`` knows.
        trainable_stages: how many stages, from the last, are trained.
        rngs: its stream `params` draws random weights.
        classifier: whether the layers of the classifier are wanted.

    Raises:
        UserError: the weights are absent, unreadable or of another network.
    """
    if weights == "random":
        layers = _random_layers(network, trainable_stages, classifier, rngs.params())
        return layers, network.mean, network.std
    read = load_tensors(weights, family=network.family, network=network.name, shapes=network.shapes())
    return convert(network, trainable_stages, read.tensors, classifier=classifier), read.mean, read.std


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_layers(network: Network, trainable_stages: int, classifier: bool, key: jax.Array) -> dict[str, Layer]:
    """He normal over the fan-out (He et al. 2015) for convolutions, batch norm the identity, as torchvision starts."""
    shapes = network.shapes()
    convolutions = {f"{conv.name}.weight": conv.shape for conv in network.convolutions}
    tensors: dict[str, jax.Array] = {}
    # One draw for all: a draw a tensor takes many times as long to compile.
    normal = jax.random.normal(key, (sum(math.prod(shape) for shape in convolutions.values()),))
    start = 0
    for name, shape in convolutions.items():
        stop = start + math.prod(shape)
        fan_out = math.prod(shape[2:]) * (1 if shape[1] == 1 else shape[0])
        tensors[name] = normal[start:stop].reshape(shape) * math.sqrt(2 / fan_out)
        start = stop
    for number, linear in enumerate(network.classifier if classifier else ()):
        draw = jax.random.normal(jax.random.fold_in(key, number), linear.shape)
        tensors[f"{linear.name}.weight"] = 0.01 * draw
    for name, vector in shapes.items():
        if len(vector) == 1:
            tensors[name] = jnp.full(vector, float(name.endswith(("running_var", "weight"))))
    return convert(network, trainable_stages, tensors, classifier=classifier)
