"""Attention on Attention: refiner and LSTM decoder of AoANet (Huang et al. 2019, https://arxiv.org/abs/1908.06954)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.decoders.contract import CommonSettings, Decoder, StepOutput, spread
from imgcap_jax.models.layers import (
    Embed,
    Linear,
    LSTMCell,
    Projection,
    WordLogits,
    dropout,
    masked_mean,
    multi_head_attention,
    row_keys,
)


@dataclass(frozen=True, kw_only=True)
class AttentionOnAttention(CommonSettings):
    """Settings of an AoA decoder; the defaults are the paper's sizes."""

    hidden_size: int = 1024
    embedding_size: int = 1024
    heads: int = 8
    refining: int = 6
    """The number of self-attention layers that refine the regions, once per image (section 3.2). 0: no refinement."""
    dropout: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refining < 0:
            raise UserError(f"decoder.refining is {self.refining}; it must not be negative")
        if self.hidden_size % self.heads:
            raise UserError(
                f"decoder.hidden_size is {self.hidden_size}; it must be a multiple of decoder.heads ({self.heads})"
            )

    def build(
        self, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> "AttentionOnAttentionDecoder":
        """Makes the decoder for regions [B,N,region_size], which are projected to the hidden size.

        Raises:
            UserError: the embedding is tied, but its size is not the hidden size.
        """
        self.check_tied(self.hidden_size)
        return AttentionOnAttentionDecoder(self, region_size, vocabulary_size, dtype=dtype, rngs=rngs)


class Attended(nnx.Module):
    """AoA(Q, v) = sigmoid(W_q^g Q + W_v^g v + b^g) * (W_q^i Q + W_v^i v + b^i) (equation 3).

    v is the result of the attention of the query Q.
    """

    def __init__(self, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.both = Linear(2 * size, 2 * size, dtype=dtype, rngs=rngs)

    def __call__(self, query: Array, attended: Array) -> Array:
        """query [...,H], attended [...,H] -> [...,H]."""
        gate, information = jnp.split(self.both(jnp.concatenate([query, attended], axis=-1)), 2, axis=-1)
        return jax.nn.sigmoid(gate) * information


class RefiningLayer(nnx.Module):
    """A <- LayerNorm(A + AoA(multi-head attention of W_Q A, W_K A, W_V A)) (equations 7 to 9)."""

    def __init__(self, size: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.projections = Projection(size, 3 * size, dtype=dtype, rngs=rngs)
        self.attended = Attended(size, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(size, dtype=dtype, rngs=rngs)

    def __call__(self, regions: Array, region_mask: Array | None, rate: float, dropout_keys: Array | None) -> Array:
        """regions [B,N,H] -> [B,N,H]."""
        query, key, value = jnp.split(self.projections(regions), 3, axis=-1)
        mask = None if region_mask is None else region_mask[:, None]
        attended, _ = multi_head_attention(query, key, value, self.heads, mask)
        return self.norm(regions + dropout(self.attended(query, attended), rate, dropout_keys))


class AttentionOnAttentionMemory(NamedTuple):
    """What every step reads.

    keys, values: [B,N,H], of the attention.
    mean: [B,1,H], the mean of the refined regions.
    region_mask: [B,N] or None.
    """

    keys: Array
    values: Array
    mean: Array
    region_mask: Array | None


class AttentionOnAttentionCarry(NamedTuple):
    """The LSTM's (h, m) and the context c, each float32 [B,M,H]."""

    lstm: tuple[Array, Array]
    context: Array


class AttentionOnAttentionDecoder(Decoder):
    """Attention on Attention (Huang et al. 2019, equations 10 to 12) over regions A refined by ``RefiningLayer``.

    x_t = [W_e y_{t-1}; mean A + c_{t-1}]; h_t, m_t = LSTM(x_t, h_{t-1}, m_{t-1});
    c_t = AoA(multi-head attention of W_Q h_t, W_K A, W_V A); p(y_t) = softmax(W_p c_t). h_0 = m_0 = c_0 = 0.

    ``output.attention`` is the mean over the heads.
    """

    def __init__(
        self,
        config: AttentionOnAttention,
        region_size: int,
        vocabulary_size: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.rate, self.variational = config.dropout, config.variational_dropout
        self.hidden_size = hidden = config.hidden_size
        self.heads = config.heads
        self.project = Projection(region_size, hidden, dtype=dtype, rngs=rngs)
        self.refining = nnx.List(
            [RefiningLayer(hidden, config.heads, dtype=dtype, rngs=rngs) for _ in range(config.refining)]
        )
        self.embedding = Embed(vocabulary_size, config.embedding_size, dtype=dtype, rngs=rngs)
        self.lstm = LSTMCell(config.embedding_size + hidden, hidden, dtype=dtype, rngs=rngs)
        self.query = Linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.keys_values = Projection(hidden, 2 * hidden, dtype=dtype, rngs=rngs)
        self.attended = Attended(hidden, dtype=dtype, rngs=rngs)
        self.words = WordLogits(hidden, vocabulary_size, tied=config.tied_embedding, dtype=dtype, rngs=rngs)

    def start(
        self, regions: Array, M: int, *, steps: int, region_mask: Array | None = None, dropout_keys: Array | None = None
    ) -> tuple[AttentionOnAttentionMemory, AttentionOnAttentionCarry]:
        regions = dropout(jax.nn.relu(self.project(regions)), self.rate, dropout_keys)  # [B,N,H]
        for number, layer in enumerate(self.refining):
            regions = layer(regions, region_mask, self.rate, row_keys(dropout_keys, number))
        key, value = jnp.split(self.keys_values(regions), 2, axis=-1)
        mean = masked_mean(regions, region_mask)[:, None]  # [B,1,H]
        zeros = spread(jnp.zeros((regions.shape[0], self.hidden_size), jnp.float32), M)
        memory = AttentionOnAttentionMemory(key, value, mean, region_mask)
        return memory, AttentionOnAttentionCarry((zeros, zeros), zeros)

    def step(
        self,
        carry: AttentionOnAttentionCarry,
        token: Array,
        memory: AttentionOnAttentionMemory,
        *,
        dropout_keys: Array | None = None,
    ) -> tuple[AttentionOnAttentionCarry, StepOutput]:
        word = self.drop(self.embedding(token), dropout_keys, 0)  # [B,M,E]
        context = memory.mean + carry.context.astype(word.dtype)  # [B,M,H]
        lstm = self.lstm(self.drop_recurrent(carry.lstm, dropout_keys, 2), jnp.concatenate([word, context], axis=-1))
        query = self.query(lstm[0])  # [B,M,H]
        mask = None if memory.region_mask is None else memory.region_mask[:, None]
        attended, weights = multi_head_attention(query, memory.keys, memory.values, self.heads, mask)
        context = self.attended(query, attended)  # [B,M,H]
        carry = AttentionOnAttentionCarry(lstm, context.astype(jnp.float32))
        return carry, StepOutput(self.drop(context, dropout_keys, 1), weights)

    def logits(self, output: StepOutput) -> Array:
        return self.words(output.hidden, self.embedding)
