"""Properties of every decoder: stepping equals teacher forcing, masks, independent sequences, dropout, the carry."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.decoders.contract import Decoder
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.decoders.up_down import UpDown
from imgcap_jax.models.layers import draw_words, dropout
from imgcap_jax.special_tokens import BOS

B, M, T, N, D, V = 3, 2, 7, 5, 6, 11


def log_probs(decoder: Decoder, regions: Any, tokens: Any, mask: Any = None) -> tuple[Any, Any]:
    memory, carry = decoder.start(jnp.asarray(regions), tokens.shape[1], steps=tokens.shape[2], region_mask=mask)
    outputs = decoder.unroll(jnp.asarray(tokens), memory, carry)
    return jax.nn.log_softmax(decoder.logits(outputs)), outputs.attention


def test_stepping_equals_teacher_forcing(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray]
) -> None:
    _, decoder = decoder_case
    regions, tokens = decoder_inputs
    expected, _ = log_probs(decoder, regions, tokens)
    memory, carry = decoder.start(jnp.asarray(regions), M, steps=T)
    for t in range(T):
        carry, output = decoder.step(carry, jnp.asarray(tokens[:, :, t]), memory)
        got = jax.nn.log_softmax(decoder.logits(output))
        np.testing.assert_allclose(got, expected[:, :, t], atol=1e-5)


@pytest.mark.parametrize("variational", [pytest.param(False, marks=pytest.mark.slow), True])
def test_teacher_forcing_and_stepping_have_equal_gradients(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray], variational: bool
) -> None:
    """Gradients by all parameters and by the regions, with dropout.

    ``scan_steps`` has its own backward pass.
    """
    name, decoder = decoder_case
    if name == "transformer" and variational:
        pytest.skip("variational dropout is for recurrent decoders")
    regions, tokens = decoder_inputs
    graph, params = nnx.split(decoder)
    keys = jax.random.split(jax.random.key(4), B)
    direction = jax.random.normal(jax.random.key(5), (B, M, T, V))

    def total(params: Any, regions: Any, unrolled: bool) -> Any:
        decoder = nnx.merge(graph, params)
        decoder.variational = variational
        memory, carry = decoder.start(regions, M, steps=T, dropout_keys=keys)
        if unrolled:
            return (
                decoder.logits(decoder.unroll(jnp.asarray(tokens), memory, carry, dropout_keys=keys)) * direction
            ).sum()
        result = 0.0
        for t in range(T):
            step_keys = decoder.step_keys(keys, jnp.asarray(t))
            carry, output = decoder.step(carry, jnp.asarray(tokens[:, :, t]), memory, dropout_keys=step_keys)
            result += (decoder.logits(output) * direction[:, :, t]).sum()
        return result

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    got, expected = (jax.tree.leaves(gradient(params, jnp.asarray(regions), way)) for way in (True, False))
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1, np.abs(theirs).max()))


def test_tiny_dropout_rate_drops_nothing() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    for rate in (1e-7, 1e-6):
        np.testing.assert_array_equal(dropout(jnp.ones((2, 50)), rate, keys), 1)
    share = np.asarray(dropout(jnp.ones((2, 40_001)), 0.3, keys) == 0).mean()
    assert abs(share - 0.3) < 0.01


def test_variational_dropout_is_the_same_at_all_steps(decoder_inputs: tuple[np.ndarray, np.ndarray]) -> None:
    regions, tokens = decoder_inputs
    keys = jax.random.split(jax.random.key(3), B)
    same = {}
    for variational in (False, True):
        settings = UpDown(hidden_size=64, embedding_size=8, attention_size=3, variational_dropout=variational)
        decoder = settings.build(D, V, dtype=jnp.float32, rngs=nnx.Rngs(0))
        memory, carry = decoder.start(jnp.asarray(regions), M, steps=T, dropout_keys=keys)
        dropped = np.asarray(decoder.unroll(jnp.asarray(tokens), memory, carry, dropout_keys=keys).hidden) == 0
        same[variational] = (dropped == dropped[:, :, :1]).mean()
        assert 0.4 < dropped.mean() < 0.6
        # Masks differ between the captions of an image and between images.
        assert (dropped[:, 0] != dropped[:, 1]).any()
        assert (dropped[0] != dropped[1]).any()
    assert same[True] == 1
    assert same[False] < 0.65


def test_masked_regions_have_no_effect(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray]
) -> None:
    _, decoder = decoder_case
    regions, tokens = decoder_inputs
    expected, _ = log_probs(decoder, regions[:, :3], tokens)
    mask = jnp.broadcast_to(jnp.arange(N) < 3, (B, N))
    got, _ = log_probs(decoder, regions, tokens, mask)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_sequences_of_an_image_are_independent(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray]
) -> None:
    _, decoder = decoder_case
    regions, tokens = decoder_inputs
    expected, _ = log_probs(decoder, regions, tokens)
    alone, _ = log_probs(decoder, regions[1:2], tokens[1:2, 1:])
    np.testing.assert_allclose(alone[0, 0], expected[1, 1], atol=1e-5)


def test_carry_leads_with_image_and_sequence(decoder_case: tuple[str, Decoder]) -> None:
    _, decoder = decoder_case
    memory, carry = decoder.start(jnp.zeros((B, N, D)), M, steps=T)
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(carry)} == {(B, M)}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(memory)} <= {B}


def test_dropout_depends_on_the_row_key_and_has_the_given_rate(
    decoder_inputs: tuple[np.ndarray, np.ndarray],
) -> None:
    decoder = ShowTell(hidden_size=8, embedding_size=8, dropout=0.5).build(D, V, dtype=jnp.float32, rngs=nnx.Rngs(0))
    regions, tokens = decoder_inputs

    def hidden(rows: slice) -> Any:
        keys = jax.random.split(jax.random.key(3), B)[rows]
        memory, carry = decoder.start(jnp.asarray(regions[rows]), M, steps=T, dropout_keys=keys)
        return decoder.unroll(jnp.asarray(tokens[rows]), memory, carry, dropout_keys=keys).hidden

    whole = hidden(slice(None))
    np.testing.assert_allclose(whole[2:], hidden(slice(2, None)), atol=1e-6)
    dropped = np.mean(np.asarray(whole) == 0)
    assert 0.35 < dropped < 0.65  # 336 units at rate 0.5: a margin of more than five standard deviations
    assert not np.array_equal(np.asarray(whole[:, :, 0] == 0), np.asarray(whole[:, :, 1] == 0))


def test_tied_embedding_of_another_size_is_an_error() -> None:
    with pytest.raises(UserError, match="tied_embedding needs hidden_size"):
        ShowTell(hidden_size=8, embedding_size=4, tied_embedding=True).build(D, V, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_scheduled_sampling_replaces_tokens_with_the_given_probability(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray]
) -> None:
    """Probability 0 equals teacher forcing. At probability 1, the tokens read follow the model's distribution."""
    name, decoder = decoder_case
    if name not in ("show_tell", "up_down", "transformer"):
        pytest.skip("a plain carry, a nested carry and a cache are enough")
    regions, tokens = decoder_inputs
    many = 600
    regions, tokens = np.repeat(regions[:1], many, 0), np.tile([[[BOS, 5, 6]]], (many, M, 1))
    memory, carry = decoder.start(jnp.asarray(regions), M, steps=T)
    keys = jax.random.split(jax.random.key(7), many)

    def hidden(share: float) -> np.ndarray:
        return np.asarray(decoder.unroll_sampled(jnp.asarray(tokens), memory, carry, jnp.float32(share), keys).hidden)

    forced = np.asarray(decoder.unroll(jnp.asarray(tokens), memory, carry).hidden)
    np.testing.assert_allclose(hidden(0.0), forced, atol=1e-5)
    # The output after the second token shows which word was read.
    states = []
    for word in range(V):
        _, after = decoder.step(carry, jnp.asarray(tokens[:, :, 0]), memory)
        probs = np.array(jax.nn.softmax(decoder.logits(after)))[0, 0]
        read = np.stack([tokens[:, :, 0], np.full((many, M), word), tokens[:, :, 2]], -1)
        states.append(np.asarray(decoder.unroll(jnp.asarray(read), memory, carry).hidden)[0, 0, 1])
    probs[:2] = 0
    probs /= probs.sum()
    distance = np.abs(hidden(1.0)[:, :, 1][..., None, :] - np.array(states)).sum(-1)  # [many,M,V]
    assert distance.min(-1).max() < 1e-4
    seen = np.bincount(distance.argmin(-1).ravel(), minlength=V) / (many * M)
    assert np.abs(seen - probs).max() < 5 * 0.5 / np.sqrt(many * M)
    assert seen[:2].sum() == 0
    true = int(tokens[0, 0, 1])
    half = np.abs(hidden(0.5)[:, 0, 1][:, None] - np.array(states)).sum(-1).argmin(-1)
    expected = 0.5 + 0.5 * probs[true]
    assert abs((half == true).mean() - expected) < 5 * 0.5 / np.sqrt(many)


def test_bfloat16_products_train_and_decode(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray], build_decoder: Any
) -> None:
    """The types of a carry stay the same, gradients are float32, and values are close to those of float32."""
    name, exact = decoder_case
    decoder = build_decoder(name, jnp.bfloat16)
    nnx.update(decoder, nnx.state(exact))
    graph, params = nnx.split(decoder)
    regions, tokens = (jnp.asarray(x) for x in decoder_inputs)

    @jax.jit
    def logits(params: Any) -> Any:
        decoder = nnx.merge(graph, params)
        memory, carry = decoder.start(regions, M, steps=T)
        return decoder.logits(decoder.unroll(tokens, memory, carry))

    memory, carry = exact.start(regions, M, steps=T)
    near = exact.logits(exact.unroll(tokens, memory, carry))
    np.testing.assert_allclose(logits(params), near, atol=0.1 * np.abs(near).max())
    gradient = jax.grad(lambda params: jnp.square(logits(params)).sum())
    gradients = gradient(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    memory, carry = decoder.start(regions, M, steps=T)
    after, _ = decoder.step(carry, tokens[:, :, 0], memory)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(carry)]
    # No gradient of a bias is summed over the rows in bfloat16.
    assert not re.findall(r":bf16\[\d*\] = reduce_sum", str(jax.make_jaxpr(gradient)(params)))


def test_words_chosen_while_reading_have_the_outputs_and_gradients_of_teacher_forcing(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray]
) -> None:
    """Captions are drawn with dropout and a region mask, and end at different words."""
    _, decoder = decoder_case
    if decoder.reads_at_once:
        pytest.skip("the Transformer's captions are drawn before they are read")
    regions = jnp.asarray(decoder_inputs[0])
    keys = jax.random.split(jax.random.key(0), len(regions))
    mask = jnp.arange(regions.shape[1]) < jnp.array([[regions.shape[1]], [2]])[jnp.arange(len(regions)) % 2]
    uniform = jax.random.uniform(jax.random.key(1), (len(regions), M, T))
    graph, params = nnx.split(decoder)
    options = {"steps": T, "region_mask": mask, "dropout_keys": keys}

    def chosen(params: Any) -> Any:
        decoder = nnx.merge(graph, params)
        outputs, words, log_probs = decoder.unroll_chosen(
            lambda logits, place: draw_words(logits.at[..., :2].set(-jnp.inf).at[..., 2].add(2.0), place),
            *decoder.start(regions, M, **options),
            uniform,
            dropout_keys=keys,
        )
        return outputs.hidden, (words, log_probs)

    hidden, transpose, (words, log_probs) = jax.vjp(chosen, params, has_aux=True)
    lengths = np.asarray((words != 0).sum(-1))
    assert lengths.min() < lengths.max() <= T
    np.testing.assert_array_equal(np.asarray(log_probs) != 0, np.asarray(words) != 0)
    counted = (words != 0)[..., None]

    def forced(params: Any) -> Any:
        decoder = nnx.merge(graph, params)
        read = jnp.concatenate([jnp.full_like(words[..., :1], BOS), words[..., :-1]], axis=-1)
        return decoder.unroll(read, *decoder.start(regions, M, **options), dropout_keys=keys).hidden * counted

    expected, expected_transpose = jax.vjp(forced, params)
    np.testing.assert_allclose(hidden * counted, expected, atol=1e-5)
    direction = jax.random.normal(jax.random.key(2), hidden.shape) * counted
    got, wanted = transpose(direction)[0], expected_transpose(direction)[0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
