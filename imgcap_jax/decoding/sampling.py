"""Sampling of captions."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn, parallel_shape
from imgcap_jax.decoding.limits import check_limits
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
    """Draws M captions per image, word by word.

    The samples of an image depend only on its key. They do not depend on the other images of the batch or on the
    distribution of the batch over devices. A larger M does not change the first samples.

    Args:
        step: (carry, tokens int32 [B,M]) -> (carry, logits [B,M,V]).
        carry: pytree with leaves [B,M,...].
        keys: [B] PRNG keys (or uint32 [B,2]), one per image.
        max_steps: T, the maximum caption length, including eos.
        temperature: the divisor of the logits. It is applied before the rules, as in nucleus sampling.
        rules: logit rules (TopK, TopP ...), applied in order.

    Returns:
        Decoded with [B,M] captions in drawing order. `score` is the log-probability with which each caption was drawn
        (after temperature and rules, normalised). `log_prob` is the model's log-probability before both.

    Raises:
        UserError: temperature is below 0.01, or max_steps is below 1.
        ValueError: the number of keys is not B, or the leaves of the carry do not all start with the same [B,M].
    """
    check_limits(max_steps=max_steps)
    batch, parallel = parallel_shape(carry)
    if keys.shape[0] != batch:
        raise ValueError(f"{keys.shape[0]} keys for {batch} images; there must be one key per image")
    if temperature != 1.0:
        rules = (Temperature(temperature), *rules)
    uniform = uniform_numbers(keys, parallel, max_steps)  # [B,M,T]
    return rollout(step, carry, lambda ruled, t: draw_words(ruled, uniform[:, :, t]), max_steps=max_steps, rules=rules)


def uniform_numbers(keys: Array, parallel: int, max_steps: int) -> Array:
    """The random numbers [B,M,T] from which captions are drawn, from one key [B] per image.

    JAX's generator returns the same numbers for the first captions, independent of the number of captions that follow.
    """
    return jax.vmap(lambda key: jax.random.uniform(key, (parallel, max_steps)))(keys)
