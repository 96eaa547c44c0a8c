"""A scan that computes the gradient of each weight in one product, after the scan.

The backward pass of ``jax.lax.scan`` adds to the gradient of every weight at every step. For a caption of T words, this
takes T thin products and T passes over arrays as large as the model. Here, the inputs of a product and the gradients of
its outputs are kept for all steps. One product, T times as long, then gives the gradient of the weight.
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

    Within ``scan_steps``, the gradient of the weight is computed after the scan. Elsewhere this is a plain call. The
    product must be linear in the weight and must not close over any array. It must also accept an x with one more
    leading axis.
    """
    recorder = _recorder.get()
    return product(x, weight) if recorder is None else recorder.record(product, x, weight)


def scan_steps(step: Step, constants: Any, carry: Any, xs: Any) -> Any:
    """``jax.lax.scan`` of ``step(constants, carry, x) -> (carry, y)`` over xs; returns the stacked ys.

    The step must not close over any traced array: pass everything that changes between calls through ``constants`` or
    ``xs``. Weights must reach ``constant_product`` as unmodified leaves of ``constants``. The gradients of other
    constants are added up step by step, as usual.
    """
    return _scan(step, constants, carry, xs)


class _Recorder:
    """Records the products of one step: their inputs, and the taps (if given) that receive their output gradients."""

    def __init__(self, constants: Any, taps: list[Array] | None) -> None:
        self._numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(constants))}
        self._taps = taps
        self.products: list[tuple[Product, int]] = []  # the product, the index of its weight in the constants
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
    """What the backward pass needs: the transposed scan, the inputs [T,...] of the products, and the constants."""

    transpose: Any
    inputs: list[Array]
    constants: Any


def _scan_forward(step: Step, constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    # The step is traced once to obtain the output shapes of its products. The taps must have these shapes.
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
