"""Calls that read constants of a scan, whose gradients are computed in one go after the scan.

The backward pass of ``jax.lax.scan`` adds to the gradient of every weight at every step. For a caption of T words, this
takes T thin products and T passes over arrays as large as the model. ``unrolling.scan_steps`` keeps what such a call
read and the gradient of its result, and then computes the gradient of the constants for all steps at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

Function = Callable[..., Array]


def with_constants(function: Function, x: Array, *constants: Array) -> Array:
    """``function(x, *constants)`` for arrays that all steps of a scan share.

    Within ``scan_steps``, the gradient of the constants is computed after the scan. Elsewhere this is a plain call.

    Args:
        function: it must not close over any array. It must also accept an x with one more leading axis and, if all
            constants are weights, with the axes [T,B] of an x [T,B,...] merged.
        x: what differs between the steps.
        constants: unmodified leaves of the weights or the memory of ``scan_steps``. For other arrays this is a plain
            call.
    """
    recorder = _current.get()
    return function(x, *constants) if recorder is None else recorder.call(function, x, constants)


class Call(NamedTuple):
    """A call of ``with_constants``: the function, and the places of its constants among those of the scan."""

    function: Function
    places: tuple[int, ...]

    def gradients(self, x: Array, constants: list[Array], by_y: Array) -> tuple[Array, ...]:
        """The gradients of the call's constants, from x and the gradient of the result.

        ``constants`` are those of the scan.
        """
        _, transpose = jax.vjp(partial(self.function, x), *(constants[place] for place in self.places))
        return transpose(by_y)


class Recorder:
    """Records the calls of one step.

    With taps, an array like its result per call, the gradient of each result goes to its tap instead of the constants.
    """

    def __init__(self, constants: Any, taps: list[Array] | None = None) -> None:
        self._places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(constants))}
        self._taps = taps
        self.calls: list[Call] = []
        self.inputs: list[Array] = []
        self.results: list[jax.ShapeDtypeStruct] = []

    def call(self, function: Function, x: Array, constants: tuple[Array, ...]) -> Array:
        places = tuple(self._places.get(id(constant), -1) for constant in constants)
        if min(places) < 0:
            return function(x, *constants)
        self.calls.append(Call(function, places))
        self.inputs.append(x)
        if self._taps is None:
            y = function(x, *constants)
            self.results.append(jax.ShapeDtypeStruct(y.shape, y.dtype))
            return y
        return _tapped(function, x, constants, self._taps[len(self.inputs) - 1])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls within this context are recorded here."""
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
