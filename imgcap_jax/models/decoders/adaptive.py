"""Adaptive attention with a visual sentinel (Lu et al. 2017, https://arxiv.org/abs/1612.01887)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.models.decoders.contract import CommonSettings, Decoder, StepOutput
from imgcap_jax.models.layers import (
    AdditiveAttention,
    Embed,
    Linear,
    LSTMCell,
    Projection,
    WordLogits,
    dropout,
    masked_mean,
)


@dataclass(frozen=True, kw_only=True)
class Adaptive(CommonSettings):
    """Settings of an adaptive-attention decoder; the defaults are the paper's sizes."""

    attention_size: int = 49
    """A. The paper calls it k; it equals the paper's number of regions."""

    def build(self, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "AdaptiveDecoder":
        """Makes the decoder for regions [B,N,region_size], which are projected to the hidden size.

        Raises:
            UserError: the embedding is tied, but its size is not the hidden size.
        """
        self.check_tied(self.hidden_size)
        return AdaptiveDecoder(self, region_size, vocabulary_size, dtype=dtype, rngs=rngs)


class AdaptiveMemory(NamedTuple):
    """What every step reads.

    regions: [B,N,H], projected.
    keys: [B,N,A], their part of the attention score.
    image: [B,1,E], the global image feature.
    region_mask: [B,N] or None.
    """

    regions: Array
    keys: Array
    image: Array
    region_mask: Array | None


class AdaptiveDecoder(Decoder):
    """Adaptive attention (Lu et al. 2017, equations 6 to 16).

    v_i = relu(W_a a_i), v_g = relu(W_b mean a), x_t = [w_t; v_g]; h_t, m_t = LSTM(x_t, h_{t-1}, m_{t-1});
    s_t = sigmoid(W_x x_t + W_h h_{t-1}) tanh(m_t); z_t = w_h^T tanh(W_v V + W_g h_t),
    alpha_t = softmax([z_t; w_h^T tanh(W_s s_t + W_g h_t)]), whose last entry is beta_t;
    c_t = sum_i alpha_ti v_i + beta_t s_t; p = softmax(W_p (c_t + h_t)). h_0 = m_0 = 0.

    ``output.attention`` contains the weights of the regions, which sum to 1 - beta_t.
    """

    def __init__(
        self, config: Adaptive, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.rate, self.variational = config.dropout, config.variational_dropout
        self.hidden_size = hidden = config.hidden_size
        inputs = 2 * config.embedding_size
        self.project = Projection(region_size, hidden, dtype=dtype, rngs=rngs)
        self.project_mean = Projection(region_size, config.embedding_size, dtype=dtype, rngs=rngs)
        self.embedding = Embed(vocabulary_size, config.embedding_size, dtype=dtype, rngs=rngs)
        self.lstm = LSTMCell(inputs, hidden, dtype=dtype, rngs=rngs)
        self.sentinel_gate = Linear(inputs + hidden, hidden, dtype=dtype, rngs=rngs)
        self.attention = AdditiveAttention(hidden, hidden, config.attention_size, dtype=dtype, rngs=rngs)
        self.sentinel_key = Linear(hidden, config.attention_size, dtype=dtype, rngs=rngs)
        self.words = WordLogits(hidden, vocabulary_size, tied=config.tied_embedding, dtype=dtype, rngs=rngs)

    def start(
        self, regions: Array, M: int, *, steps: int, region_mask: Array | None = None, dropout_keys: Array | None = None
    ) -> tuple[AdaptiveMemory, tuple[Array, Array]]:
        mean = masked_mean(regions, region_mask)  # [B,D]
        image = self.drop(jax.nn.relu(self.project_mean(mean)), dropout_keys, 0)[:, None]  # [B,1,E]
        regions = dropout(jax.nn.relu(self.project(regions)), self.rate, dropout_keys)  # [B,N,H]
        zeros = jnp.zeros((regions.shape[0], M, self.hidden_size), jnp.float32)
        return AdaptiveMemory(regions, self.attention.project_keys(regions), image, region_mask), (zeros, zeros)

    def step(
        self,
        carry: tuple[Array, Array],
        token: Array,
        memory: AdaptiveMemory,
        *,
        dropout_keys: Array | None = None,
    ) -> tuple[tuple[Array, Array], StepOutput]:
        word = self.drop(self.embedding(token), dropout_keys, 0)  # [B,M,E]
        inputs = jnp.concatenate([word, jnp.broadcast_to(memory.image, word.shape)], axis=-1)  # [B,M,2E]
        before, cell = self.drop_recurrent(carry, dropout_keys, 2)
        hidden, cell = self.lstm((before, cell), inputs)
        gate = self.sentinel_gate(jnp.concatenate([inputs, before.astype(inputs.dtype)], axis=-1))
        sentinel = jax.nn.sigmoid(gate) * jnp.tanh(cell).astype(gate.dtype)  # [B,M,H]
        context, weights = self.attention(
            hidden, memory.keys, memory.regions, memory.region_mask, (self.sentinel_key(sentinel), sentinel)
        )
        output = self.drop(context + hidden.astype(context.dtype), dropout_keys, 1)  # [B,M,H]
        return (hidden, cell), StepOutput(output, weights)

    def logits(self, output: StepOutput) -> Array:
        return self.words(output.hidden, self.embedding)
