"""BLEU-4 of single captions from token ids on the device: a reward of self-critical training.

The result equals the per-caption score of ``imgcap_jax.metrics.bleu`` on the same words (Papineni et al., 2002; closest
reference length; smoothing of the official COCO tools). All arrays are float32 or int32.

Letters: B images per batch, M captions per image, R references per image, T caption length.
"""

import jax.numpy as jnp
from jax import Array

from imgcap_jax.metrics.bleu import SMALL, TINY
from imgcap_jax.metrics.cider_device import DeviceReferences, DocumentFrequencies
from imgcap_jax.metrics.corpus import ORDERS
from imgcap_jax.metrics.device_grams import Grams


def bleu_4(candidates: Array, references: DeviceReferences, frequencies: DocumentFrequencies | None = None) -> Array:
    """Computes the BLEU-4 of each caption, 0 to 1.

    Args:
        candidates: ids int32 [B,M,T], pad after the last word, with eos if it counts as a word.
        references: the references of the same images.
        frequencies: unused; all rewards have the same arguments.

    Returns:
        Scores float32 [B,M].
    """
    ours, theirs = Grams(candidates[:, :, None]), Grams(references.tokens[:, None])  # [B,M,1,T] and [B,1,R,T]
    log_precision = jnp.zeros(())
    for order in range(ORDERS):
        own = ours.counts(ours, order)[:, :, 0]  # [B,M,T]
        most = ours.counts(theirs, order).max(2)  # [B,M,T]; padding references have no n-grams
        # The sum runs over positions, so the term of an n-gram is divided by the number of its positions.
        correct = (jnp.minimum(own, most) / jnp.maximum(own, 1)).sum(-1)  # [B,M]
        guessed = jnp.maximum(ours.length[:, :, 0] - order, 0)
        # Logarithms are summed, because the product of four tiny numbers would be 0 in float32.
        log_precision += (jnp.log(correct + TINY) - jnp.log(guessed + SMALL)) / ORDERS

    length = ours.length  # [B,M,1]
    real = jnp.arange(references.tokens.shape[1]) < references.per_image[:, None, None]  # [B,1,R]
    distance = jnp.where(real, jnp.abs(theirs.length - length), jnp.iinfo(jnp.int32).max)  # [B,M,R]
    nearest = distance.min(-1, keepdims=True)
    closest = jnp.where(distance == nearest, theirs.length, jnp.iinfo(jnp.int32).max).min(-1)  # the shorter on a tie
    ratio = (length[:, :, 0] + TINY) / (closest + SMALL)
    return jnp.exp(log_precision + jnp.minimum(0, 1 - 1 / ratio))


def bleu_4_pairs(candidates: Array, references: DeviceReferences) -> Array:
    """The smoothed BLEU-4 of each caption with each reference alone, 0 to 1: [B,M,R].

    Counts of bigrams and longer n-grams are raised by one (Lin and Och 2004), because a single pair of captions rarely
    has a common 4-gram. The arguments are those of ``bleu_4``.
    """
    ours, theirs = Grams(candidates[:, :, None]), Grams(references.tokens[:, None])  # [B,M,1,T] and [B,1,R,T]
    log_precision = jnp.zeros(())
    for order in range(ORDERS):
        own, most = ours.counts(ours, order), ours.counts(theirs, order)  # [B,M,1,T], [B,M,R,T]
        correct = (jnp.minimum(own, most) / jnp.maximum(own, 1)).sum(-1)  # [B,M,R]
        guessed = jnp.maximum(ours.length - order, 1)  # [B,M,1]; a caption of two words does not gain from its length
        more = 1 if order else 0
        log_precision += (jnp.log(correct + more + TINY) - jnp.log(guessed + more)) / ORDERS
    ratio = (ours.length + TINY) / (theirs.length + SMALL)
    return jnp.exp(log_precision + jnp.minimum(0, 1 - 1 / ratio))
