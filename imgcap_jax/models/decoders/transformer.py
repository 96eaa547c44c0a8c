"""A small Transformer decoder (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), the baseline for ablations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.decoders.contract import CommonSettings, Decoder, StepOutput
from imgcap_jax.models.layers import Projection, WordLogits, dropout, multi_head_attention


@dataclass(frozen=True, kw_only=True)
class Transformer(CommonSettings):
    """Settings of a Transformer decoder; the defaults are common sizes in captioning (Cornia et al. 2020)."""

    layers: int = 3
    heads: int = 8
    feedforward_size: int = 2048
    dropout: float = 0.1
    max_length: int = 64
    """The number of tokens that the decoder can read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.heads or self.hidden_size % 2:
            raise UserError(
                f"decoder.hidden_size is {self.hidden_size}; it must be even and a multiple of decoder.heads "
                f"({self.heads})"
            )
        if self.embedding_size != self.hidden_size:
            raise UserError(
                f"decoder.embedding_size is {self.embedding_size}; a Transformer needs it equal to "
                f"decoder.hidden_size ({self.hidden_size})"
            )
        if self.variational_dropout:
            raise UserError("decoder.variational_dropout is for recurrent decoders only; set it to false")
        if self.max_length < 1:
            raise UserError(f"decoder.max_length is {self.max_length}; it must be at least 1")

    def build(
        self, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> "TransformerDecoder":
        """Makes the decoder for regions [B,N,region_size], which are projected to the hidden size."""
        return TransformerDecoder(self, region_size, vocabulary_size, dtype=dtype, rngs=rngs)


class TransformerLayer(nnx.Module):
    """Self-attention, cross-attention to the regions and a feed-forward network, each x + f(LayerNorm(x)).

    With pre-layer normalisation, training needs no long warm-up (Xiong et al. 2020, https://arxiv.org/abs/2002.04745).
    """

    def __init__(self, config: Transformer, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        size, inner = config.hidden_size, config.feedforward_size
        self.heads, self.rate = config.heads, config.dropout
        self.self_norm = nnx.LayerNorm(size, dtype=dtype, rngs=rngs)
        self.self_projections = Projection(size, 3 * size, dtype=dtype, rngs=rngs)
        self.self_out = Projection(size, size, dtype=dtype, rngs=rngs)
        self.cross_norm = nnx.LayerNorm(size, dtype=dtype, rngs=rngs)
        self.cross_query = Projection(size, size, dtype=dtype, rngs=rngs)
        self.cross_keys_values = Projection(size, 2 * size, dtype=dtype, rngs=rngs)
        self.cross_out = Projection(size, size, dtype=dtype, rngs=rngs)
        self.forward_norm = nnx.LayerNorm(size, dtype=dtype, rngs=rngs)
        self.forward_in = Projection(size, inner, dtype=dtype, rngs=rngs)
        self.forward_out = Projection(inner, size, dtype=dtype, rngs=rngs)

    def keys_values(self, regions: Array) -> tuple[Array, Array]:
        """Keys and values [B,N,H] of the regions [B,N,H] for cross-attention, computed once per image."""
        key, value = jnp.split(self.cross_keys_values(regions), 2, axis=-1)
        return key, value

    def queries_keys_values(self, x: Array) -> list[Array]:
        """x [...,H] -> query, key and value of self-attention, each [...,H]."""
        return jnp.split(self.self_projections(self.self_norm(x)), 3, axis=-1)

    def rest(
        self,
        x: Array,
        attended: Array,
        memory: tuple[Array, Array],
        region_mask: Array | None,
        drop: Callable[[Array, int], Array],
    ) -> tuple[Array, Array]:
        """The part of the layer after self-attention.

        Args:
            x: the input of the layer [B,M,...,H].
            attended: the result of self-attention [B,M,...,H].
            memory: keys and values of the regions, each [B,N,H].
            region_mask: [B,N] or None.
            drop: (x, place in the layer) -> x after dropout.

        Returns:
            The output of the layer [B,M,...,H], and the cross-attention weights [B,M,...,N].
        """
        x = x + drop(self.self_out(attended), 0)
        query = self.cross_query(self.cross_norm(x))
        flat = query.reshape(query.shape[0], -1, query.shape[-1])  # [B,M*...,H]
        mask = None if region_mask is None else region_mask[:, None]
        seen, weights = multi_head_attention(flat, *memory, self.heads, mask)
        x = x + drop(self.cross_out(seen.reshape(x.shape)), 1)
        inner = jax.nn.relu(self.forward_in(self.forward_norm(x)))
        x = x + drop(self.forward_out(inner), 2)
        return x, weights.reshape(*x.shape[:-1], weights.shape[-1])


class TransformerMemory(NamedTuple):
    """What every step reads.

    layers: the keys and values of the regions in each layer, each [B,N,H].
    region_mask: [B,N] or None.
    """

    layers: tuple[tuple[Array, Array], ...]
    region_mask: Array | None


class TransformerCarry(NamedTuple):
    """The cache of self-attention.

    t: int32 [B,M], the number of tokens read.
    layers: the keys and values of the tokens in each layer, each [B,M,L,H], for at most L tokens.
    """

    t: Array
    layers: tuple[tuple[Array, Array], ...]


class TransformerDecoder(Decoder):
    """Transformer decoder (Vaswani et al. 2017, section 3) with sinusoidal positions and pre-layer normalisation.

    A step caches keys and values in the carry. Teacher forcing reads all tokens at once under a causal mask.
    ``output.attention`` is the cross-attention of the last layer, the mean over its heads.
    """

    def __init__(
        self, config: Transformer, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.rate, self.variational = config.dropout, False
        self.max_length = config.max_length
        self.dtype = dtype
        self.project = Projection(region_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.project_norm = nnx.LayerNorm(config.hidden_size, dtype=dtype, rngs=rngs)
        self.embedding = nnx.Embed(vocabulary_size, config.embedding_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([TransformerLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.hidden_size, dtype=dtype, rngs=rngs)
        self.words = WordLogits(config.hidden_size, vocabulary_size, tied=config.tied_embedding, dtype=dtype, rngs=rngs)

    def start(
        self, regions: Array, M: int, *, steps: int, region_mask: Array | None = None, dropout_keys: Array | None = None
    ) -> tuple[TransformerMemory, TransformerCarry]:
        regions = self.project_norm(dropout(jax.nn.relu(self.project(regions)), self.rate, dropout_keys))  # [B,N,H]
        memory = TransformerMemory(tuple(layer.keys_values(regions) for layer in self.layers), region_mask)
        batch, size = regions.shape[0], regions.shape[-1]
        if steps > self.max_length:
            raise ValueError(f"cannot read {steps} tokens: max_length is {self.max_length}")
        empty = jnp.zeros((batch, M, steps, size), regions.dtype)
        return memory, TransformerCarry(jnp.zeros((batch, M), jnp.int32), ((empty, empty),) * len(self.layers))

    def step(
        self,
        carry: TransformerCarry,
        token: Array,
        memory: TransformerMemory,
        *,
        dropout_keys: Array | None = None,
    ) -> tuple[TransformerCarry, StepOutput]:
        positions = jnp.arange(carry.layers[0][0].shape[2])  # [L]
        now = positions == carry.t[..., None]  # [B,M,L]
        read = (positions <= carry.t[..., None])[..., None, :]  # [B,M,1,L]

        def drop(x: Array, number: int) -> Array:
            return self.drop(x, dropout_keys, number)

        x = drop(self._embedded(token, carry.t), 0)  # [B,M,H]
        cache = []
        for number, (layer, regions, (old_keys, old_values)) in enumerate(
            zip(self.layers, memory.layers, carry.layers, strict=True)
        ):
            query, key, value = layer.queries_keys_values(x)  # [B,M,H] each
            all_keys = jnp.where(now[..., None], key[..., None, :], old_keys)  # [B,M,L,H]
            all_values = jnp.where(now[..., None], value[..., None, :], old_values)  # [B,M,L,H]
            cache.append((all_keys, all_values))
            attended, _ = multi_head_attention(query[..., None, :], all_keys, all_values, layer.heads, read)
            x, weights = layer.rest(x, attended[..., 0, :], regions, memory.region_mask, _of_layer(drop, number))
        return TransformerCarry(carry.t + 1, tuple(cache)), StepOutput(self.norm(x), weights)

    def unroll(
        self, tokens: Array, memory: TransformerMemory, carry: TransformerCarry, *, dropout_keys: Array | None = None
    ) -> StepOutput:
        """Teacher forcing in one pass over all tokens. ``carry`` must come from ``start``.

        The result equals that of stepping, dropout included.
        """
        length = tokens.shape[-1]
        causal = jnp.tril(jnp.ones((length, length), bool))  # [T,T]
        step_keys = self._keys_of_steps(dropout_keys, length)  # [T,B]

        def drop(x: Array, number: int) -> Array:
            """Drops, at each position of x [B,M,T,H], the units that stepping would drop there."""
            if step_keys is None:
                return x
            return jax.vmap(self.drop, in_axes=(2, 0, None), out_axes=2)(x, step_keys, number)

        x = drop(self._embedded(tokens, jnp.arange(length)), 0)  # [B,M,T,H]
        for number, (layer, regions) in enumerate(zip(self.layers, memory.layers, strict=True)):
            query, key, value = layer.queries_keys_values(x)  # [B,M,T,H] each
            attended, _ = multi_head_attention(query, key, value, layer.heads, causal)
            x, weights = layer.rest(x, attended, regions, memory.region_mask, _of_layer(drop, number))
        return StepOutput(self.norm(x), weights)

    def logits(self, output: StepOutput) -> Array:
        return self.words(output.hidden, self.embedding)

    def _embedded(self, tokens: Array, positions: Array) -> Array:
        """Embeddings of tokens [...] plus the position codes: [...,H]."""
        size = self.embedding.features
        table = jnp.asarray(sinusoids(self.max_length, size), self.dtype)
        return self.embedding(tokens) * math.sqrt(size) + table[positions]


def _of_layer(drop: Callable[[Array, int], Array], layer: int) -> Callable[[Array, int], Array]:
    """The function (x, place in the layer) -> x after dropout, with different masks for each layer."""
    return lambda x, place: drop(x, 1 + 3 * layer + place)


def sinusoids(length: int, size: int) -> np.ndarray:
    """Position codes float32 [length,size] (Vaswani et al. 2017, section 3.5)."""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, size, 2) / size)  # [length,size/2]
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, size).astype(np.float32)
