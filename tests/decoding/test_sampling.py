"""Samples, compared with the distributions that they are drawn from."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from imgcap_jax.decoding import Decoded, SuppressUnk, TopK, TopP, sample
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK

STEPS, VOCABULARY = 4, 6


@functools.cache
def sampler(toy: Any, samples: int, steps: int = STEPS, temperature: float = 1.0, rules: Any = ()) -> Any:
    @jax.jit
    def run(parameters: Any, keys: jax.Array) -> Decoded:
        step = functools.partial(toy.step, parameters)
        return sample(
            step,
            toy.start(parameters, samples),
            keys,
            max_steps=steps,
            temperature=temperature,
            rules=rules,
        )

    return lambda parameters, keys: jax.device_get(run(parameters, keys))


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def spoken(log_probs: np.ndarray, temperature: float, keep: int) -> np.ndarray:
    """The distribution over the `keep` most likely words except pad and bos."""
    logits = np.array([-np.inf if w in (PAD, BOS) else x / temperature for w, x in enumerate(log_probs)])
    logits[np.argsort(-logits)[keep:]] = -np.inf
    return softmax(logits)


@pytest.mark.parametrize(
    ("temperature", "keep", "rules"), [(1.0, VOCABULARY, ()), (0.6, VOCABULARY, ()), (1.5, 3, (TopK(3),))]
)
def test_frequencies_match_the_distribution(table: Any, temperature: float, keep: int, rules: tuple[Any, ...]) -> None:
    drawn, parameters = 20_000, table.parameters(5)
    keys = jax.random.split(jax.random.key(0), len(parameters["image"]))
    decoded = sampler(table, drawn, 2, temperature, rules)(parameters, keys)
    for image in range(len(keys)):
        expected = {}
        first = spoken(table.log_probs(parameters, image, ()), temperature, keep)
        for word in np.flatnonzero(first):
            if word == EOS:
                expected[(EOS, PAD)] = first[EOS]
                continue
            second = spoken(table.log_probs(parameters, image, (word,)), temperature, keep)
            expected |= {(word, w): first[word] * second[w] for w in np.flatnonzero(second)}
        rows, counts = np.unique(decoded.tokens[image], axis=0, return_counts=True)
        seen = {tuple(row): count for row, count in zip(rows.tolist(), counts, strict=True)}
        assert set(seen) <= set(expected)
        # Cells that are too rare for the chi-squared approximation are merged.
        common = [c for c in expected if expected[c] * drawn >= 5]
        observed = [seen.get(c, 0) for c in common]
        wanted = [expected[c] * drawn for c in common]
        if (rest := drawn - sum(wanted)) > 1:
            observed, wanted = [*observed, drawn - sum(observed)], [*wanted, rest]
        statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
        assert stats.chi2.sf(statistic, len(wanted) - 1) > 1e-3
        # The score is the log-probability with which the sample was drawn; log_prob is that of the model.
        for m in range(20):
            row = tuple(decoded.tokens[image, m].tolist())
            np.testing.assert_allclose(decoded.score[image, m], np.log(expected[row]), rtol=1e-4, atol=1e-5)
            words = row[:1] if row[0] == EOS else row
            own = sum(table.log_probs(parameters, image, words[:i])[w] for i, w in enumerate(words))
            np.testing.assert_allclose(decoded.log_prob[image, m], own, rtol=1e-4, atol=1e-5)


def test_rows_depend_only_on_their_own_key(table: Any) -> None:
    parameters = table.parameters(1)
    keys = jax.random.split(jax.random.key(7), 3)
    together = sampler(table, 6)(parameters, keys)
    order = np.array([2, 0, 1])
    shuffled = {k: v[order] if k in ("image", "eos") else v for k, v in parameters.items()}
    np.testing.assert_array_equal(together.tokens[order], sampler(table, 6)(shuffled, keys[order]).tokens)
    alone = {k: v[1:2] if k in ("image", "eos") else v for k, v in parameters.items()}
    raw = jax.random.key_data(keys[1:2])  # raw keys, uint32 [1,2], give the same samples
    np.testing.assert_array_equal(together.tokens[1:2], sampler(table, 6)(alone, raw).tokens)
    # More samples do not change the first ones, another key changes them, and the samples of an image differ.
    np.testing.assert_array_equal(together.tokens[:, :4], sampler(table, 4)(parameters, keys).tokens)
    assert np.any(together.tokens != sampler(table, 6)(parameters, jax.random.split(jax.random.key(8), 3)).tokens)
    assert max(len(np.unique(row, axis=0)) for row in together.tokens) > 3


def test_equal_images_with_different_keys_get_different_samples(table: Any) -> None:
    parameters = table.parameters(3)
    parameters["image"] = np.repeat(parameters["image"][:1], 3, axis=0)
    decoded = sampler(table, 6)(parameters, jax.random.split(jax.random.key(0), 3))
    assert np.any(decoded.tokens[0] != decoded.tokens[1])


def test_sampling_from_a_large_vocabulary_never_draws_a_forbidden_word() -> None:
    # Rounding errors of the cumulative sum over ten thousand words could select a forbidden word.
    size, allowed = 10_000, 50
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, size).astype(np.float32)

    def step(carry: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return carry, jnp.broadcast_to(jnp.asarray(logits), (*tokens.shape, size))

    @functools.partial(jax.jit, static_argnames="rules")
    def run(keys: jax.Array, rules: Any) -> Decoded:
        return sample(step, jnp.zeros((len(keys), 200)), keys, max_steps=5, rules=rules)

    keys = jax.random.split(jax.random.key(0), 2)
    speakable = [w for w in np.argsort(-logits) if w not in (PAD, BOS, UNK)]
    few = run(keys, (SuppressUnk(), TopK(allowed)))
    assert set(np.unique(few.tokens)) - {PAD} <= set(speakable[:allowed])

    everything = np.asarray(run(keys, (SuppressUnk(),)).tokens)
    words = everything[everything != PAD]
    assert not {BOS, UNK} & set(words.tolist())
    # Bins of equal probability in the order of the ids. A shifted or truncated lookup would fill them unevenly.
    probs = np.where(np.isin(np.arange(size), speakable), np.exp(logits.astype(np.float64)), 0)
    bins = np.minimum(np.cumsum(probs) / probs.sum() * 20, 19.999).astype(int)
    wanted = np.bincount(bins, probs / probs.sum() * len(words), 20)
    assert stats.chisquare(np.bincount(bins[words], minlength=20), wanted).pvalue > 1e-3


def test_nucleus_sampling_uses_the_probabilities_after_temperature(table: Any) -> None:
    # Probabilities .5 .3 .2 become .66 .24 .10 at temperature 1/2, so a nucleus of .6 contains one word.
    rows = np.full((3, STEPS, VOCABULARY, VOCABULARY), -50, np.float32)
    rows[..., [UNK, 4, 5]] = np.log([0.5, 0.3, 0.2])
    keys = jax.random.split(jax.random.key(0), 3)
    sharp = sampler(table, 60, STEPS, 0.5, (TopP(0.6),))({"image": rows}, keys)
    assert set(np.unique(sharp.tokens)) == {UNK}
    plain = sampler(table, 60, STEPS, 1.0, (TopP(0.6),))({"image": rows}, keys)
    assert set(np.unique(plain.tokens)) == {UNK, 4}


def test_loop_ends_when_all_samples_have_ended(table: Any) -> None:
    rows = np.full((3, STEPS, VOCABULARY, VOCABULARY), -50, np.float32)
    rows[:, 0, :, 4] = 0
    rows[:, 1:, :, EOS] = 0
    decoded = sampler(table, 4)({"image": rows}, jax.random.split(jax.random.key(0), 3))
    assert decoded.steps == 2
    np.testing.assert_array_equal(decoded.tokens, np.broadcast_to([4, EOS, PAD, PAD], (3, 4, STEPS)))


def test_number_of_keys_must_match_the_number_of_images(table: Any) -> None:
    parameters = table.parameters(0)
    with pytest.raises(ValueError, match="2 keys for 3 images"):
        sampler(table, 4)(parameters, jax.random.split(jax.random.key(0), 2))
