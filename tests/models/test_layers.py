"""Layers that several decoders share."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.models.layers import Linear, Projection, WordLogits, draw_words, dropout


@pytest.mark.parametrize("size", [3, 128, 300])
def test_words_are_drawn_by_their_probabilities(size: int) -> None:
    """The word at which the cumulative distribution passes the number, in float64; also at the borders of blocks."""
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 4, size)
    logits[rng.random(size) < 0.4] = -np.inf
    logits[1] = 100.0  # not normalised
    logits[2:] += 100.0
    weights = np.exp(logits - 100)
    reached = np.cumsum(weights) / weights.sum()
    uniform = np.sort(rng.random(4000)).astype(np.float32)
    far = np.abs(reached[:, None] - uniform).min(0) > 1e-5  # numbers that rounding does not move to another word
    words, log_probs = draw_words(jnp.asarray(np.tile(logits, (len(uniform), 1)), jnp.float32), jnp.asarray(uniform))
    np.testing.assert_array_equal(np.asarray(words)[far], np.searchsorted(reached, uniform, side="right")[far])
    np.testing.assert_allclose(log_probs, np.log((weights / weights.sum())[np.asarray(words)]), rtol=1e-4, atol=1e-4)


def test_words_of_probability_0_are_never_drawn() -> None:
    """Not at the smallest and largest numbers either."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (2000, 390))
    logits[rng.random(logits.shape) < 0.97] = -np.inf
    logits[np.arange(2000), rng.integers(0, 390, 2000)] = 0.0
    for uniform in (0.0, 1 - 2**-24, *rng.random(3)):
        words, _ = draw_words(jnp.asarray(logits, jnp.float32), jnp.full(2000, uniform, jnp.float32))
        assert np.all(np.isfinite(logits[np.arange(2000), np.asarray(words)]))


def test_logits_that_are_not_finite_give_a_word_of_the_vocabulary() -> None:
    assert int(draw_words(jnp.full((1, 11), jnp.nan), jnp.zeros(1))[0][0]) < 11


def test_many_small_probabilities_in_bfloat16_are_added_exactly() -> None:
    words, _ = draw_words(jnp.zeros((3000, 300), jnp.bfloat16), (jnp.arange(3000) + 0.5) / 3000)
    np.testing.assert_array_equal(np.bincount(words, minlength=300), 10)


@pytest.mark.parametrize("size", [9, 128, 300])
def test_words_drawn_on_tpus_are_the_same(size: int, as_on: Any) -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 50, size)).astype(np.float32)).at[..., :2].set(-jnp.inf)
    place = jnp.asarray(rng.random((4, 50)), jnp.float32)
    expected = draw_words(logits, place)
    as_on("tpu")
    found = draw_words(logits, place)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_dropout_on_tpus_keeps_its_share_of_each_row_and_depends_on_the_key_alone(as_on: Any) -> None:
    keys = jax.random.split(jax.random.key(0), 6)
    x = jnp.ones((6, 3, 1001))
    on_cpu = dropout(x, 0.3, keys)
    as_on("tpu")
    found = dropout(x, 0.3, keys)
    assert not np.array_equal(found, on_cpu)
    shares = np.asarray(found > 0).mean(axis=(1, 2))
    np.testing.assert_allclose(shares, 0.7, atol=4 * np.sqrt(0.21 / 3003))
    np.testing.assert_allclose(np.unique(found), [0, 1 / 0.7], rtol=1e-4)
    np.testing.assert_array_equal(dropout(x[:2], 0.3, keys[:2]), found[:2])
    halves = np.asarray(found[0] > 0).reshape(-1)
    assert abs(np.corrcoef(halves[:1501], halves[1501:3002])[0, 1]) < 0.1


def lowered(function: Any, *arguments: Any) -> str:
    """The program for TPU, as JAX passes it to the compiler. Neither a TPU nor its compiler is needed."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def test_programs_for_tpu_have_the_forms_for_tpu() -> None:
    """The platform that is compiled for decides, not the one that compiles."""
    keys, x = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 8))
    text = lowered(lambda x, keys: dropout(x, 0.5, keys), x, keys)
    assert "bitcast_convert" not in text
    assert "bitcast_convert" in jax.jit(lambda x, keys: dropout(x, 0.5, keys)).lower(x, keys).as_text()
    logits, place = jnp.zeros((2, 3, 300)), jnp.zeros((2, 3))
    assert "slice_sizes = array<i64: 1, 1, 128>" in lowered(draw_words, logits, place)
    assert "slice_sizes = array<i64: 1, 1, 128>" not in jax.jit(draw_words).lower(logits, place).as_text()


def test_bfloat16_logits_have_bfloat16_products_in_both_directions() -> None:
    layer = WordLogits(16, 40, tied=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    exact = WordLogits(16, 40, tied=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    embedding: Any = None
    graph, params = nnx.split(layer)
    exact_graph, _ = nnx.split(exact)
    rng = np.random.default_rng(0)
    hidden, direction = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 5, 16), (3, 5, 40)))

    def loss(graph: Any) -> Any:
        return lambda params, hidden: (nnx.merge(graph, params)(hidden, embedding) * direction).sum()

    text = str(jax.make_jaxpr(jax.grad(loss(graph), (0, 1)))(params, hidden))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general\[.*?\] (\w+) (\w+)", text, re.S)
    assert len(products) == 3
    for _, *operands in products:
        for name in operands:
            assert re.search(rf"\b{name}:bf16\[", text), name
    found = jax.grad(loss(graph), (0, 1))(params, hidden)
    expected = jax.grad(loss(exact_graph), (0, 1))(params, hidden)
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert own.dtype == jnp.float32
        np.testing.assert_allclose(own, other, atol=0.02 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("kind", [Linear, Projection])
def test_gradient_of_a_bfloat16_bias_is_summed_in_float32(kind: type[nnx.Linear]) -> None:
    layer = kind(4, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.random((64, 64, size)), jnp.bfloat16) for size in (4, 8))

    @jax.jit
    def loss(params: Any, x: Any, weight: Any) -> Any:
        y = nnx.merge(graph, params)(x)
        assert y.dtype == jnp.bfloat16
        return (y.astype(jnp.float32) * weight).sum()

    gradient = np.asarray(jax.grad(loss)(params, x, weight)["bias"][...])
    # A bfloat16 sum of these 4096 rows is wrong by 1 %.
    np.testing.assert_allclose(gradient, np.asarray(weight, np.float64).sum((0, 1)), rtol=1e-6)


def test_projection_in_float32_is_that_of_flax() -> None:
    ours, theirs = (kind(4, 8, dtype=jnp.float32, rngs=nnx.Rngs(0)) for kind in (Projection, nnx.Linear))
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))

    def gradient(layer: nnx.Linear) -> Any:
        return nnx.grad(lambda layer: jnp.square(layer(x) - 1.0).sum())(layer)

    for own, other in zip(jax.tree.leaves(gradient(ours)), jax.tree.leaves(gradient(theirs)), strict=True):
        np.testing.assert_array_equal(own, other)
    np.testing.assert_array_equal(ours(x), theirs(x))
