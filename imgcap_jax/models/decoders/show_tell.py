"""Show and Tell (Vinyals et al. 2015, https://arxiv.org/abs/1411.4555): the image is the LSTM's first input."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.models.decoders.contract import CommonSettings, Decoder, StepOutput, spread
from imgcap_jax.models.layers import Embed, LSTMCell, Projection, WordLogits, dropout, masked_mean


@dataclass(frozen=True, kw_only=True)
class ShowTell(CommonSettings):
    """Settings of a Show and Tell decoder; the defaults are the paper's sizes."""

    dropout: float = 0.3

    def build(self, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "ShowTellDecoder":
        """Makes the decoder for regions [B,N,region_size].

        Raises:
            UserError: the embedding is tied, but its size is not the hidden size.
        """
        self.check_tied(self.hidden_size)
        return ShowTellDecoder(self, region_size, vocabulary_size, dtype=dtype, rngs=rngs)


class ShowTellDecoder(Decoder):
    """Show and Tell (Vinyals et al. 2015).

    x_{-1} = W_I mean(regions); x_t = E y_t; h_t = LSTM(x_t, h_{t-1}); p_{t+1} = softmax(W h_t).
    """

    def __init__(
        self,
        config: ShowTell,
        region_size: int,
        vocabulary_size: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.rate, self.variational = config.dropout, config.variational_dropout
        self.image = Projection(region_size, config.embedding_size, dtype=dtype, rngs=rngs)
        self.embedding = Embed(vocabulary_size, config.embedding_size, dtype=dtype, rngs=rngs)
        self.lstm = LSTMCell(config.embedding_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.words = WordLogits(config.hidden_size, vocabulary_size, tied=config.tied_embedding, dtype=dtype, rngs=rngs)

    def start(
        self, regions: Array, M: int, *, steps: int, region_mask: Array | None = None, dropout_keys: Array | None = None
    ) -> tuple[tuple[()], tuple[Array, Array]]:
        image = self.image(masked_mean(regions, region_mask))  # [B,E]
        zeros = jnp.zeros((regions.shape[0], self.lstm.hidden_size), jnp.float32)
        hidden, cell = self.lstm((zeros, zeros), dropout(image, self.rate, dropout_keys))
        return (), (spread(hidden, M), spread(cell, M))

    def step(
        self,
        carry: tuple[Array, Array],
        token: Array,
        memory: tuple[()],
        *,
        dropout_keys: Array | None = None,
    ) -> tuple[tuple[Array, Array], StepOutput]:
        word = self.drop(self.embedding(token), dropout_keys, 0)  # [B,M,E]
        hidden, cell = self.lstm(self.drop_recurrent(carry, dropout_keys, 2), word)
        return (hidden, cell), StepOutput(self.drop(hidden, dropout_keys, 1), None)

    def logits(self, output: StepOutput) -> Array:
        return self.words(output.hidden, self.embedding)
