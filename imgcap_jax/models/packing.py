"""Work on the rows of an array that count, in chunks, without waiting for the others.

Half of the places in a batch of captions are pad. The number of words differs from batch to batch, but shapes must not.
Therefore rows are taken from their places in chunks, as many chunks as there are rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

PARTS = 4
"""The last rows are processed in chunks that are smaller by this factor."""


def chunk_size(places: int, most: int | None = None) -> int:
    """The number of rows per chunk: a multiple of ``PARTS``, about ``most`` at most.

    A caption of COCO fills slightly more than half of the places for 20 words. So does a chunk of 4/7 of the places.
    Three small chunks then hold the rest.
    """
    size = -(-places * 4 // 7)
    return -(-(size if most is None else min(size, most)) // PARTS) * PARTS


def over_chunks(
    function: Callable[..., tuple[Any, Any]], arrays: Sequence[Array], counted: Array, chunk: int
) -> tuple[Any, Any]:
    """Applies a function to chunks of the counted rows.

    The first chunk is always computed. Chunks of the same size follow while they are more than 3/4 full, then smaller
    ones.

    Args:
        function: (rows of each array, [n,...]) -> (a pytree to add up over chunks, a pytree of values [n,...] of the
            rows). The rows that fill the last chunk are 0.
        arrays: [P,...] each, the rows in their places.
        counted: bool [P], the places of the rows that count.
        chunk: the number of rows per chunk, from ``chunk_size``.

    Returns:
        The sums, and the values of the rows in their places [P,...]; the values of the others are 0, or those of a row
        of zeros.
    """
    places, small = counted.shape[0], chunk // PARTS
    count = jnp.sum(counted)
    order = jnp.argsort(~counted, stable=True)  # counted rows come first
    order = jnp.pad(order, (0, chunk), constant_values=places)  # past the end: read as 0

    def of_chunk(start: Array | int, size: int) -> tuple[Any, Any]:
        rows = jax.lax.dynamic_slice_in_dim(order, start, size)
        return function(*(leaf.at[rows].get(mode="fill", fill_value=0) for leaf in arrays))

    def put(values: Any, more: Any, start: Array | int) -> Any:
        return jax.tree.map(
            lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part, start, axis=0), values, more
        )

    def body(state: tuple[Array, Any, Any], size: int) -> tuple[Array, Any, Any]:
        start, sums, values = state
        more_sums, more_values = of_chunk(start, size)
        return start + size, jax.tree.map(jnp.add, sums, more_sums), put(values, more_values, start)

    # The sums start with those of the first chunk, because adding to zeros takes time for arrays as large as a model.
    sums, values = of_chunk(0, chunk)
    every = jax.tree.map(lambda leaf: jnp.zeros((len(order), *leaf.shape[1:]), leaf.dtype), values)
    state = jnp.asarray(chunk, count.dtype), sums, put(every, values, 0)
    if places > 2 * chunk - small:
        state = jax.lax.while_loop(lambda state: state[0] + chunk - small < count, partial(body, size=chunk), state)
    if places > chunk:
        state = jax.lax.while_loop(lambda state: state[0] < count, partial(body, size=small), state)
    _, sums, every = state
    back = jnp.argsort(order[:places])
    return sums, jax.tree.map(lambda leaf: leaf[back], every)
