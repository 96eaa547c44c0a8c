"""The scores of additive attention, s . tanh(k_n + q_m), without storing the hidden layer [B,M,N,A].

The hidden layer is by far the largest array of a decoder step (128 MB for 64 images, 5 captions, 196 regions and 512
units). The speed of a step that writes it is limited by memory. Here each of its elements exists only inside a sum:
tanh(k + q) = 1 - 2 / (1 + e^2k e^2q) costs as much as two products once the exponentials of k and q are known.
Computing it again for each sum of the backward pass is therefore cheaper than writing it once.

XLA fuses the operand of a sum into the loop of the sum, unless two sums of one program read the same array. That array
is written to memory. The three sums of the backward pass are therefore expressed in three different ways.
"""

import jax
import jax.numpy as jnp
from jax import Array

# k and q are clipped to this magnitude separately: e^86 is still a finite float32. If one of them is clipped and the
# other has the opposite sign, their sum is wrong. No trained network has values of this size, because tanh is 1 or -1
# from a magnitude of 9 on.
_LIMIT = 43.0


@jax.custom_vjp
def additive_scores(query: Array, keys: Array, score: Array) -> Array:
    """Computes s . tanh(k_n + q_m) (Bahdanau et al. 2015).

    Args:
        query: [B,M,A].
        keys: [B,N,A].
        score: [A], the vector s.

    Returns:
        float32 [B,M,N], whatever the dtypes of the inputs.
    """
    key, query = _exponential(keys, 2.0), _exponential(query, 2.0)
    score = score.astype(jnp.float32)
    return jnp.sum(score) - jnp.sum(2.0 * score / (1.0 + key[:, None] * query[:, :, None]), axis=-1)


def _forward(query: Array, keys: Array, score: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return additive_scores(query, keys, score), (query, keys, score)


def _backward(kept: tuple[Array, Array, Array], by_scores: Array) -> tuple[Array, Array, Array]:
    query, keys, score = kept
    key, key_inverse = _exponential(keys, 2.0), _exponential(keys, -2.0)  # [B,N,A] both
    one, one_inverse = _exponential(query, 2.0), _exponential(query, -2.0)  # [B,M,A] both
    slope = 4.0 * score.astype(jnp.float32)  # d tanh(x) / dx = 4 / (2 + e^2x + e^-2x)

    both = key[:, None] * one[:, :, None] + key_inverse[:, None] * one_inverse[:, :, None]  # [B,M,N,A]
    by_query = slope * jnp.sum(by_scores[..., None] / (2.0 + both), axis=2)  # [B,M,A]

    by_keys = jnp.zeros_like(key)  # [B,N,A]
    for m in range(query.shape[1]):
        share = 1.0 / (1.0 + key * one[:, m, None])  # (1 - tanh) / 2
        by_keys = by_keys + by_scores[:, m, :, None] * (share - share * share)

    twice, by_four = 2.0 * key_inverse, 4.0 * by_scores
    halves = jnp.zeros_like(key)  # [B,N,A]
    for m in range(query.shape[1]):
        halves = halves + by_four[:, m, :, None] / (2.0 + twice * one_inverse[:, m, None])  # (1 + tanh) / 2
    by_score = jnp.sum(halves, axis=(0, 1)) - jnp.sum(by_scores)  # [A]
    return by_query.astype(query.dtype), (slope * by_keys).astype(keys.dtype), by_score.astype(score.dtype)


additive_scores.defvjp(_forward, _backward)


def _exponential(x: Array, factor: float) -> Array:
    return jnp.exp(factor * jnp.clip(x.astype(jnp.float32), -_LIMIT, _LIMIT))
