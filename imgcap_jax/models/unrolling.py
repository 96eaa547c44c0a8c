"""A scan whose weights get their gradient in one product each, after the scan.

The backward pass of ``jax.lax.scan`` adds to the gradient of every weight at every step: for a caption of T words, T
thin products and T passes over arrays as large as the model. Kept for all steps instead, what went into a product and
the gradient of what came out of it give the weight's gradient at once, by a product T times as long.
"""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Product = Callable[[Array, Array], Array]
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def constant_product(product: Product, x: Array, weight: Array) -> Array:
    """``product(x, weight)`` for a weight that all steps of a scan share.

    Within ``scan_steps`` the weight's gradient is left until after the scan; elsewhere this is a plain call. The
    product has to be linear in the weight, close over no array, and be the same for an x with one more leading axis.
    """
    recorder = _recorder.get()
    return product(x, weight) if recorder is None else recorder.record(product, x, weight)


def scan_steps(step: Step, constants: Any, carry: Any, xs: Any) -> Any:
    """``jax.lax.scan`` of ``step(constants, carry, x) -> (carry, y)`` over xs; returns the stacked ys.

    The step may close over no traced array: whatever changes from call to call goes through ``constants`` or ``xs``.
    Weights have to reach ``constant_product`` as the leaves of ``constants`` that they are; the gradients of other
    constants are added up step by step as usual.
    """
    return _scan(step, constants, carry, xs)


class _Recorder:
    """Collects the products of one step: what went in and, where taps are given, ways for gradients to come out."""

    def __init__(self, constants: Any, taps: list[Array] | None) -> None:
        self._numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(constants))}
        self._taps = taps
        self.products: list[tuple[Product, int]] = []  # the product, its weight's number among the constants
        self.inputs: list[Array] = []
        self.outputs: list[jax.ShapeDtypeStruct] = []

    def record(self, product: Product, x: Array, weight: Array) -> Array:
        number = self._numbers.get(id(weight))
        if number is None:
            return product(x, weight)
        self.products.append((product, number))
        self.inputs.append(x)
        if self._taps is None:
            y = product(x, weight)
            self.outputs.append(jax.ShapeDtypeStruct(y.shape, y.dtype))
            return y
        return _tapped(product, x, weight, self._taps[len(self.inputs) - 1])


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def _recording(recorder: _Recorder) -> Any:
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(product: Product, x: Array, weight: Array, tap: Array) -> Array:
    """``product(x, weight)``, whose gradient goes to x and to the unused ``tap`` instead of the weight."""
    return product(x, weight)


def _tapped_forward(product: Product, x: Array, weight: Array, tap: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, weight), (x, weight)


def _tapped_backward(product: Product, kept: tuple[Array, Array], by_y: Array) -> tuple[Any, None, Array]:
    x, weight = kept
    _, transpose = jax.vjp(lambda x: product(x, weight), x)
    return transpose(by_y)[0], None, by_y


_tapped.defvjp(_tapped_forward, _tapped_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(step: Step, constants: Any, carry: Any, xs: Any) -> Any:
    return jax.lax.scan(lambda carry, x: step(constants, carry, x), carry, xs)[1]


class _Kept(NamedTuple):
    """What the backward pass needs: the scan's transpose, inputs [T,...] of the products, their weights."""

    transpose: Any
    inputs: list[Array]
    constants: Any


def _scan_forward(step: Step, constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    # The step is traced once for the shapes of its products' results, which the taps have to have.
    seen: list[_Recorder] = []

    def measure(constants: Any, carry: Any, x: Any) -> Any:
        recorder = _Recorder(constants, None)
        with _recording(recorder):
            result = step(constants, carry, x)
        seen.append(recorder)
        return result

    jax.eval_shape(measure, constants, carry, jax.tree.map(lambda leaf: leaf[0], xs))
    products, outputs = seen[0].products, seen[0].outputs
    length = jax.tree.leaves(xs)[0].shape[0]
    taps = [jnp.zeros((length, *output.shape), output.dtype) for output in outputs]

    def run(constants: Any, carry: Any, xs: Any, taps: list[Array]) -> tuple[Any, list[Array]]:
        def body(carry: Any, inputs: tuple[Any, list[Array]]) -> tuple[Any, tuple[Any, list[Array]]]:
            x, tap = inputs
            recorder = _Recorder(constants, tap)
            with _recording(recorder):
                carry, y = step(constants, carry, x)
            return carry, (y, recorder.inputs)

        return jax.lax.scan(body, carry, (xs, taps))[1]

    ys, transpose, inputs = jax.vjp(run, constants, carry, xs, taps, has_aux=True)
    return ys, jax.tree_util.Partial(partial(_gradients, products), _Kept(transpose, inputs, constants))


def _scan_backward(step: Step, gradients: Callable[[Any], Any], by_ys: Any) -> tuple[Any, Any, Any]:
    return gradients(by_ys)


def _gradients(products: list[tuple[Product, int]], kept: _Kept, by_ys: Any) -> tuple[Any, Any, Any]:
    by_constants, by_carry, by_xs, by_taps = kept.transpose(by_ys)
    leaves, tree = jax.tree.flatten(by_constants)
    constants = jax.tree.leaves(kept.constants)
    for (product, number), x, by_y in zip(products, kept.inputs, by_taps, strict=True):
        _, transpose = jax.vjp(partial(product, x), constants[number])
        leaves[number] = leaves[number] + transpose(by_y)[0]
    return jax.tree.unflatten(tree, leaves), by_carry, by_xs


_scan.defvjp(_scan_forward, _scan_backward)
