"""N-grams of token ids on the device, compared word by word: what the rewards of self-critical training count.

Never hashed, so that none is taken for another: captions have some twenty words, and comparing all pairs of places
costs less than sorting.
"""

import jax.numpy as jnp
from jax import Array

from imgcap_jax.special_tokens import PAD


class Grams:
    """Captions int32 [...,T], filled up with pad, as places where n-grams begin."""

    def __init__(self, tokens: Array) -> None:
        self.tokens = tokens
        self.length = (tokens != PAD).sum(-1)  # [...]

    def begins(self, order: int) -> Array:
        """Where an n-gram of `order` + 1 words begins, bool [...,T]."""
        place = jnp.arange(self.tokens.shape[-1])
        return place < (self.length - order)[..., None]

    def counts(self, other: "Grams", order: int) -> Array:
        """How often the n-gram that begins at each place of these captions occurs in others, float32 [...,T].

        Leading axes are broadcast; where nothing begins, the count is 0.
        """
        same = self.tokens[..., :, None] == other.tokens[..., None, :]  # [...,T,T of the others]
        equal = same
        for further in range(1, order + 1):
            equal = equal & jnp.roll(same, (-further, -further), (-2, -1))
        equal = equal & self.begins(order)[..., :, None] & other.begins(order)[..., None, :]
        return equal.sum(-1).astype(jnp.float32)
