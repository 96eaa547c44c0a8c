"""Losses over captions, as sums over words, so that any number of devices can add them up."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.special_tokens import PAD

CHUNK = 768
"""Words that are scored at a time, at most."""


class LossSums(NamedTuple):
    """objective: what is differentiated; log_likelihood: of the true words, without smoothing; words: their count."""

    objective: Array
    log_likelihood: Array
    words: Array


def caption_loss(
    score_words: Callable[[Array], Array],
    hidden: Array,
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
        score_words: hidden [n,F] -> logits [n,V] (the decoder's ``logits``).
        hidden: [B,M,T-1,F], what the decoder gave after reading tokens[..., :-1].
        tokens: [B,M,T]; the targets are tokens[..., 1:], ``pad`` counts for nothing.
        weight: [B], 0 for rows that only fill the batch.
        label_smoothing: share of the target's mass spread evenly over V (Szegedy et al. 2016).
        attention: [B,M,T-1,N] weights, for the penalty.
        attention_penalty: lambda of the doubly stochastic penalty, added to each caption's negative
            log-likelihood: lambda * sum_i (1 - sum_t alpha_ti)^2 (Xu et al. 2015, equation 14).
        region_mask: [B,N] regions that exist, which alone are to be looked at; None: all.
    """
    targets = tokens[..., 1:]
    counted = (targets != PAD) * weight[:, None, None].astype(jnp.float32)  # [B,M,T-1]
    log_likelihood, objective = packed_cross_entropy(score_words, hidden, targets, counted, label_smoothing)
    if attention is not None and attention_penalty:
        seen = (attention * counted[..., None]).sum(axis=2)  # [B,M,N]
        has_words = counted.max(axis=2)  # [B,M]
        unseen = jnp.square(1.0 - seen)
        if region_mask is not None:
            unseen = unseen * region_mask[:, None]
        objective += attention_penalty * (unseen.sum(axis=-1) * has_words).sum()
    return LossSums(objective, log_likelihood, counted.sum())


def packed_cross_entropy(
    score_words: Callable[[Array], Array], hidden: Array, targets: Array, counted: Array, label_smoothing: float
) -> tuple[Array, Array]:
    """Weighted sums of the words' log-likelihoods and of their smoothed cross-entropies.

    The vocabulary layer is most of a step's products, its logits most of a step's memory, and half of the places
    of a batch of captions are pad. So the words that count are put together and scored a chunk at a time, as many
    chunks as the batch at hand has words for, and the gradient is computed while a chunk's logits are there: they are
    neither kept nor computed again.

    Args:
        score_words: hidden [n,F] -> logits [n,V]; may close over arrays of floats, which are differentiated too, and
            over no others.
        hidden: [...,F].
        targets: int32 [...], the true words.
        counted: float32 [...], each word's weight; those with weight 0 are not scored.
        label_smoothing: share of the target's mass that is spread evenly over V.

    Returns:
        (log_likelihood, objective), float32 [] both. Only the objective has a gradient, by ``hidden`` and by what
        ``score_words`` closes over, but not by ``counted``; at label_smoothing 0 it is the negative log-likelihood.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    # Even parts, so that the last chunk of a batch without pad isn't mostly empty.
    chunk = -(-flat.shape[0] // -(-flat.shape[0] // CHUNK))
    converted, closed_over = jax.closure_convert(score_words, flat[:chunk])
    log_likelihood, objective = _packed(
        converted, label_smoothing, chunk, closed_over, flat, targets.reshape(-1), counted.reshape(-1)
    )
    return jax.lax.stop_gradient(log_likelihood), objective


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _packed(
    score: Callable[..., Array],
    smoothing: float,
    chunk: int,
    closed_over: list[Array],
    hidden: Array,
    targets: Array,
    counted: Array,
) -> tuple[Array, Array]:
    def add(sums: tuple[Array, Array], part: tuple[Array, Array, Array], _: Array) -> tuple[Array, Array]:
        h, target, weight = part
        log_likelihood, objective, _ = _chunk_sums(score(h, *closed_over), target, weight, smoothing)
        return sums[0] + log_likelihood, sums[1] + objective

    zero = jnp.zeros((), jnp.float32)
    return _over_chunks(add, (zero, zero), chunk, hidden, targets, counted)[0]


def _packed_forward(
    score: Callable[..., Array],
    smoothing: float,
    chunk: int,
    closed_over: list[Array],
    hidden: Array,
    targets: Array,
    counted: Array,
) -> tuple[tuple[Array, Array], tuple[Any, Array]]:
    def add(state: Any, part: tuple[Array, Array, Array], start: Array) -> Any:
        (log_likelihood, objective), gradients, rows = state
        h, target, weight = part
        logits, transpose = jax.vjp(lambda h, consts: score(h, *consts), h, closed_over)
        more_likelihood, more_objective, by_logits = _chunk_sums(logits, target, weight, smoothing)
        by_hidden, more = transpose(by_logits.astype(logits.dtype))
        rows = jax.lax.dynamic_update_slice_in_dim(rows, by_hidden, start, axis=0)
        sums = log_likelihood + more_likelihood, objective + more_objective
        return sums, jax.tree.map(jnp.add, gradients, more), rows

    zero = jnp.zeros((), jnp.float32)
    padded = -(-hidden.shape[0] // chunk) * chunk
    rows = jnp.zeros((padded, hidden.shape[1]), hidden.dtype)
    first = (zero, zero), jax.tree.map(jnp.zeros_like, closed_over), rows
    (sums, gradients, rows), order = _over_chunks(add, first, chunk, hidden, targets, counted)
    by_hidden = jnp.zeros_like(hidden).at[order].set(rows, mode="drop", unique_indices=True)
    return sums, (gradients, by_hidden)


def _packed_backward(
    score: Callable[..., Array], smoothing: float, chunk: int, kept: tuple[Any, Array], by_sums: tuple[Array, Array]
) -> tuple[Any, Array, None, None]:
    _, by_objective = by_sums
    gradients, by_hidden = jax.tree.map(lambda leaf: (leaf * by_objective).astype(leaf.dtype), kept)
    return gradients, by_hidden, None, None


_packed.defvjp(_packed_forward, _packed_backward)


def _over_chunks(
    add: Callable[[Any, tuple[Array, Array, Array], Array], Any],
    state: Any,
    chunk: int,
    hidden: Array,
    targets: Array,
    counted: Array,
) -> tuple[Any, Array]:
    """Folds ``add`` over chunks of the words that count; returns also the places that the chunks' rows have."""
    count = jnp.sum(counted != 0)
    order = jnp.argsort(counted == 0, stable=True)  # those that count come first
    order = jnp.pad(order, (0, -len(order) % chunk), constant_values=len(order))  # beyond the end: read as 0

    def body(loop: tuple[Array, Any]) -> tuple[Array, Any]:
        start, state = loop
        places = jax.lax.dynamic_slice_in_dim(order, start, chunk)
        part = tuple(leaf.at[places].get(mode="fill", fill_value=0) for leaf in (hidden, targets, counted))
        return start + chunk, add(state, part, start)  # type: ignore[arg-type]

    _, state = jax.lax.while_loop(lambda loop: loop[0] < count, body, (jnp.zeros_like(count), state))
    return state, order


def _chunk_sums(logits: Array, targets: Array, weight: Array, smoothing: float) -> tuple[Array, Array, Array]:
    """Sums of log-likelihood and objective of logits [n,V], and the objective's gradient by them."""
    logits = logits.astype(jnp.float32)
    log_total = jax.nn.logsumexp(logits, axis=-1)  # [n]
    true = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - log_total
    smoothed = (1.0 - smoothing) * true + smoothing * (logits.mean(axis=-1) - log_total)
    wanted = jnp.where(jnp.arange(logits.shape[-1]) == targets[:, None], 1.0 - smoothing, 0.0)
    wanted = wanted + smoothing / logits.shape[-1]  # [n,V]
    by_logits = weight[:, None] * (jnp.exp(logits - log_total[:, None]) - wanted)
    return (true * weight).sum(), -(smoothed * weight).sum(), by_logits
