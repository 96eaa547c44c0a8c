"""A pretrained network as a list of the tensors in PyTorch's state dict, and their conversion to our layers."""

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
    """One convolution of a network; `norm` is the name of its batch norm, or None if it has none."""

    name: str
    norm: str | None
    shape: tuple[int, int, int, int]
    """[O,I,k,k] as in PyTorch; depthwise [C,1,k,k]."""
    stage: int
    """Counted from 1."""
    bias: bool = False


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of a classifier, with a bias; `shape` is [O,I]."""

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Network:
    """The layers of a network that have weights; `name` is torchvision's name of the network."""

    family: Family
    name: str
    stages: int
    convolutions: tuple[ConvolutionSpec, ...]
    classifier: tuple[LinearSpec, ...]
    epsilon: float
    """Of the batch norm."""
    mean: Pixel = (123.675, 116.28, 103.53)
    """Used with random weights; the default is ImageNet's mean."""
    std: Pixel = (58.395, 57.12, 57.375)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors of the state dict by name, except the batch-norm counters."""
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
    """Converts a state dict to layers by name; NumPy arrays stay NumPy arrays.

    A frozen convolution becomes a `kernel`, multiplied by the scale of the batch norm, and a `shift`. A trained
    convolution keeps its `kernel` and its `bias` (if any); its batch norm (if any) becomes a `scale` and a `shift`. The
    last axis of a kernel is the output channels: [k,k,I,O], depthwise [k,k,C], 1x1 and linear [I,O].

    Args:
        network: the network of the tensors.
        trainable_stages: the number of stages to train, counted from the last.
        tensors: the state dict. The classifier's tensors are only needed if ``classifier`` is true.
        classifier: whether to include the layers of the classifier.
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
    """Batch norm with running statistics as a `scale` and a `shift`, y = x * scale + shift; all arrays are [C]."""
    scale = weight * (variance + epsilon) ** -0.5
    return scale, bias - mean * scale


def _folded(layer: dict[str, Any]) -> Layer:
    scale, shift, bias = layer.get("scale", 1.0), layer.get("shift", 0.0), layer.get("bias", 0.0)
    return {"kernel": layer["kernel"] * scale, "shift": bias * scale + shift}


def load_layers(
    network: Network, weights: str, trainable_stages: int, *, rngs: nnx.Rngs, classifier: bool
) -> tuple[dict[str, Layer], Pixel, Pixel]:
    """Loads the layers of a network, and the mean and standard deviation that normalise its pixels.

    Args:
        network: the network.
        weights: "random", or a source that ``load_tensors`` accepts.
        trainable_stages: the number of stages to train, counted from the last.
        rngs: the stream `params` initialises random weights.
        classifier: whether to include the layers of the classifier.

    Raises:
        UserError: the weights are missing, unreadable or belong to another network.
    """
    if weights == "random":
        layers = _random_layers(network, trainable_stages, classifier, rngs.params())
        return layers, network.mean, network.std
    read = load_tensors(weights, family=network.family, network=network.name, shapes=network.shapes())
    return convert(network, trainable_stages, read.tensors, classifier=classifier), read.mean, read.std


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_layers(network: Network, trainable_stages: int, classifier: bool, key: jax.Array) -> dict[str, Layer]:
    """Random weights as in torchvision: He normal over the fan-out (He et al. 2015), batch norm as the identity."""
    shapes = network.shapes()
    convolutions = {f"{conv.name}.weight": conv.shape for conv in network.convolutions}
    tensors: dict[str, jax.Array] = {}
    for name, normal in normal_tensors(convolutions, key).items():
        shape = convolutions[name]
        fan_out = math.prod(shape[2:]) * (1 if shape[1] == 1 else shape[0])
        tensors[name] = normal * math.sqrt(2 / fan_out)
    for number, linear in enumerate(network.classifier if classifier else ()):
        draw = jax.random.normal(jax.random.fold_in(key, number), linear.shape)
        tensors[f"{linear.name}.weight"] = 0.01 * draw
    for name, vector in shapes.items():
        if len(vector) == 1:
            tensors[name] = jnp.full(vector, float(name.endswith(("running_var", "weight"))))
    return convert(network, trainable_stages, tensors, classifier=classifier)


def normal_tensors(shapes: Mapping[str, tuple[int, ...]], key: jax.Array) -> dict[str, jax.Array]:
    """Tensors of these shapes, drawn from the standard normal distribution."""
    tensors = {}
    # One draw for all of them: one draw per tensor takes many times as long to compile.
    normal = jax.random.normal(key, (sum(map(math.prod, shapes.values())),))
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        tensors[name] = normal[start:stop].reshape(shape)
        start = stop
    return tensors
