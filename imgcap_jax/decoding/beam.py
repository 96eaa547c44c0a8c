"""Beam search in one compiled loop that stops as soon as nothing better can come."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn, check_steps, parallel_shape
from imgcap_jax.decoding.rules import FORBIDDEN, LOWEST, Rule, apply_rules
from imgcap_jax.errors import UserError
from imgcap_jax.special_tokens import BOS, EOS, PAD


class _Hypotheses(NamedTuple):
    """K partial or whole captions an image; an empty slot has score FORBIDDEN."""

    score: Array  # float32 [B,K]: live ones: sum of ruled log-probabilities; finished ones: what is ranked
    tokens: Array  # int32 [B,K,T]
    word_log_probs: Array  # float32 [B,K,T]


class _State(NamedTuple):
    t: Array  # int32 []: words that each live hypothesis has
    carry: Any  # pytree of [B,K,...], of the live hypotheses
    live: _Hypotheses
    finished: _Hypotheses  # best first


def beam_search(
    step: StepFn,
    carry: Any,
    *,
    beam: int,
    max_steps: int,
    length_norm: float = 0.0,
    rules: Sequence[Rule] = (),
) -> Decoded:
    """Finds K captions an image with (nearly) the highest score.

    Each step takes the K best continuations of the live hypotheses, eos included. Those that end go to the
    finished set, which keeps the K best by score; the rest stay live. Hypotheses still unfinished at T
    compete too, without eos. So beam 1 is greedy decoding, whatever the length norm, and a beam of at least
    all prefixes and their continuations is exhaustive search. Where scores tie, the lower beam, then the
    lower id, goes first.

    The loop ends when for every image no live hypothesis can still beat the worst of K finished ones, which
    never changes the result: log-probabilities only fall, and no length helps more than T does, so sum /
    T**length_norm bounds whatever a live hypothesis may become.

    Args:
        step: (carry, tokens int32 [B,K]) -> (carry, logits [B,K,V]).
        carry: pytree, every leaf [B,K,...], the K rows of an image equal.
        beam: K, with which the carry was started.
        max_steps: T, the longest caption with its eos.
        length_norm: score = log-probability / length**length_norm, the length counting eos; 0: none, 1: the
            average.
        rules: logit rules, applied in order. Ranking goes by what they leave of the log-probabilities (not
            normalised again), `log_prob` and `word_log_probs` are the model's own.

    Returns:
        Decoded with [B,K] captions, best first; `score` is what was ranked, length norm included.

    Raises:
        UserError: beam or max_steps below 1, or a negative length_norm.
        ValueError: the carry's leaves don't lead with one [B,K].
    """
    check_steps(max_steps)
    if beam < 1:
        raise UserError(f"decoding: beam is {beam}; give at least 1")
    if length_norm < 0:
        raise UserError(f"decoding: length_norm is {length_norm}; give 0 (none) or more")
    batch, parallel = parallel_shape(carry)
    if parallel != beam:
        raise ValueError(f"the carry was started with {parallel} sequences an image, the beam is {beam}")

    # length**length_norm of lengths 1 to T. A table, for a power that is computed in two places may be
    # rounded in two ways, and then the early exit would no longer be exact.
    norms = jnp.asarray(np.arange(1, max_steps + 1) ** float(length_norm), jnp.float32)  # [T]

    def unfinished(s: _State) -> Array:
        return (s.t < max_steps) & ~_decided(s.live.score, s.finished.score, norms[-1])

    def advance(s: _State) -> _State:
        previous = jnp.where(s.t == 0, BOS, s.live.tokens[:, :, s.t - 1])  # [B,K]
        carry, logits = step(s.carry, previous)  # [B,K,V]
        log_probs, ruled = apply_rules(logits, s.live.tokens, s.t, rules)  # [B,K,V] both
        vocabulary = logits.shape[-1]

        # All continuations of an image's hypotheses compete in one row.
        totals = (s.live.score[..., None] + ruled).reshape(batch, beam * vocabulary)  # [B,K*V]
        total, index = jax.lax.top_k(totals, beam)  # [B,K] both
        parent, word = index // vocabulary, index % vocabulary  # [B,K] both
        log_prob = jnp.take_along_axis(log_probs.reshape(batch, -1), index, axis=-1)  # [B,K]

        # Fewer than K continuations exist in the first steps of a wide beam and once hypotheses have ended:
        # what top_k adds then descends from an empty slot or a forbidden word.
        exists = ~(total < LOWEST)  # [B,K]; so put, a NaN of a broken model stays visible
        ended = exists & (word == EOS)  # [B,K]
        tokens, word_log_probs = _take((s.live.tokens, s.live.word_log_probs), parent)  # [B,K,T] both
        tokens = tokens.at[:, :, s.t].set(word)  # [B,K,T]
        word_log_probs = word_log_probs.at[:, :, s.t].set(log_prob)  # [B,K,T]

        ranked = jnp.where(ended, total / norms[s.t], FORBIDDEN)  # [B,K]
        return _State(
            t=s.t + 1,
            carry=_take(carry, parent),
            live=_Hypotheses(jnp.where(exists & ~ended, total, FORBIDDEN), tokens, word_log_probs),
            finished=_best(s.finished, _Hypotheses(ranked, tokens, word_log_probs)),
        )

    nothing = _Hypotheses(
        score=jnp.full((batch, beam), FORBIDDEN, jnp.float32),
        tokens=jnp.full((batch, beam, max_steps), PAD, jnp.int32),
        word_log_probs=jnp.zeros((batch, beam, max_steps), jnp.float32),
    )
    # The K rows start alike: only the first is live, or the same caption would fill the beam K times.
    live = nothing._replace(score=nothing.score.at[:, 0].set(0.0))
    end = jax.lax.while_loop(unfinished, advance, _State(jnp.int32(0), carry, live, nothing))

    # What is live after an early exit can't enter; after the last step it competes as it is, without eos.
    left = jnp.where(end.live.score < LOWEST, FORBIDDEN, end.live.score / norms[end.t - 1])  # [B,K]
    best = _best(end.finished, end.live._replace(score=left))
    exists = ~(best.score < LOWEST)  # [B,K]
    return Decoded(
        tokens=jnp.where(exists[..., None], best.tokens, PAD),
        word_log_probs=jnp.where(exists[..., None], best.word_log_probs, 0.0),
        log_prob=jnp.where(exists, jnp.sum(best.word_log_probs, axis=-1), FORBIDDEN),
        score=best.score,
        steps=end.t,
    )


def _decided(live: Array, finished: Array, largest_norm: Array) -> Array:
    """Whether no live score [B,K] can beat the worst finished one [B,K] of its image any more: bool []."""
    hope = jnp.max(live, axis=-1)  # [B]
    # A tie doesn't enter: `_best` prefers what was finished earlier.
    beaten = hope / largest_norm <= jnp.min(finished, axis=-1)  # [B]
    return jnp.all(beaten | (hope < LOWEST))


def _best(finished: _Hypotheses, new: _Hypotheses) -> _Hypotheses:
    """The K best of two sets of K, best first; the first set's where scores tie."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), finished, new)  # [B,2K,...]
    _, index = jax.lax.top_k(both.score, new.score.shape[1])  # [B,K]
    return _take(both, index)


def _take(tree: Any, index: Array) -> Any:
    """Reorders axis 1 of every leaf [B,M,...] by index [B,K], each image by its own row."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda row, i: row[i])(leaf, index), tree)
