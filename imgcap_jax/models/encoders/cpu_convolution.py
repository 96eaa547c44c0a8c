"""Convolutions on a CPU with hand-written gradients, because XLA's own are slow there.

Depthwise: XLA's grouped convolution is about fifteen times slower than a sum of shifted products. The gradient that
autodiff derives from that sum is slow too, because it sums over the images once per tap of the kernel. The
differentiated version processes one image at a time, which keeps the data in the cache. Above all, it is in a loop.
Without the loop, XLA recomputes the convolution inside every operation that reads it.

Dense: XLA brings the axes of a gradient into the order of its fast convolution only outside loops. Inside a loop, such
as the one over microbatches, the gradient that autodiff derives takes a hundred times as long.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]  # zeros before and after the rows, then the columns


def shifted_views(x: jax.Array, kernel: int, stride: int, pads: Pads, value: float = 0.0) -> list[jax.Array]:
    """Slices x [B,h,w,C] into kernel * kernel views [B,h',w',C], one per position in the window, row by row.

    Args:
        x: the map.
        kernel: side of the window.
        stride: step of the window.
        pads: the amount of padding around the map.
        value: the value of the padding.
    """
    x = lax.pad(x, jnp.asarray(value, x.dtype), ((0, 0, 0), (*pads[0], 0), (*pads[1], 0), (0, 0, 0)))
    # The barrier keeps the padding out of the loop of the sum, which would test for the border at every element.
    x = lax.optimization_barrier(x)
    b, h, w, c = x.shape
    h, w = (h - kernel) // stride * stride + 1, (w - kernel) // stride * stride + 1
    return [
        lax.slice(x, (0, i, j, 0), (b, i + h, j + w, c), (1, stride, stride, 1))
        for i in range(kernel)
        for j in range(kernel)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Filters each channel of x [B,h,w,C] with its own kernel [k,k,C]; the stride must be at most k."""
    return _weighted_sum(shifted_views(x, kernel.shape[0], stride, pads), list(kernel.reshape(-1, kernel.shape[-1])))


def _weighted_sum(views: list[jax.Array], taps: list[jax.Array]) -> jax.Array:
    products = (view.astype(jnp.float32) * tap.astype(jnp.float32) for view, tap in zip(views, taps, strict=True))
    return functools.reduce(jnp.add, products).astype(views[0].dtype)


def _depthwise_forward(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lax.map(lambda image: depthwise(image[None], kernel, stride, pads)[0], x), (x, kernel)


def _depthwise_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved

    def one(sums: jax.Array, image: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, gradient = (values[None] for values in image)
        by_input = _input_gradient(x.shape, kernel, stride, pads, gradient)
        return sums + _kernel_gradient(x, kernel.shape[0], stride, pads, gradient), by_input[0]

    # Sums of this many terms need float32, whatever the dtype of the products.
    by_kernel, by_input = lax.scan(one, jnp.zeros(kernel.shape, jnp.float32), (x, gradient))
    return by_input, by_kernel.astype(kernel.dtype)


def _input_gradient(
    shape: tuple[int, ...], kernel: jax.Array, stride: int, pads: Pads, gradient: jax.Array
) -> jax.Array:
    """Computes the gradient of the input [B,h,w,C] from the gradient of the output [B,h',w',C].

    Row u of the padded input is multiplied only by the taps u % stride, u % stride + stride, and so on. The rows
    with the same remainder u % stride are therefore a convolution of the gradient with those taps alone. This avoids
    the zeros of a dilated gradient.
    """
    b, h, w, c = shape
    (top, _), (left, _) = pads
    k = kernel.shape[0]
    rows, columns = -(-(h + top) // stride), -(-(w + left) // stride)  # of the padded input, per remainder
    reach = (k - 1) // stride
    behind = [max(0, size - held) for size, held in zip((rows, columns), gradient.shape[1:3], strict=True)]
    around = ((0, 0, 0), (reach, behind[0], 0), (reach, behind[1], 0), (0, 0, 0))
    padded = lax.pad(gradient, jnp.zeros((), gradient.dtype), around)

    def part(row: int, column: int) -> jax.Array:
        places = [(i, j) for i in range(row, k, stride) for j in range(column, k, stride)]
        starts = [(reach - i // stride, reach - j // stride) for i, j in places]
        views = [lax.slice(padded, (0, y, x, 0), (b, y + rows, x + columns, c)) for y, x in starts]
        return _weighted_sum(views, [kernel[place] for place in places])

    whole = jnp.stack([jnp.stack([part(i, j) for j in range(stride)], 3) for i in range(stride)], 2)
    return whole.reshape(b, rows * stride, columns * stride, c)[:, top : top + h, left : left + w]


def _kernel_gradient(x: jax.Array, kernel: int, stride: int, pads: Pads, gradient: jax.Array) -> jax.Array:
    """Computes the gradient of the kernel [k,k,C]: per tap a sum over all positions, in one pass over the images."""
    gradient = gradient.astype(jnp.float32)
    products = [view.astype(jnp.float32) * gradient for view in shifted_views(x, kernel, stride, pads)]
    zeros = [jnp.zeros((), jnp.float32)] * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: [p + q for p, q in zip(a, b, strict=True)], (0, 1, 2))
    return jnp.stack(sums).reshape(kernel, kernel, -1)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Convolves x [B,h,w,I] with a kernel [k,k,I,O] -> [B,h',w',O]."""
    return _convolution(x, kernel, (stride, stride), pads)


def _convolution(x: jax.Array, kernel: jax.Array, stride: tuple[int, int], pads: Pads, **dilation: Any) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, stride, pads, dimension_numbers=layout, **dilation)


def _dense_forward(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return dense(x, kernel, stride, pads), (x, kernel)


def _dense_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    k, dilation = kernel.shape[0], (stride, stride)
    # The length of each axis that the windows cover. A stride can leave cells at the end unread.
    covered = [(size - 1) * stride + k for size in gradient.shape[1:3]]
    (top, left), (h, w) = (before for before, _ in pads), x.shape[1:3]
    (rows, columns) = covered
    # Each pixel sums the gradients of the windows that contain it.
    around = (k - 1 - top, h + top + k - 1 - rows), (k - 1 - left, w + left + k - 1 - columns)
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    by_input = _convolution(gradient, turned, (1, 1), around, lhs_dilation=dilation)
    # Each tap multiplies the dilated gradient by the inputs that it read. The image axis takes the place of the input
    # channels, so that the convolution sums over the images.
    around = (top, rows - h - top), (left, columns - w - left)
    images, spread = x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)
    by_kernel = _convolution(images, spread, (1, 1), around, rhs_dilation=dilation)
    return by_input, by_kernel.transpose(1, 2, 0, 3)


dense.defvjp(_dense_forward, _dense_backward)
