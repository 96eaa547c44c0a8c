"""Up-Down: two LSTMs with top-down attention between them (Anderson et al. 2018, https://arxiv.org/abs/1707.07998)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.models.decoders.contract import CommonSettings, Decoder, StepOutput
from imgcap_jax.models.layers import AdditiveAttention, Embed, LSTMCell, Projection, WordLogits, dropout, masked_mean


@dataclass(frozen=True, kw_only=True)
class UpDown(CommonSettings):
    """Settings of an Up-Down decoder; the defaults are the paper's sizes."""

    hidden_size: int = 1000
    embedding_size: int = 1000
    attention_size: int = 512
    region_size: int | None = None
    """Regions are projected to this size (linear, ReLU, dropout), once per image. None: no projection, as in the
    paper."""

    def build(self, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "UpDownDecoder":
        """Makes the decoder for regions [B,N,region_size].

        Raises:
            UserError: the embedding is tied, but its size is not the hidden size.
        """
        self.check_tied(self.hidden_size)
        return UpDownDecoder(self, region_size, vocabulary_size, dtype=dtype, rngs=rngs)


class UpDownMemory(NamedTuple):
    """What every step reads.

    regions: [B,N,D].
    keys: [B,N,A], their part of the attention score.
    mean_gates: [B,1,4H], the part of the first LSTM's gates that depends on the mean region.
    region_mask: [B,N] or None.
    """

    regions: Array
    keys: Array
    mean_gates: Array
    region_mask: Array | None


class UpDownCarry(NamedTuple):
    """(h, c) of the attention LSTM and of the language LSTM, each float32 [B,M,H]."""

    attention: tuple[Array, Array]
    language: tuple[Array, Array]


class UpDownDecoder(Decoder):
    """Up-Down (Anderson et al. 2018, equations 1 to 7).

    h1_t = LSTM([h2_{t-1}; mean v; W_e y_{t-1}], h1_{t-1}); alpha_t = softmax(w_a^T tanh(W_va v + W_ha h1_t));
    v_t = sum_i alpha_ti v_i; h2_t = LSTM([v_t; h1_t], h2_{t-1}); p(y_t) = softmax(W_p h2_t + b_p). All h_0 = c_0 = 0.
    """

    def __init__(
        self, config: UpDown, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.rate, self.variational = config.dropout, config.variational_dropout
        self.hidden_size = hidden = config.hidden_size
        size = config.region_size or region_size
        self.project = None if config.region_size is None else Projection(region_size, size, dtype=dtype, rngs=rngs)
        self.embedding = Embed(vocabulary_size, config.embedding_size, dtype=dtype, rngs=rngs)
        # The part of the first LSTM's matrix that multiplies the mean region. It is separate because its product is the
        # same at all steps.
        self.mean_gates = nnx.Linear(size, 4 * hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.attention_lstm = LSTMCell(config.embedding_size + hidden, hidden, dtype=dtype, rngs=rngs)
        self.attention = AdditiveAttention(size, hidden, config.attention_size, dtype=dtype, rngs=rngs)
        self.language_lstm = LSTMCell(size + hidden, hidden, dtype=dtype, rngs=rngs)
        self.words = WordLogits(hidden, vocabulary_size, tied=config.tied_embedding, dtype=dtype, rngs=rngs)

    def start(
        self, regions: Array, M: int, *, steps: int, region_mask: Array | None = None, dropout_keys: Array | None = None
    ) -> tuple[UpDownMemory, UpDownCarry]:
        if self.project is not None:
            regions = dropout(jax.nn.relu(self.project(regions)), self.rate, dropout_keys)
        mean = self.mean_gates(masked_mean(regions, region_mask))[:, None]  # [B,1,4H]
        zeros = jnp.zeros((regions.shape[0], M, self.hidden_size), jnp.float32)
        memory = UpDownMemory(regions, self.attention.project_keys(regions), mean, region_mask)
        return memory, UpDownCarry((zeros, zeros), (zeros, zeros))

    def step(
        self, carry: UpDownCarry, token: Array, memory: UpDownMemory, *, dropout_keys: Array | None = None
    ) -> tuple[UpDownCarry, StepOutput]:
        word = self.drop(self.embedding(token), dropout_keys, 0)  # [B,M,E]
        before = self.drop_recurrent(carry.language, dropout_keys, 3)
        inputs = jnp.concatenate([before[0].astype(word.dtype), word], axis=-1)
        first = self.attention_lstm(self.drop_recurrent(carry.attention, dropout_keys, 2), inputs, memory.mean_gates)
        context, weights = self.attention(first[0], memory.keys, memory.regions, memory.region_mask)
        inputs = jnp.concatenate([context, first[0].astype(context.dtype)], axis=-1)
        second = self.language_lstm(before, inputs)
        return UpDownCarry(first, second), StepOutput(self.drop(second[0], dropout_keys, 1), weights)

    def logits(self, output: StepOutput) -> Array:
        return self.words(output.hidden, self.embedding)
