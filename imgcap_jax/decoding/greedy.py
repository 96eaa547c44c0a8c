"""Greedy decoding: the most likely word at each step."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn
from imgcap_jax.decoding.rollout import rollout
from imgcap_jax.decoding.rules import Rule


def greedy(step: StepFn, carry: Any, *, max_steps: int, rules: Sequence[Rule] = ()) -> Decoded:
    """Takes the most likely word that the rules allow, until eos. If words tie, the lowest id is taken.

    Args:
        step: (carry, tokens int32 [B,M]) -> (carry, logits [B,M,V]).
        carry: pytree with leaves [B,M,...]. M is 1, except if the sequences of an image start from different carries.
        max_steps: T, the maximum caption length, including eos. Longer captions are cut there.
        rules: logit rules, applied in order.

    Returns:
        Decoded with [B,M] captions. `score` is the sum of the log-probabilities after the rules. It equals `log_prob`
        if the rules only forbid words.

    Raises:
        UserError: max_steps is below 1.
        ValueError: the leaves of the carry do not all start with the same [B,M].
    """

    def likeliest(ruled: Array, t: Array) -> tuple[Array, Array]:
        return jnp.argmax(ruled, axis=-1), jnp.max(ruled, axis=-1)  # [B,M] both

    return rollout(step, carry, likeliest, max_steps=max_steps, rules=rules)
