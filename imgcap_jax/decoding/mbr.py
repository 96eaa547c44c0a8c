"""Minimum Bayes risk (MBR): searches and samples, ranked by how much their captions agree (``metrics/agreement.py``).

Letters: B images, K candidates per image, T caption length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.decoding.decoded import Decoded
from imgcap_jax.decoding.rules import FORBIDDEN
from imgcap_jax.decoding.search import take_rows
from imgcap_jax.metrics.agreement import Utility, expected_utility
from imgcap_jax.metrics.cider_device import DocumentFrequencies
from imgcap_jax.models.neighbours import Neighbours
from imgcap_jax.special_tokens import PAD


class Knowledge(NamedTuple):
    """What ``rerank`` knows of the training data."""

    frequencies: DocumentFrequencies
    neighbours: Neighbours | None = None


def candidate_probabilities(found: Decoded, *, drawn: bool, temperature: float) -> Array:
    """The probabilities [B,K] of the candidates of one search, or of one model's samples.

    Args:
        found: the candidates.
        drawn: whether they are samples, which all count alike: likely captions are drawn more often.
        temperature: the probabilities of a search are the softmax of its scores divided by this.
    """
    exists = found.tokens.any(-1)  # [B,K]
    score = jnp.zeros_like(found.score) if drawn else found.score / temperature
    return jax.nn.softmax(jnp.where(exists, score, FORBIDDEN), axis=-1)


def rerank(found: Decoded, references: Array, probabilities: Array, utility: Utility) -> Decoded:
    """The candidates by expected utility, best first, with this utility as their score.

    Repetitions of a caption, which several models or samples can have, are moved to the end and emptied.

    Args:
        found: the candidates [B,K].
        references: int32 [B,R,S]; see ``expected_utility``.
        probabilities: float32 [B,R]; see ``expected_utility``.
        utility: see ``expected_utility``.
    """
    gain = expected_utility(found.tokens, references, probabilities, utility)
    same = (found.tokens[:, :, None] == found.tokens[:, None]).all(-1)  # [B,K,K]
    first = jnp.argmax(same, axis=-1) == jnp.arange(same.shape[1])  # [B,K]
    kept = first & found.tokens.any(-1)
    score = jnp.where(kept, gain, FORBIDDEN)
    order = jnp.argsort(-score, axis=-1, stable=True)
    tokens, word_log_probs, log_prob, score, kept = take_rows(
        (found.tokens, found.word_log_probs, found.log_prob, score, kept), order
    )
    return Decoded(
        tokens=jnp.where(kept[..., None], tokens, PAD),
        word_log_probs=jnp.where(kept[..., None], word_log_probs, 0.0),
        log_prob=jnp.where(kept, log_prob, FORBIDDEN),
        score=score,
        steps=found.steps,
    )


def joined(searches: Sequence[Decoded]) -> Decoded:
    """The captions of several searches of the same images as one result."""
    tokens, word_log_probs, log_prob, score = (
        jnp.concatenate([getattr(found, name) for found in searches], axis=1)
        for name in ("tokens", "word_log_probs", "log_prob", "score")
    )
    steps = jnp.stack([found.steps for found in searches]).sum()
    return Decoded(tokens, word_log_probs, log_prob, score, steps)
