"""Layers that several decoders share."""

import jax.numpy as jnp
import numpy as np
import pytest

from imgcap_jax.models.layers import draw_words


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
