"""Att2in (Rennie et al. 2017, https://arxiv.org/abs/1612.00563): the context enters the LSTM's cell input only."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.models.decoders.contract import CommonSettings, Decoder, StepOutput
from imgcap_jax.models.layers import AdditiveAttention, Embed, Linear, Projection, WordLogits, dropout


@dataclass(frozen=True, kw_only=True)
class Att2in(CommonSettings):
    """Settings of an Att2in decoder; the defaults are the paper's sizes."""

    attention_size: int = 512
    region_size: int | None = 512
    """Regions are projected to this size (linear, ReLU, dropout), once per image. None: no projection."""

    def build(self, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "Att2inDecoder":
        """Makes the decoder for regions [B,N,region_size].

        Raises:
            UserError: the embedding is tied, but its size is not the hidden size.
        """
        self.check_tied(self.hidden_size)
        return Att2inDecoder(self, region_size, vocabulary_size, dtype=dtype, rngs=rngs)


class Att2inMemory(NamedTuple):
    """What every step reads.

    regions: [B,N,D].
    keys: [B,N,A], their part of the attention score.
    region_mask: [B,N] or None.
    """

    regions: Array
    keys: Array
    region_mask: Array | None


class Att2inDecoder(Decoder):
    """Att2in (Rennie et al. 2017, section 2.2).

    alpha_t = softmax(W tanh(W_aI I + W_ah h_{t-1} + b_a)); I_t = sum_i alpha_ti I_i;
    i, f, o = sigmoid(W x_t + W h_{t-1} + b); z = maxout(W_zx x_t + W_zI I_t + W_zh h_{t-1} + b_z);
    c_t = i z + f c_{t-1}; h_t = o tanh(c_t); s_t = W_s h_t. h_0 = c_0 = 0.
    """

    def __init__(
        self, config: Att2in, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.rate, self.variational = config.dropout, config.variational_dropout
        self.hidden_size = hidden = config.hidden_size
        size = config.region_size or region_size
        self.project = None if config.region_size is None else Projection(region_size, size, dtype=dtype, rngs=rngs)
        self.embedding = Embed(vocabulary_size, config.embedding_size, dtype=dtype, rngs=rngs)
        self.attention = AdditiveAttention(size, hidden, config.attention_size, dtype=dtype, rngs=rngs)
        # One product computes the gates i, f, o and both parts of the maxout. The bias of the forget gate starts at 1.
        self.gates = Linear(config.embedding_size + hidden, 5 * hidden, dtype=dtype, rngs=rngs)
        self.gates.bias = nnx.Param(jnp.zeros((5 * hidden,)).at[hidden : 2 * hidden].set(1.0))
        self.attended = Linear(size, 2 * hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.words = WordLogits(hidden, vocabulary_size, tied=config.tied_embedding, dtype=dtype, rngs=rngs)

    def start(
        self, regions: Array, M: int, *, steps: int, region_mask: Array | None = None, dropout_keys: Array | None = None
    ) -> tuple[Att2inMemory, tuple[Array, Array]]:
        if self.project is not None:
            regions = dropout(jax.nn.relu(self.project(regions)), self.rate, dropout_keys)
        zeros = jnp.zeros((regions.shape[0], M, self.hidden_size), jnp.float32)
        return Att2inMemory(regions, self.attention.project_keys(regions), region_mask), (zeros, zeros)

    def step(
        self,
        carry: tuple[Array, Array],
        token: Array,
        memory: Att2inMemory,
        *,
        dropout_keys: Array | None = None,
    ) -> tuple[tuple[Array, Array], StepOutput]:
        word = self.drop(self.embedding(token), dropout_keys, 0)  # [B,M,E]
        hidden, cell = self.drop_recurrent(carry, dropout_keys, 2)
        context, weights = self.attention(hidden, memory.keys, memory.regions, memory.region_mask)
        gates = self.gates(jnp.concatenate([word, hidden.astype(word.dtype)], axis=-1)).astype(jnp.float32)  # [B,M,5H]
        gate_in, forget, out, first, second = jnp.split(gates, 5, axis=-1)
        also_first, also_second = jnp.split(self.attended(context).astype(jnp.float32), 2, axis=-1)
        candidate = jnp.maximum(first + also_first, second + also_second)
        cell = jax.nn.sigmoid(gate_in) * candidate + jax.nn.sigmoid(forget) * cell
        hidden = jax.nn.sigmoid(out) * jnp.tanh(cell)
        return (hidden, cell), StepOutput(self.drop(hidden, dropout_keys, 1), weights)

    def logits(self, output: StepOutput) -> Array:
        return self.words(output.hidden, self.embedding)
