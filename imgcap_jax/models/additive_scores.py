"""The scores of additive attention, s . tanh(k_n + q_m), without storing the hidden layer [B,M,N,A].

The hidden layer is by far the largest array of a decoder step (128 MB for 64 images, 5 captions, 196 regions and 512
units). The speed of a step that writes it is limited by memory. Here each of its elements exists only inside a sum:
tanh(k + q) = 1 - 2 / (1 + e^2k e^2q) costs as much as two products once the exponentials of k and q are known.
Computing it again for each sum of the backward pass is therefore cheaper than writing it once.

XLA fuses the operand of a sum into the loop of the sum, unless two sums of one program read the same array. That array
is written to memory. The sums of the backward pass are therefore expressed in different ways.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.models.members import most

# k and q are clipped to this magnitude separately: e^86 is still a finite float32. If one of them is clipped and the
# other has the opposite sign, their sum is wrong. No trained network has values of this size, because tanh is 1 or -1
# from a magnitude of 9 on.
_LIMIT = 43.0
# Queries whose contributions to the gradient of the keys are added up in registers.
_TOGETHER = 16


@jax.custom_vjp
def additive_scores(query: Array, keys: Array, score: Array) -> Array:
    """Computes s . tanh(k_n + q_m) (Bahdanau et al. 2015).

    Args:
        query: [B,M,A], or [T,B,M,A] for the queries of T steps.
        keys: [B,N,A].
        score: [A], the vector s.

    Returns:
        float32 [B,M,N] (or [T,B,M,N]), whatever the dtypes of the inputs.
    """
    key, query = _exponential(keys, 2.0), _exponential(query, 2.0)
    score = score.astype(jnp.float32)
    return jnp.sum(score) - jnp.sum(2.0 * score / (1.0 + key[:, None] * query[..., None, :]), axis=-1)


def _forward(query: Array, keys: Array, score: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return additive_scores(query, keys, score), (query, keys, score)


def _backward(kept: tuple[Array, Array, Array], by_scores: Array) -> tuple[Array, Array, Array]:
    query, keys, score = kept
    key, key_inverse = _exponential(keys, 2.0), _exponential(keys, -2.0)  # [B,N,A] both
    one, one_inverse = _exponential(query, 2.0), _exponential(query, -2.0)  # [...,B,M,A] both
    slope = 4.0 * score.astype(jnp.float32)  # d tanh(x) / dx = 4 / (2 + e^2x + e^-2x)

    both = key[:, None] * one[..., None, :] + key_inverse[:, None] * one_inverse[..., None, :]  # [...,B,M,N,A]
    by_query = slope * jnp.sum(by_scores[..., None] / (2.0 + both), axis=-2)  # [...,B,M,A]
    by_keys, by_score = _of_constants(one, one_inverse, key, key_inverse, by_scores)
    return by_query.astype(query.dtype), (slope * by_keys).astype(keys.dtype), by_score.astype(score.dtype)


def _of_constants(
    one: Array, one_inverse: Array, key: Array, key_inverse: Array, by_scores: Array
) -> tuple[Array, Array]:
    """The gradient of the keys divided by the slope [B,N,A], and the gradient of the score [A].

    A loop over the regions adds up several queries at a time, so that the keys are read once for all of them. A block
    of queries without gradients (of captions that have ended) is skipped.
    """
    batch, regions, size = key.shape
    count = math.prod(by_scores.shape) // (batch * regions)
    together = min(_TOGETHER, count)
    blocks = -(-count // together)

    def in_blocks(leaf: Array) -> Array:
        """[B,M,...] or [T,B,M,...] -> [blocks,together,B,...]."""
        leaf = leaf if leaf.ndim == 4 else leaf[None]
        leaf = jnp.moveaxis(leaf, 1, 2).reshape(count, batch, leaf.shape[-1])
        return jnp.pad(leaf, [(0, blocks * together - count), (0, 0), (0, 0)]).reshape(
            blocks, together, batch, leaf.shape[-1]
        )

    def add(sums: tuple[Array, Array], block: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        def added() -> tuple[Array, Array]:
            one, one_inverse, by = block
            by_keys, halves = sums[0], jnp.zeros_like(key)  # [B,N,A] both
            twice = 2.0 * key_inverse
            for m in range(together):
                share = 1.0 / (1.0 + key * one[m, :, None])  # (1 - tanh) / 2
                by_keys = by_keys + by[m, :, :, None] * (share - share * share)
                halves = halves + 4.0 * by[m, :, :, None] / (2.0 + twice * one_inverse[m, :, None])  # (1 + tanh) / 2
            return by_keys, sums[1] + jnp.sum(halves, axis=(0, 1)) - jnp.sum(by)

        return jax.lax.cond(most(jnp.any(block[2] != 0)), added, lambda: sums), None

    zeros = jnp.zeros_like(key), jnp.zeros(size, jnp.float32)
    return jax.lax.scan(add, zeros, (in_blocks(one), in_blocks(one_inverse), in_blocks(by_scores)))[0]


additive_scores.defvjp(_forward, _backward)


def _exponential(x: Array, factor: float) -> Array:
    return jnp.exp(factor * jnp.clip(x.astype(jnp.float32), -_LIMIT, _LIMIT))
