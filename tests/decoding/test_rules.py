"""Logit rules, compared with plain Python, and their order and limits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcap_jax.decoding import (
    ForbidBadEnding,
    ForbidRepeatedWords,
    ForcedPrefix,
    MinLength,
    NoRepeatNgram,
    SuppressUnk,
    Temperature,
    TopK,
    TopP,
)
from imgcap_jax.decoding.rules import FORBIDDEN, apply_rules
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.degeneration import repeated_words
from imgcap_jax.metrics.degeneration_device import FunctionWords
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK

B, M, T, V = 2, 3, 6, 7


@functools.cache
def jitted(rule: Any) -> Any:
    return jax.jit(rule)


@st.composite
def situations(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """(logits [B,M,V], tokens [B,M,T] padded from t, t). The tokens are drawn from three words, so that they repeat."""
    t = draw(st.integers(0, T - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = np.full((B, M, T), PAD, np.int32)
    tokens[..., :t] = rng.integers(UNK, UNK + 3, (B, M, t))
    return rng.normal(0, 2, (B, M, V)).astype(np.float32), tokens, t


def banned_by_ngram(n: int, words: list[int]) -> set[int]:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return {w for w in range(V) if len(words) >= n - 1 and tuple([*words, w][-n:]) in grams}


def banned_by_repetition(words: list[int], function_words: dict[int, str]) -> set[int]:
    """The words that would be repeated words, from the text of each continued caption."""

    def count(ids: list[int]) -> int:
        return repeated_words([function_words.get(word, str(word)) for word in ids])

    return {word for word in range(EOS + 1, V) if count([*words, word]) > count(words)}


def nucleus(logits: np.ndarray, p: float) -> set[int]:
    probs = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    kept: set[int] = set()
    for word in np.argsort(-probs):
        if sum(probs[w] for w in kept) >= p:
            break
        kept.add(int(word))
    return kept


BANS = {
    NoRepeatNgram(1): lambda logits, words: banned_by_ngram(1, words),
    NoRepeatNgram(2): lambda logits, words: banned_by_ngram(2, words),
    NoRepeatNgram(3): lambda logits, words: banned_by_ngram(3, words),
    NoRepeatNgram(T + 1): lambda logits, words: set(),
    MinLength(0): lambda logits, words: set(),
    MinLength(3): lambda logits, words: {EOS} if len(words) < 3 else set(),
    SuppressUnk(): lambda logits, words: {UNK},
    ForbidBadEnding(()): lambda logits, words: set(),
    ForbidBadEnding((4, 6)): lambda logits, words: (
        ({EOS} if words and words[-1] in (4, 6) else set()) | ({4, 6} if len(words) == T - 1 else set())
    ),
    ForbidRepeatedWords(FunctionWords(())): lambda logits, words: banned_by_repetition(words, {}),
    ForbidRepeatedWords(FunctionWords((4,))): lambda logits, words: banned_by_repetition(words, {4: "a"}),
    ForbidRepeatedWords(FunctionWords((4,), (4,))): lambda logits, words: banned_by_repetition(words, {4: "and"}),
    TopK(1): lambda logits, words: set(range(V)) - {int(logits.argmax())},
    TopK(3): lambda logits, words: set(np.argsort(-logits)[3:].tolist()),
    TopK(V + 5): lambda logits, words: set(),
    TopP(0.01): lambda logits, words: set(range(V)) - {int(logits.argmax())},
    TopP(0.7): lambda logits, words: set(range(V)) - nucleus(logits, 0.7),
    TopP(0.97): lambda logits, words: set(range(V)) - nucleus(logits, 0.97),
    TopP(1.0): lambda logits, words: set(),
}


@pytest.mark.parametrize("rule", BANS, ids=str)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(situation=situations())
def test_rule_forbids_exactly_the_expected_words(rule: Any, situation: tuple[np.ndarray, np.ndarray, int]) -> None:
    logits, tokens, t = situation
    ruled = np.asarray(jitted(rule)(logits, tokens, np.int32(t)))
    for b, m in np.ndindex(B, M):
        expected = logits[b, m].copy()
        expected[list(BANS[rule](logits[b, m], tokens[b, m, :t].tolist()))] = FORBIDDEN
        np.testing.assert_array_equal(ruled[b, m], expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(situation=situations())
def test_prefix_overrides_other_rules_which_apply_after_it(
    situation: tuple[np.ndarray, np.ndarray, int],
) -> None:
    logits, tokens, t = situation
    prefix = (4, 4, UNK)  # repeats a word and contains unk
    rule = ForcedPrefix(prefix, (NoRepeatNgram(1), SuppressUnk(), MinLength(T)))
    ruled = np.asarray(jitted(rule)(logits, tokens, np.int32(t)))
    for b, m in np.ndindex(B, M):
        expected = logits[b, m].copy()
        if t < len(prefix):
            expected[[w for w in range(V) if w != prefix[t]]] = FORBIDDEN
        else:
            expected[list(banned_by_ngram(1, tokens[b, m, :t].tolist()) | {UNK, EOS})] = FORBIDDEN
        np.testing.assert_array_equal(ruled[b, m], expected)


def test_temperature_divides_logits_and_keeps_forbidden_words_forbidden() -> None:
    logits = jnp.array([[[-1.0, FORBIDDEN, -3.0]]])
    tokens = jnp.zeros((1, 1, T), jnp.int32)
    for value in (0.01, 0.5, 100.0):
        ruled = Temperature(value)(logits, tokens, jnp.int32(0))
        np.testing.assert_allclose(ruled, [[[-1 / value, FORBIDDEN, -3 / value]]], rtol=1e-6)


def test_rules_apply_in_order_to_normalised_log_probabilities() -> None:
    logits = jnp.array([[[90.0, 90.0, 1.0, 9.0, 2.0, 3.0, 0.0]]])
    tokens = jnp.zeros((1, 1, T), jnp.int32)
    own = np.asarray(jax.nn.log_softmax(logits))[0, 0]

    log_probs, ruled = apply_rules(logits, tokens, jnp.int32(0), (SuppressUnk(), TopK(2)))
    np.testing.assert_allclose(log_probs[0, 0], own, rtol=1e-6)
    # pad and bos have the highest logits, but top-k does not count them. The result is not normalised.
    expected = [FORBIDDEN, FORBIDDEN, FORBIDDEN, FORBIDDEN, own[4], own[5], FORBIDDEN]
    np.testing.assert_allclose(ruled[0, 0], expected, rtol=1e-6)

    _, other_order = apply_rules(logits, tokens, jnp.int32(0), (TopK(2), SuppressUnk()))
    assert set(np.flatnonzero(np.asarray(other_order)[0, 0] > FORBIDDEN)) == {5}


def test_rules_cannot_allow_pad_or_bos_and_eos_remains_if_all_words_are_forbidden() -> None:
    def only_pad(logits: jax.Array, tokens: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.full_like(logits, -jnp.inf).at[..., PAD].set(0.0)

    logits = jnp.array([[[5.0, 5.0, -1.0, 9.0, 2.0, 3.0, 0.0]]])
    log_probs, ruled = apply_rules(logits, jnp.zeros((1, 1, T), jnp.int32), jnp.int32(0), (only_pad,))
    expected = np.full(V, FORBIDDEN, np.float32)
    expected[EOS] = log_probs[0, 0, EOS]
    np.testing.assert_array_equal(ruled[0, 0], expected)
    assert np.all(np.asarray(ruled)[..., [PAD, BOS]] == FORBIDDEN)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoRepeatNgram(0),
        lambda: ForcedPrefix((4, EOS)),
        lambda: MinLength(-1),
        lambda: Temperature(0.0),
        lambda: Temperature(float("nan")),
        lambda: TopK(0),
        lambda: TopP(0.0),
        lambda: TopP(1.1),
    ],
)
def test_invalid_rules_raise_a_one_line_error(make: Any) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        make()
