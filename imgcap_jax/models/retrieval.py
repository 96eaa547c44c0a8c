"""Words of similar training photos as further regions for the decoder.

The words that are frequent in the captions of the nearest training photos, and rare elsewhere, become vectors that the
decoder attends to like regions. Retrieved words or captions help small models (SmallCap, Ramos et al. 2023,
https://arxiv.org/abs/2209.15323; LightCap, Wang et al. 2023, https://arxiv.org/abs/2211.15820). Those papers retrieve
with CLIP; here the features of the encoder are compared.

Letters: B images, N regions, D region feature size, V vocabulary size, W retrieved words per image.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError, check_range
from imgcap_jax.models.encoders.pretrained.weights import FrozenVariable
from imgcap_jax.models.layers import Projection
from imgcap_jax.models.neighbours import Neighbours, nearest_captions
from imgcap_jax.special_tokens import UNK


@dataclass(frozen=True)
class Retrieval:
    """Settings of retrieved words. The encoder must be frozen, and its features stored."""

    neighbours: int = 20
    """Training photos whose captions are read. A training photo is not a neighbour of itself."""
    words: int = 32
    """Retrieved words per image (W)."""
    embedding_size: int = 128
    """Size of the vectors of these words, before they are projected to that of regions."""
    dropout: float = 0.3
    """Probability that a retrieved word is left out in training, so that the decoder does not rely on single words."""

    def __post_init__(self) -> None:
        for name in ("neighbours", "words", "embedding_size"):
            check_range(f"retrieval.{name}", getattr(self, name), at_least=1)
        check_range("retrieval.dropout", self.dropout, at_least=0, below=1)

    def build(
        self, neighbours: Neighbours, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> "Retriever":
        """Makes the module for regions [B,N,region_size].

        Args:
            neighbours: the training photos.
            region_size: D.
            vocabulary_size: V.
            dtype: type that matrix products are computed in.
            rngs: the stream ``params`` initialises parameters.

        Raises:
            UserError: there are not more training photos than neighbours.
        """
        photos = len(neighbours.vectors)
        if self.neighbours >= photos:
            raise UserError(
                f"retrieval.neighbours is {self.neighbours}; it must be below the number of training photos, {photos}"
            )
        return Retriever(self, neighbours, region_size, vocabulary_size, dtype=dtype, rngs=rngs)


class Retriever(nnx.Module):
    """See the module. The vector of a word is linear(relu(E w + s u)), where s is its score, relative to the highest.

    The score of a word is the number of its occurrences in the captions of the neighbours, weighted by their cosines,
    times the inverse document frequency of the word.
    """

    def __init__(
        self,
        config: Retrieval,
        neighbours: Neighbours,
        region_size: int,
        vocabulary_size: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.count, self.words, self.rate = config.neighbours, min(config.words, vocabulary_size), config.dropout
        self.index = nnx.Dict({name: FrozenVariable(value) for name, value in neighbours._asdict().items()})
        self.rarity = FrozenVariable(jnp.asarray(_rarity(np.asarray(neighbours.captions), vocabulary_size)))
        self.embedding = nnx.Embed(vocabulary_size, config.embedding_size, rngs=rngs)
        self.of_score = nnx.Param(jnp.zeros(config.embedding_size))
        self.project = Projection(config.embedding_size, region_size, dtype=dtype, rngs=rngs)

    def __call__(self, regions: Array, own: Array | None, keys: Array | None) -> tuple[Array, Array]:
        """The vectors of the retrieved words.

        Args:
            regions: float32 [B,N,D].
            own: int32 [B], see ``nearest_captions``.
            keys: [B], one PRNG key per row, for dropout; None: no dropout.

        Returns:
            Vectors float32 [B,W,D], and whether each exists, bool [B,W].
        """
        words, scores = self.retrieved(regions, own)
        there = scores > 0
        share = scores / jnp.maximum(scores[:, :1], 1e-9)
        if keys is not None:
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, (self.words,)))(keys)
            # The best word remains, so that attention has something to attend to if all regions are masked.
            there &= kept.at[:, 0].set(True)
        hidden = jax.nn.relu(self.embedding(words) + share[..., None] * self.of_score[...])
        return self.project(hidden).astype(jnp.float32), there

    def retrieved(self, regions: Array, own: Array | None) -> tuple[Array, Array]:
        """The ids of the retrieved words, int32 [B,W], best first, and their scores, float32 [B,W]; 0: no word."""
        neighbours = Neighbours(**{name: value[...] for name, value in self.index.items()})
        captions, _, cosines = nearest_captions(jax.lax.stop_gradient(regions), neighbours, self.count, own)
        weights = jnp.broadcast_to(jnp.maximum(cosines, 0.0)[..., None], captions.shape)
        rarity = self.rarity[...]

        def count(words: Array, weight: Array) -> Array:
            # Words outside of the vocabulary have ids from V on, and are dropped.
            return jnp.zeros_like(rarity).at[words.reshape(-1)].add(weight.reshape(-1), mode="drop")

        scores, words = jax.lax.top_k(jax.vmap(count)(captions, weights) * rarity, self.words)
        return words, scores


def _rarity(captions: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """The inverse document frequency float32 [V] of the words of captions [I,R,T]; 0 for pad, bos, eos and unk."""
    photos = np.repeat(np.arange(len(captions)), captions[0].size)
    words = captions.reshape(-1).astype(np.int64)
    pairs = np.unique(photos[words < vocabulary_size] * vocabulary_size + words[words < vocabulary_size])
    frequency = np.bincount(pairs % vocabulary_size, minlength=vocabulary_size)
    rarity = np.log(len(captions)) - np.log(np.maximum(frequency, 1))
    rarity[: UNK + 1] = 0
    return rarity.astype(np.float32)
