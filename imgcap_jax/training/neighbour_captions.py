"""Captions of similar training photos as references for the reward of self-critical training.

Letters: B images per batch, I training photos, R captions per photo at most, C captions, K captions of a photo's
neighbours at most, S caption length with eos.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.metrics.cider_device import DeviceReferences, DocumentFrequencies, reference_norms, with_norms
from imgcap_jax.models.neighbours import Neighbours, nearest_to_training_photos
from imgcap_jax.special_tokens import EOS, PAD

_COMPARED = 512  # photos that are compared with all photos at a time


class NeighbourCaptions(NamedTuple):
    """The captions of the neighbours of each training photo.

    Attributes:
        tokens: the captions of all photos, int32 [C,S].
        norms: their tf-idf norms, float32 [C,ORDERS].
        rows: int32 [I,K], the captions of each photo's neighbours; after the last one, any.
        counts: float32 [I], the number of these captions.
    """

    tokens: Array
    norms: Array
    rows: Array
    counts: Array

    def references(self, photos: Array) -> DeviceReferences:
        """The captions of the neighbours of these training photos [B], as references."""
        rows, count = self.rows[photos], self.counts[photos]
        real = (jnp.arange(rows.shape[1]) < count[:, None])[..., None]
        tokens, norms = jnp.where(real, self.tokens[rows], PAD), jnp.where(real, self.norms[rows], 0.0)
        return with_norms(tokens, count, norms)


def captions_of_neighbours(
    index: Neighbours, count: int, frequencies: DocumentFrequencies, *, eos: bool
) -> NeighbourCaptions:
    """The captions of the ``count`` training photos that are nearest to each training photo.

    Args:
        index: the training photos.
        count: neighbours per photo.
        frequencies: the document frequencies of the training captions.
        eos: whether the captions end with eos.

    Raises:
        UserError: there are not more training photos than neighbours.
    """
    captions = np.asarray(index.captions)  # [I,R,T]
    images, most, longest = captions.shape
    if count >= images:
        raise UserError(f"objective.neighbours is {count}; it must be below the number of training photos, {images}")
    tokens = np.zeros((images * most, longest + 1), np.int32)
    tokens[:, :longest] = captions.reshape(-1, longest)
    exists = (tokens != PAD).any(-1)
    if eos:
        ends = np.flatnonzero(exists)
        tokens[ends, (tokens[ends] != PAD).sum(-1)] = EOS

    def nearest(own: Array) -> Array:
        return nearest_to_training_photos(own[None], index, count)[1][0]

    photos = np.asarray(jax.lax.map(nearest, jnp.arange(images), batch_size=_COMPARED))  # [I,count]
    rows = (photos[..., None] * most + np.arange(most)).reshape(images, -1)  # [I,K]
    there = exists[rows]
    rows = np.take_along_axis(rows, np.argsort(~there, axis=1, kind="stable"), axis=1)  # those that exist come first
    return NeighbourCaptions(
        jnp.asarray(tokens),
        jnp.asarray(reference_norms(tokens, frequencies)),
        jnp.asarray(rows, jnp.int32),
        jnp.asarray(there.sum(1), jnp.float32),
    )
