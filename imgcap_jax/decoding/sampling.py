"""Sampling captions from the model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn, parallel_shape
from imgcap_jax.decoding.rollout import rollout
from imgcap_jax.decoding.rules import Rule, Temperature
from imgcap_jax.models.layers import draw_words


def sample(
    step: StepFn,
    carry: Any,
    keys: Array,
    *,
    max_steps: int,
    temperature: float = 1.0,
    rules: Sequence[Rule] = (),
) -> Decoded:
    """Draws M captions an image, word by word.

    What is drawn for an image depends on its key alone: not on the other rows of the batch, nor on how they
    are spread over devices; and more samples leave the first ones as they were.

    Args:
        step: (carry, tokens int32 [B,M]) -> (carry, logits [B,M,V]).
        carry: pytree, every leaf [B,M,...].
        keys: [B] PRNG keys (or uint32 [B,2]), one an image.
        max_steps: T, the longest caption with its eos.
        temperature: divides the logits, before the rules, as nucleus sampling has it.
        rules: logit rules (TopK, TopP ...), applied in order.

    Returns:
        Decoded with [B,M] captions as drawn, not sorted; `score` is the log-probability with which each was
        drawn (after temperature and rules, normalised), `log_prob` the model's own.

    Raises:
        UserError: temperature below 0.01, or max_steps < 1.
        ValueError: not one key an image, or the carry's leaves don't lead with one [B,M].
    """
    batch, parallel = parallel_shape(carry)
    if keys.shape[0] != batch:
        raise ValueError(f"{keys.shape[0]} keys for {batch} images: give one key an image")
    if temperature != 1.0:
        rules = (Temperature(temperature), *rules)
    # JAX's generator gives the first M rows the same numbers however many rows follow.
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (parallel, max_steps)))(keys)  # [B,M,T]

    def draw(ruled: Array, t: Array) -> tuple[Array, Array]:
        log_probs = jax.nn.log_softmax(ruled)  # [B,M,V]
        word = draw_words(jnp.exp(log_probs), uniform[:, :, t])  # [B,M]; a forbidden word has probability 0
        return word, jnp.take_along_axis(log_probs, word[..., None], axis=-1)[..., 0]  # [B,M] both

    return rollout(step, carry, draw, max_steps=max_steps, rules=rules)
