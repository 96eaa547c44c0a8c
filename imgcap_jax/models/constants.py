"""Calls that read constants of a scan, whose gradients are computed in one go after the scan.

The backward pass of ``jax.lax.scan`` adds to the gradient of every weight at every step. For a caption of T words, this
takes T thin products and T passes over arrays as large as the model. ``unrolling.scan_steps`` keeps what such a call
read and the gradient of its result, and then computes the gradient of the constants for all steps at once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.tracers import current_trace
from jax import Array

Function = Callable[..., Array]


def with_constants(function: Function, x: Array, *constants: Array) -> Array:
    """``function(x, *constants)`` for arrays that all steps of a scan share.

    Within ``scan_steps``, the gradient of the constants is computed after the scan. Elsewhere this is a plain call.

    Args:
        function: it must not close over any array, and must compute each row independently. A step calls it with x
            [B,...]. For the gradient it is called with x [T,B,...] or, if all constants are weights, with any of these
            rows, [n,...].
        x: what differs between the steps.
        constants: unmodified leaves of the weights or the memory of ``scan_steps``. For other arrays, and within
            another transformation (``jax.checkpoint``, ``jax.vmap``, an inner scan), this is a plain call.
    """
    recorder = _current.get()
    return function(x, *constants) if recorder is None else recorder.call(function, x, constants)


def split(leaves: Sequence[Any], chosen: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """The chosen leaves, and the others."""
    pairs = list(zip(leaves, chosen, strict=True))
    return [leaf for leaf, is_chosen in pairs if is_chosen], [leaf for leaf, is_chosen in pairs if not is_chosen]


def join(leaves: Sequence[Any], others: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    """All leaves again, from what ``split`` returned."""
    of_kind = {True: iter(leaves), False: iter(others)}
    return [next(of_kind[is_chosen]) for is_chosen in chosen]


class Floating(NamedTuple):
    """Separates the leaves of a tree that have gradients from the others."""

    tree: Any
    floating: tuple[bool, ...]

    @classmethod
    def of(cls, tree: Any) -> "Floating":
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple(jnp.issubdtype(leaf.dtype, np.inexact) for leaf in leaves))

    def split(self, tree: Any) -> tuple[list[Array], list[Array]]:
        """The leaves that have gradients, and the others."""
        return split(self.tree.flatten_up_to(tree), self.floating)

    def join(self, floating: Sequence[Any], others: Sequence[Any]) -> Any:
        """The tree of these leaves."""
        return self.tree.unflatten(join(floating, others, self.floating))

    def gradient(self, floating: Sequence[Array | None]) -> Any:
        """The tree of gradients; None for leaves that have none."""
        return self.join(floating, [None] * self.floating.count(False))


class Call(NamedTuple):
    """A call of ``with_constants``: the function, and the indices of its constants among those of the scan."""

    function: Function
    indices: tuple[int, ...]

    def gradients(self, x: Array, constants: list[Array], by_y: Array) -> list[Array | None]:
        """The gradients of the call's constants, from x and the gradient of the result; None for integers.

        ``constants`` are those of the scan.
        """
        own = [constants[index] for index in self.indices]
        of_own = Floating.of(own)
        floating, others = of_own.split(own)
        _, transpose = jax.vjp(lambda *floating: self.function(x, *of_own.join(floating, others)), *floating)
        gradients: list[Array | None] = of_own.gradient(transpose(by_y))
        return gradients


class Recorder:
    """Records the calls of one step.

    With taps, an array like its result per call, the gradient of each result goes to its tap instead of the constants.
    """

    def __init__(self, constants: Any, taps: list[Array] | None = None) -> None:
        self._indices = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(constants))}
        self._taps = taps
        self._trace: Any = None
        self.calls: list[Call] = []
        self.inputs: list[Array] = []
        self.results: list[jax.ShapeDtypeStruct] = []

    def call(self, function: Function, x: Array, constants: tuple[Array, ...]) -> Array:
        indices = tuple(self._indices.get(id(constant), -1) for constant in constants)
        # The values of an inner trace must not be kept beyond it.
        if min(indices) < 0 or current_trace() != self._trace:
            return function(x, *constants)
        self.calls.append(Call(function, indices))
        self.inputs.append(x)
        if self._taps is None:
            y = function(x, *constants)
            self.results.append(jax.ShapeDtypeStruct(y.shape, y.dtype))
            return y
        return _tapped(function, x, constants, self._taps[len(self.inputs) - 1])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls within this context are recorded here."""
        self._trace = current_trace()
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(function: Function, x: Array, constants: tuple[Array, ...], tap: Array) -> Array:
    """The result, whose gradient goes to x and to the unused ``tap`` instead of the constants."""
    return function(x, *constants)


def _tapped_forward(
    function: Function, x: Array, constants: tuple[Array, ...], tap: Array
) -> tuple[Array, tuple[Array, tuple[Array, ...]]]:
    return function(x, *constants), (x, constants)


def _tapped_backward(function: Function, kept: tuple[Array, tuple[Array, ...]], by_y: Array) -> tuple[Any, None, Array]:
    x, constants = kept
    _, transpose = jax.vjp(lambda x: function(x, *constants), x)
    return transpose(by_y)[0], None, by_y


_tapped.defvjp(_tapped_forward, _tapped_backward)
