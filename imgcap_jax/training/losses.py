"""Losses over captions, as sums over words, so that any number of devices can add them up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.special_tokens import PAD


class LossSums(NamedTuple):
    """objective: what is differentiated; log_likelihood: of the true words, without smoothing; words: their count."""

    objective: Array
    log_likelihood: Array
    words: Array


def caption_loss(
    logits: Array,
    tokens: Array,
    weight: Array,
    *,
    label_smoothing: float = 0.0,
    attention: Array | None = None,
    attention_penalty: float = 0.0,
    region_mask: Array | None = None,
) -> LossSums:
    """Cross-entropy of the next words, summed over all words of the batch.

    Args:
        logits: [B,M,T-1,V], the scores after reading tokens[..., :-1].
        tokens: [B,M,T]; the targets are tokens[..., 1:], ``pad`` counts for nothing.
        weight: [B], 0 for rows that only fill the batch.
        label_smoothing: share of the target's mass spread evenly over V (Szegedy et al. 2016).
        attention: [B,M,T-1,N] weights, for the penalty.
        attention_penalty: lambda of the doubly stochastic penalty, added to each caption's negative
            log-likelihood: lambda * sum_i (1 - sum_t alpha_ti)^2 (Xu et al. 2015, equation 14).
        region_mask: [B,N] regions that exist, which alone are to be looked at; None: all.
    """
    targets = tokens[..., 1:]
    counted = (targets != PAD) * weight[:, None, None]  # [B,M,T-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    true = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]  # [B,M,T-1]
    smoothed = (1.0 - label_smoothing) * true + label_smoothing * log_probs.mean(axis=-1)
    objective = -(smoothed * counted).sum()
    if attention is not None and attention_penalty:
        seen = (attention * counted[..., None]).sum(axis=2)  # [B,M,N]
        has_words = counted.max(axis=2)  # [B,M]
        unseen = jnp.square(1.0 - seen)
        if region_mask is not None:
            unseen = unseen * region_mask[:, None]
        objective += attention_penalty * (unseen.sum(axis=-1) * has_words).sum()
    return LossSums(objective, (true * counted).sum(), counted.sum())
