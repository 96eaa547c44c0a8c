"""The convolutions of the pretrained encoders, each implemented in the fastest way for the platform."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from imgcap_jax.models.encoders import cpu_convolution
from imgcap_jax.models.encoders.cpu_convolution import Pads, shifted_views
from imgcap_jax.models.encoders.pretrained.weights import FrozenVariable

Padding = Literal["symmetric", "same"]


def pads(size: int, kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Computes the number of zeros before and after an axis.

    Args:
        size: length of the axis.
        kernel: length of the window.
        stride: step of the window.
        padding: "symmetric" pads both sides by half the kernel, as PyTorch's networks do. "same" is TensorFlow's
            padding: it depends on the size, and an odd zero goes after the axis.
    """
    if padding == "symmetric":
        return kernel // 2, kernel // 2
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Convolves x [B,h,w,I] with a kernel [I,O] (1x1), [k,k,I] (depthwise) or [k,k,I,O] -> [B,h',w',O]."""
    if kernel.ndim == 2:
        return _product(x[:, ::stride, ::stride], kernel)
    size = kernel.shape[0]
    around = pads(x.shape[1], size, stride, padding), pads(x.shape[2], size, stride, padding)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_on_cpu, stride=stride, around=around),
        default=partial(_xla, stride=stride, around=around),
    )


def _on_cpu(x: jax.Array, kernel: jax.Array, stride: int, around: Pads) -> jax.Array:
    size = kernel.shape[0]
    if kernel.ndim == 3:
        return cpu_convolution.depthwise(x, kernel, stride, around)
    if _as_product(x, kernel, stride):
        views = jnp.concatenate(shifted_views(x, size, stride, around), axis=-1)
        return _product(views, kernel.reshape(-1, kernel.shape[-1]))
    return cpu_convolution.dense(x, kernel, stride, around)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [B,h,w,I] times a matrix [I,O]."""
    # A product of two matrices: for a product of higher rank, XLA:CPU transposes all of x to compute the gradient.
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def _as_product(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    """Whether a matrix product of gathered windows and the kernel is faster on a CPU than XLA's convolution.

    XLA's convolution reaches nine tenths of the rate of plain products. It is slower for maps of few cells (two thirds)
    and for a 3x3 stem.
    """
    small_map = x.shape[1] // stride <= 8
    stem = kernel.shape[:3] == (3, 3, 3) and stride > 1
    return small_map or stem


def _xla(x: jax.Array, kernel: jax.Array, stride: int, around: Pads) -> jax.Array:
    """XLA's convolution; with a kernel [k,k,I], each channel has its own filter."""
    kernel = kernel if kernel.ndim == 4 else kernel[:, :, None]
    layout = ("NHWC", "HWIO", "NHWC")
    groups = x.shape[-1] // kernel.shape[2]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), around, dimension_numbers=layout, feature_group_count=groups
    )


def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """The maximum per window of x [B,h,w,C], as torch's max_pool2d: cells that do not fill a window are ignored."""
    around = ((padding, padding), (padding, padding))

    def on_cpu(x: jax.Array) -> jax.Array:
        first, *others = shifted_views(x, window, stride, around, -np.inf)
        for view in others:
            first = jnp.maximum(first, view)
        return first

    def reduced(x: jax.Array) -> jax.Array:
        sizes, steps = (1, window, window, 1), (1, stride, stride, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, sizes, steps, ((0, 0), *around, (0, 0)))

    return lax.platform_dependent(x, cpu=on_cpu, default=reduced)


def adaptive_average_pool(x: jax.Array, side: int) -> jax.Array:
    """Averages x [B,h,w,C] over side x side windows, as torch's adaptive_avg_pool2d does -> [B,side,side,C].

    Windows overlap if the sizes do not divide evenly. Cells are repeated if the result is larger than x.
    """

    def averages(size: int) -> np.ndarray:
        matrix = np.zeros((side, size), np.float32)
        for i in range(side):
            start, stop = i * size // side, -(-(i + 1) * size // side)
            matrix[i, start:stop] = 1 / (stop - start)
        return matrix

    rows, columns = (averages(size).astype(x.dtype) for size in x.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision=lax.Precision.HIGHEST)


def on_device(layer: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array]:
    """The arrays of a layer on the default device."""
    # ``jnp.asarray`` would compile a program for each shape: half a second for an EfficientNet. A copy, because the
    # training step donates the buffers of trained parameters.
    return {name: jax.device_put(values, may_alias=False) for name, values in layer.items()}


class ConvNorm(nnx.Module):
    """A convolution followed by frozen batch norm, NHWC.

    The arrays in ``layer`` determine whether it is trained (see ``state_dict.convert``). A frozen convolution has a
    `kernel`, multiplied by the scale of the batch norm, and a `shift`. In a trained convolution, the kernel and the
    bias (if any) are `nnx.Param`s; the `scale` and `shift` of the batch norm (if any) stay frozen.
    """

    def __init__(
        self, layer: Mapping[str, jax.Array | np.ndarray], stride: int = 1, padding: Padding = "symmetric"
    ) -> None:
        held = on_device(layer)
        trained = "scale" in held or "bias" in held
        self.kernel = nnx.Param(held["kernel"]) if trained else FrozenVariable(held["kernel"])
        self.bias = nnx.Param(held["bias"]) if "bias" in held else None
        self.scale = FrozenVariable(held["scale"]) if "scale" in held else None
        self.shift = FrozenVariable(held["shift"]) if "shift" in held else None
        self.stride = stride
        self.padding: Padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,I] -> [B,h',w',O]."""
        kernel = self.kernel[...]
        shift = jnp.zeros(kernel.shape[-1]) if self.bias is None else self.bias[...]
        if self.scale is not None:
            kernel, shift = kernel * self.scale[...], shift * self.scale[...]
        if self.shift is not None:
            shift = shift + self.shift[...]
        y = convolve(x, kernel.astype(x.dtype), self.stride, self.padding)
        # Added in float32, so that the gradient of the bias, a sum over all cells, is computed in float32.
        return (y.astype(jnp.float32) + shift).astype(x.dtype)
