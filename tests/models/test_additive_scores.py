"""Scores and gradients of additive attention, compared with the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgcap_jax.models.additive_scores import additive_scores

B, M, N, A = 2, 3, 5, 7


def plain(query: jax.Array, keys: jax.Array, score: jax.Array) -> jax.Array:
    return (jnp.tanh(keys[:, None] + query[:, :, None]) * score).sum(-1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_scores_and_gradients_equal_the_formula(scale: float) -> None:
    rng = np.random.default_rng(0)
    query, keys = (jnp.asarray(rng.normal(0, scale, shape), jnp.float32) for shape in ((B, M, A), (B, N, A)))
    score, by = jnp.asarray(rng.normal(size=A), jnp.float32), jnp.asarray(rng.normal(size=(B, M, N)), jnp.float32)
    got, ours = jax.vjp(additive_scores, query, keys, score)
    expected, theirs = jax.vjp(plain, query, keys, score)
    np.testing.assert_allclose(got, expected, atol=3e-6)
    for a, b in zip(ours(by), theirs(by), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_large_values_saturate() -> None:
    far = jnp.array([[[-1e4, 1e4, -300.0, 300.0]]])
    near = jnp.array([[[-1e4, 1e4, 20.0, -20.0]]])
    score = jnp.ones(4)
    value, transpose = jax.vjp(additive_scores, far, near, score)
    np.testing.assert_allclose(value, [[[0.0]]], atol=1e-6)
    for gradient in transpose(jnp.ones((1, 1, 1))):
        assert np.all(np.isfinite(gradient))


def test_bfloat16_is_summed_in_float32() -> None:
    rng = np.random.default_rng(0)
    query, keys = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((B, M, A), (B, N, A)))
    score = jnp.ones(A)
    scores, transpose = jax.vjp(additive_scores, query, keys, score)
    assert scores.dtype == jnp.float32
    exact = plain(query.astype(jnp.float32), keys.astype(jnp.float32), score)
    np.testing.assert_allclose(scores, exact, atol=1e-5)
    assert [leaf.dtype for leaf in transpose(scores)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
