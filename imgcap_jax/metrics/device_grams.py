"""Counts of n-grams of token ids on the device, for the rewards of self-critical training.

N-grams are compared word by word instead of hashed, so that different n-grams never collide. Captions have about twenty
words, and comparing all pairs of positions costs less than sorting.
"""

import jax.numpy as jnp
from jax import Array

from imgcap_jax.special_tokens import PAD


class Grams:
    """The n-grams of captions int32 [...,T], padded with pad. Each n-gram is identified by its first position."""

    def __init__(self, tokens: Array) -> None:
        self.tokens = tokens
        self.length = (tokens != PAD).sum(-1)  # [...]

    def begins(self, order: int) -> Array:
        """Whether an n-gram of ``order`` + 1 words begins at each position, bool [...,T]."""
        place = jnp.arange(self.tokens.shape[-1])
        return place < (self.length - order)[..., None]

    def counts(self, other: "Grams", order: int) -> Array:
        """Counts how often the n-gram at each position of these captions occurs in ``other``, float32 [...,T].

        An n-gram has ``order`` + 1 words. Leading axes are broadcast. The count is 0 where no n-gram begins.
        """
        same = self.tokens[..., :, None] == other.tokens[..., None, :]  # [...,T,T of other]
        equal = same
        for further in range(1, order + 1):
            equal = equal & jnp.roll(same, (-further, -further), (-2, -1))
        equal = equal & self.begins(order)[..., :, None] & other.begins(order)[..., None, :]
        return equal.sum(-1).astype(jnp.float32)
