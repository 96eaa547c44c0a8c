"""Greedy decoding: the likeliest word each time."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn
from imgcap_jax.decoding.rollout import rollout
from imgcap_jax.decoding.rules import Rule


def greedy(step: StepFn, carry: Any, *, max_steps: int, rules: Sequence[Rule] = ()) -> Decoded:
    """Takes the likeliest word that the rules allow, until eos; the lowest id where words tie.

    Args:
        step: (carry, tokens int32 [B,M]) -> (carry, logits [B,M,V]).
        carry: pytree, every leaf [B,M,...]; M is 1 but for callers who start the sequences differently.
        max_steps: T, the longest caption with its eos; one that reaches it is cut there.
        rules: logit rules, applied in order.

    Returns:
        Decoded with [B,M] captions; `score` is the sum of the ruled log-probabilities (= log_prob where rules
        only forbid).

    Raises:
        UserError: max_steps < 1.
        ValueError: the carry's leaves don't lead with one [B,M].
    """

    def likeliest(ruled: Array, t: Array) -> tuple[Array, Array]:
        return jnp.argmax(ruled, axis=-1), jnp.max(ruled, axis=-1)  # [B,M] both

    return rollout(step, carry, likeliest, max_steps=max_steps, rules=rules)
