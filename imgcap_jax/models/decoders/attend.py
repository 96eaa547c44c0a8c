"""Show, Attend and Tell with soft attention (Xu et al. 2015, https://arxiv.org/abs/1502.03044)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.models.decoders.contract import CommonSettings, Decoder, StepOutput, spread
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
class ShowAttendTell(CommonSettings):
    """Settings of a Show, Attend and Tell decoder."""

    attention_size: int = 512
    region_size: int | None = 512
    """Regions are projected to this size (linear, ReLU, dropout), once per image. None: no projection, as in the
    paper."""
    gate: bool = True
    """Whether the context is multiplied by the scalar beta_t = sigmoid(f_beta(h_{t-1})) (section 4.2.1)."""

    def build(
        self, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> "ShowAttendTellDecoder":
        """Makes the decoder for regions [B,N,region_size]."""
        return ShowAttendTellDecoder(self, region_size, vocabulary_size, dtype=dtype, rngs=rngs)


class AttendMemory(NamedTuple):
    """What every step reads.

    regions: [B,N,D].
    keys: [B,N,A], their part of the attention score.
    region_mask: [B,N] or None.
    """

    regions: Array
    keys: Array
    region_mask: Array | None


class ShowAttendTellDecoder(Decoder):
    """Soft attention (Xu et al. 2015, equations 1 to 13, with the deep output of equation 7).

    h_0, c_0 = tanh(f_init(mean a)); alpha_t = softmax(f_att(a, h_{t-1})); z_t = beta_t sum_i alpha_ti a_i;
    h_t = LSTM([E y_{t-1}; z_t], h_{t-1}); p(y_t) = softmax(L_o(E y_{t-1} + L_h h_t + L_z z_t)).
    """

    def __init__(
        self,
        config: ShowAttendTell,
        region_size: int,
        vocabulary_size: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.rate, self.variational = config.dropout, config.variational_dropout
        hidden, size = config.hidden_size, config.region_size or region_size
        self.project = None if config.region_size is None else Projection(region_size, size, dtype=dtype, rngs=rngs)
        self.first = Projection(size, 2 * hidden, dtype=dtype, rngs=rngs)
        self.embedding = Embed(vocabulary_size, config.embedding_size, dtype=dtype, rngs=rngs)
        self.attention = AdditiveAttention(size, hidden, config.attention_size, dtype=dtype, rngs=rngs)
        self.gate = Linear(hidden, 1, dtype=dtype, rngs=rngs) if config.gate else None
        self.lstm = LSTMCell(config.embedding_size + size, hidden, dtype=dtype, rngs=rngs)
        self.deep_output = Projection(hidden + size, config.embedding_size, dtype=dtype, rngs=rngs)
        self.words = WordLogits(
            config.embedding_size, vocabulary_size, tied=config.tied_embedding, dtype=dtype, rngs=rngs
        )

    def start(
        self, regions: Array, M: int, *, steps: int, region_mask: Array | None = None, dropout_keys: Array | None = None
    ) -> tuple[AttendMemory, tuple[Array, Array]]:
        if self.project is not None:
            regions = dropout(jax.nn.relu(self.project(regions)), self.rate, dropout_keys)
        first = jnp.tanh(self.first(masked_mean(regions, region_mask))).astype(jnp.float32)  # [B,2H]
        hidden, cell = jnp.split(first, 2, axis=-1)
        memory = AttendMemory(regions, self.attention.project_keys(regions), region_mask)
        return memory, (spread(hidden, M), spread(cell, M))

    def step(
        self,
        carry: tuple[Array, Array],
        token: Array,
        memory: AttendMemory,
        *,
        dropout_keys: Array | None = None,
    ) -> tuple[tuple[Array, Array], StepOutput]:
        word = self.drop(self.embedding(token), dropout_keys, 0)  # [B,M,E]
        carry = self.drop_recurrent(carry, dropout_keys, 2)
        context, weights = self.attention(carry[0], memory.keys, memory.regions, memory.region_mask)
        if self.gate is not None:
            context = context * jax.nn.sigmoid(self.gate(carry[0]))  # [B,M,D]
        inputs = jnp.concatenate([word, context.astype(word.dtype)], axis=-1)
        hidden, cell = self.lstm(carry, inputs)
        state = self.drop(jnp.concatenate([hidden, context], axis=-1), dropout_keys, 1)
        return (hidden, cell), StepOutput(jnp.concatenate([word, state.astype(word.dtype)], axis=-1), weights)

    def logits(self, output: StepOutput) -> Array:
        size = self.embedding.features
        word, state = output.hidden[..., :size], output.hidden[..., size:]
        return self.words(word + self.deep_output(state), self.embedding)
