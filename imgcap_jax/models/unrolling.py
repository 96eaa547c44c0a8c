"""A scan over the words of captions whose cost follows their lengths.

It differs from ``jax.lax.scan`` in two ways.

Gradients of weights: the backward pass of ``jax.lax.scan`` adds to the gradient of every weight at every step. For a
caption of T words, this takes T thin products and T passes over arrays as large as the model. Here, the inputs of a
product and the gradients of its outputs are kept for all steps. One product, T times as long, then gives the gradient
of the weight.

Lengths: ``jax.lax.scan`` takes T steps over all rows of the batch. Here, the scan ends with the longest caption of the
batch. When no caption of the last half of the rows goes on, the scan continues with the first half alone, and later
with the first quarter. If the longest captions come first, few steps are computed for captions that have ended. The
shapes do not depend on the lengths, so nothing is compiled again.
"""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

Product = Callable[[Array, Array], Array]
Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]

FEWEST_ROWS = 8
"""The scan does not continue with fewer rows than this. Thinner products take no less time."""


def constant_product(product: Product, x: Array, weight: Array) -> Array:
    """``product(x, weight)`` for a weight that all steps of a scan share.

    Within ``scan_steps``, the gradient of the weight is computed after the scan. Elsewhere this is a plain call. The
    product must be linear in the weight and must not close over any array. It must also accept an x with one more
    leading axis.
    """
    recorder = _recorder.get()
    return product(x, weight) if recorder is None else recorder.record(product, x, weight)


def scan_steps(step: Step, weights: Any, memory: Any, carry: Any, xs: Any, lengths: Array | None = None) -> Any:
    """``jax.lax.scan`` of ``step(weights, memory, carry, x) -> (carry, y)`` over xs; returns the stacked ys.

    The step must not close over any traced array: pass everything that changes between calls through the arguments.
    Weights must reach ``constant_product`` as unmodified leaves of ``weights`` or ``memory``. The gradients of other
    constants are added up step by step, as usual. The step must treat each row like any other, and must give a row the
    same result if there are fewer rows.

    Args:
        step: the function of one step.
        weights: constants that all rows share.
        memory: constants of the rows; the leaves lead with [B].
        carry: the state before the first step; the leaves lead with [B].
        xs: what the steps read; the leaves lead with [T,B]. No gradient flows into them.
        lengths: int32 [B], the number of steps of each row whose ys are used; None: T. The ys of other steps are the
            step's or zeros. The fewest steps are computed if the lengths descend.

    Returns:
        ys; the leaves lead with [T,B].
    """
    if lengths is None:
        length, rows = jax.tree.leaves(xs)[0].shape[:2]
        lengths = jnp.full(rows, length, jnp.int32)
    return _scan(step, weights, memory, carry, xs, lengths)


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


class _Halves(NamedTuple):
    """The leaves of a tree, apart: those that have gradients, and the others."""

    tree: Any
    floating: tuple[bool, ...]

    @classmethod
    def of(cls, tree: Any) -> "_Halves":
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple(jnp.issubdtype(leaf.dtype, np.inexact) for leaf in leaves))

    def split(self, tree: Any) -> tuple[list[Array], list[Array]]:
        """The leaves that have gradients, and the others."""
        leaves = self.tree.flatten_up_to(tree)
        real = [leaf for leaf, floating in zip(leaves, self.floating, strict=True) if floating]
        return real, [leaf for leaf, floating in zip(leaves, self.floating, strict=True) if not floating]

    def join(self, real: list[Array], other: list[Any]) -> Any:
        """The tree again."""
        reals, others = iter(real), iter(other)
        return self.tree.unflatten([next(reals) if floating else next(others) for floating in self.floating])


class _Traced(NamedTuple):
    """A step of some rows, traced together with its transpose.

    forward: (weights, memory, carry, x) as leaves -> the leaves of (carry, y, inputs of the products, what the
    transpose reads). counts: the number of leaves of each of these. fixed: for each leaf that the transpose reads,
    whether it is the same at all steps. transpose: the structure of the transpose with its leaves.
    """

    forward: Callable[..., list[Array]]
    counts: tuple[int, int, int, int]
    fixed: tuple[bool, ...]
    transpose: Any
    products: list[tuple[Product, int]]
    taps: list[jax.ShapeDtypeStruct]
    shapes: list[jax.ShapeDtypeStruct]
    ys: Any


def _trace(step: Step, constants: Any, carry: Any, x: Any) -> _Traced:
    """Traces ``step`` and its derivative with respect to constants (weights, memory), carry and taps."""
    recorder = _Recorder(constants, None)

    def measured(constants: Any, carry: Any, x: Any) -> Any:
        nonlocal recorder
        recorder = _Recorder(constants, None)
        with _recording(recorder):
            return step(*constants, carry, x)

    _, y = jax.eval_shape(measured, constants, carry, x)
    products, taps = recorder.products, recorder.outputs
    of_constants, of_carry, of_y = _Halves.of(constants), _Halves.of(carry), _Halves.of(y)
    structure: list[Any] = []

    def run(constants: Any, carry: Any, x: Any) -> Any:
        real_constants, other_constants = of_constants.split(constants)
        real_carry, other_carry = of_carry.split(carry)

        def differentiated(constants: list[Array], carry: list[Array], taps: list[Array]) -> Any:
            whole = of_constants.join(constants, other_constants)
            recorder = _Recorder(whole, taps)
            with _recording(recorder):
                next_carry, y = step(*whole, of_carry.join(carry, other_carry), x)
            (reals, others), (y_reals, y_others) = of_carry.split(next_carry), of_y.split(y)
            return (reals, y_reals), (others, y_others, recorder.inputs)

        zeros = [jnp.zeros(tap.shape, tap.dtype) for tap in taps]
        (reals, y_reals), transpose, (others, y_others, inputs) = jax.vjp(
            differentiated, real_constants, real_carry, zeros, has_aux=True
        )
        leaves, tree = jax.tree.flatten(transpose)
        structure[:] = [tree]
        return of_carry.join(reals, others), of_y.join(y_reals, y_others), inputs, leaves

    jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(constants, carry, x)
    counts = tuple(len(jax.tree.leaves(part)) for part in shapes)
    fixed = _fixed_outputs(jaxpr, len(jax.tree.leaves(constants)))[sum(counts[:3]) :]
    return _Traced(
        jaxpr_as_fun(jaxpr), counts, fixed, structure[0], products, taps, jax.tree.leaves(shapes), y
    )  # type: ignore[arg-type]


def _fixed_outputs(jaxpr: ClosedJaxpr, constants: int) -> tuple[bool, ...]:
    """Whether each output depends on the first ``constants`` inputs only."""
    fixed = {*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars[:constants]}

    def is_fixed(atom: Any) -> bool:
        return isinstance(atom, Literal) or atom in fixed

    for equation in jaxpr.jaxpr.eqns:
        if all(map(is_fixed, equation.invars)):
            fixed.update(equation.outvars)
    return tuple(map(is_fixed, jaxpr.jaxpr.outvars))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(step: Step, weights: Any, memory: Any, carry: Any, xs: Any, lengths: Array) -> Any:
    return jax.lax.scan(lambda carry, x: step(weights, memory, carry, x), carry, xs)[1]


def _rows(tree: Any, rows: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:rows], tree)


def _padded(tree: Any, like: Any) -> Any:
    """The leaves with zeros appended to their first axes."""

    def pad(leaf: Array, like: Any) -> Array:
        return jnp.pad(leaf, [(0, like.shape[0] - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1))

    return jax.tree.map(pad, tree, like)


def _write(buffer: Array, leaf: Array, t: Array) -> Array:
    """Writes a leaf of step t to the origin of the buffer's row t, which can be larger."""
    return jax.lax.dynamic_update_slice(buffer, leaf[None], (t, *(0 for _ in leaf.shape)))


def _read(buffer: Array, shape: tuple[int, ...], t: Array) -> Array:
    return jax.lax.dynamic_slice(buffer, (t, *(0 for _ in shape)), (1, *shape))[0]


class _Kept(NamedTuple):
    """What the backward pass needs.

    constants, carry: of all rows. bounds: the first and last step of each stage. fixed: what each stage's transposes
    read at all steps. buffers: what they read at each step. inputs: of the products [T,...].
    """

    constants: Any
    carry: Any
    bounds: list[Array]
    fixed: list[list[Array]]
    buffers: list[Array]
    inputs: list[Array]


def _scan_forward(step: Step, weights: Any, memory: Any, carry: Any, xs: Any, lengths: Array) -> tuple[Any, Any]:
    length, batch = jax.tree.leaves(xs)[0].shape[:2]
    stages = [batch]
    while len(stages) < 3 and stages[-1] >= 2 * FEWEST_ROWS:
        stages.append(stages[-1] // 2)
    first_x = jax.tree.map(lambda leaf: leaf[0], xs)
    traces = [
        _trace(step, (weights, _rows(memory, rows)), _rows(carry, rows), _rows(first_x, rows)) for rows in stages
    ]
    whole = traces[0]
    carries, ys, inputs, residuals = np.cumsum(whole.counts)
    buffers = [jnp.zeros((length, *leaf.shape), leaf.dtype) for leaf in whole.shapes[carries:inputs]]
    moving = [not fixed for fixed in whole.fixed]
    kept = [
        jnp.zeros((length, *leaf.shape), leaf.dtype)
        for leaf, moves in zip(whole.shapes[inputs:], moving, strict=True)
        if moves
    ]
    t = jnp.zeros((), jnp.int32)
    bounds = [t]
    fixed_leaves: list[list[Array]] = []
    start = carry
    for rows, fewer, trace in zip(stages, [*stages[1:], 0], traces, strict=True):
        constants, carry = (weights, _rows(memory, rows)), _rows(carry, rows)
        structure = jax.tree.structure(carry)
        end = jnp.maximum(t, lengths[fewer:].max())

        def run(carry: Any, t: Array, rows: int = rows, trace: _Traced = trace, constants: Any = constants) -> Any:
            x = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, t, keepdims=False)[:rows], xs)
            return trace.forward(*jax.tree.leaves((constants, carry, x)))

        # XLA computes only what these leaves need.
        once = run(carry, t)[inputs:]
        fixed_leaves.append([leaf for leaf, moves in zip(once, moving, strict=True) if not moves])

        def body(state: Any, run: Any = run, structure: Any = structure) -> Any:
            t, carry, buffers, kept = state
            out = run(carry, t)
            buffers = [_write(buffer, leaf, t) for buffer, leaf in zip(buffers, out[carries:inputs], strict=True)]
            moved = [leaf for leaf, moves in zip(out[inputs:], moving, strict=True) if moves]
            kept = [_write(buffer, leaf, t) for buffer, leaf in zip(kept, moved, strict=True)]
            return t + 1, structure.unflatten(out[:carries]), buffers, kept

        t, carry, buffers, kept = jax.lax.while_loop(
            lambda state, end=end: state[0] < end, body, (t, carry, buffers, kept)
        )
        bounds.append(t)
    made, recorded = buffers[: ys - carries], buffers[ys - carries :]
    result = jax.tree.unflatten(jax.tree.structure(whole.ys), made)
    rest = _Kept((weights, memory), start, bounds, fixed_leaves, kept, recorded)
    return result, jax.tree_util.Partial(partial(_gradients, stages, traces), rest)


def _scan_backward(step: Step, gradients: Callable[[Any], Any], by_ys: Any) -> Any:
    return gradients(by_ys)


def _gradients(stages: list[int], traces: list[_Traced], kept: _Kept, by_ys: Any) -> Any:
    of_y = _Halves.of(traces[0].ys)
    by_y_buffers, _ = of_y.split(by_ys)
    weights, memory = kept.constants
    of_weights, of_memory, of_carry = _Halves.of(weights), _Halves.of(memory), _Halves.of(kept.carry)
    real_weights, real_memory, real_carry = (
        of.split(tree)[0] for of, tree in ((of_weights, weights), (of_memory, memory), (of_carry, kept.carry))
    )
    last = stages[-1]
    by_weights = [jnp.zeros_like(leaf) for leaf in real_weights]
    by_memory, by_carry = (
        [jnp.zeros((last, *leaf.shape[1:]), leaf.dtype) for leaf in leaves] for leaves in (real_memory, real_carry)
    )
    length = kept.inputs[0].shape[0] if kept.inputs else 0
    taps = [jnp.zeros((length, *tap.shape), tap.dtype) for tap in traces[0].taps]
    for number in reversed(range(len(stages))):
        rows, trace, fixed = stages[number], traces[number], kept.fixed[number]
        like = [jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype) for leaf in (*real_memory, *real_carry)]
        by_memory, by_carry = (
            _padded(by_memory, like[: len(by_memory)]),
            _padded(by_carry, like[len(by_memory) :]),
        )
        shapes = [
            leaf.shape
            for leaf, is_fixed in zip(trace.shapes[sum(trace.counts[:3]) :], trace.fixed, strict=True)
            if not is_fixed
        ]
        y_shapes = [leaf.shape for leaf in of_y.split(trace.ys)[0]]

        def body(
            state: Any,
            trace: _Traced = trace,
            fixed: list[Array] = fixed,
            shapes: Any = shapes,
            y_shapes: Any = y_shapes,
        ) -> Any:
            after, by_weights, by_memory, by_carry, taps = state
            t = after - 1
            still = iter(fixed)
            moved = (_read(buffer, shape, t) for buffer, shape in zip(kept.buffers, shapes, strict=True))
            leaves = [next(still) if is_fixed else next(moved) for is_fixed in trace.fixed]
            by_y = [_read(buffer, shape, t) for buffer, shape in zip(by_y_buffers, y_shapes, strict=True)]
            by_constants, by_carry, by_taps = trace.transpose.unflatten(leaves)((by_carry, by_y))
            more_weights, more_memory = by_constants[: len(by_weights)], by_constants[len(by_weights) :]
            return (
                t,
                jax.tree.map(jnp.add, by_weights, more_weights),
                jax.tree.map(jnp.add, by_memory, more_memory),
                by_carry,
                [_write(buffer, leaf, t) for buffer, leaf in zip(taps, by_taps, strict=True)],
            )

        _, by_weights, by_memory, by_carry, taps = jax.lax.while_loop(
            lambda state, start=kept.bounds[number]: state[0] > start,
            body,
            (kept.bounds[number + 1], by_weights, by_memory, by_carry, taps),
        )
    by_constants = of_weights.join(by_weights, [None] * len(of_weights.floating)), of_memory.join(
        by_memory, [None] * len(of_memory.floating)
    )
    is_none = {"is_leaf": lambda leaf: leaf is None}
    leaves, tree = jax.tree.flatten(by_constants, **is_none)
    constants = jax.tree.leaves(kept.constants)
    for (product, index), x, by_y in zip(traces[0].products, kept.inputs, taps, strict=True):
        _, transpose = jax.vjp(partial(product, x), constants[index])
        leaves[index] = leaves[index] + transpose(by_y)[0]
    by_weights_tree, by_memory_tree = tree.unflatten(leaves)
    return by_weights_tree, by_memory_tree, of_carry.join(by_carry, [None] * len(of_carry.floating)), None, None


_scan.defvjp(_scan_forward, _scan_backward)
