"""The decoding loop of greedy decoding and sampling, which extend each sequence by one word per step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn, parallel_shape
from imgcap_jax.decoding.limits import check_limits
from imgcap_jax.decoding.rules import Rule, apply_rules
from imgcap_jax.loops import named_loop
from imgcap_jax.special_tokens import BOS, EOS, PAD


class _State(NamedTuple):
    t: Array  # int32 []: number of words so far
    carry: Any
    last: Array  # int32 [B,M]: input of the next step
    tokens: Array  # int32 [B,M,T]
    word_log_probs: Array  # float32 [B,M,T]
    score: Array  # float32 [B,M]
    ended: Array  # bool [B,M]


def rollout(
    step: StepFn,
    carry: Any,
    choose: Callable[[Array, Array], tuple[Array, Array]],
    *,
    max_steps: int,
    rules: Sequence[Rule],
) -> Decoded:
    """Runs the decoder until every sequence has ended.

    Args:
        step: (carry, tokens int32 [B,M]) -> (carry, logits [B,M,V]).
        carry: pytree with leaves [B,M,...].
        choose: (log-probabilities after the rules, float32 [B,M,V], t []) -> (words [B,M], float32 [B,M] added to the
            score).
        max_steps: T.
        rules: logit rules, applied in order before ``choose``.

    Returns:
        Decoded with [B,M] captions. `score` is the sum of what ``choose`` returned up to and including eos.

    Raises:
        UserError: max_steps is below 1.
        ValueError: the leaves of the carry do not all start with the same [B,M].
    """
    check_limits(max_steps=max_steps)
    batch, parallel = parallel_shape(carry)

    def unfinished(s: _State) -> Array:
        return (s.t < max_steps) & ~jnp.all(s.ended)

    def advance(s: _State) -> _State:
        carry, logits = step(s.carry, s.last)  # [B,M,V]
        log_probs, ruled = apply_rules(logits, s.tokens, s.t, rules)  # [B,M,V] both
        word, gain = choose(ruled, s.t)  # [B,M] both
        word = jnp.where(s.ended, PAD, word).astype(jnp.int32)  # [B,M]
        log_prob = jnp.take_along_axis(log_probs, word[..., None], axis=-1)[..., 0]  # [B,M]
        return _State(
            t=s.t + 1,
            carry=carry,
            last=word,
            tokens=s.tokens.at[:, :, s.t].set(word),
            word_log_probs=s.word_log_probs.at[:, :, s.t].set(jnp.where(s.ended, 0.0, log_prob)),
            score=s.score + jnp.where(s.ended, 0.0, gain),
            ended=s.ended | (word == EOS),
        )

    with named_loop("search"):
        end = jax.lax.while_loop(
            unfinished,
            advance,
            _State(
                t=jnp.int32(0),
                carry=carry,
                last=jnp.full((batch, parallel), BOS, jnp.int32),
                tokens=jnp.full((batch, parallel, max_steps), PAD, jnp.int32),
                word_log_probs=jnp.zeros((batch, parallel, max_steps), jnp.float32),
                score=jnp.zeros((batch, parallel), jnp.float32),
                ended=jnp.zeros((batch, parallel), bool),
            ),
        )
    return Decoded(end.tokens, end.word_log_probs, jnp.sum(end.word_log_probs, axis=-1), end.score, end.t)
