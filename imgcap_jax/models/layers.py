"""Layers that several decoders share: per-row dropout, the LSTM cell, attention, word logits."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.models.additive_scores import additive_scores
from imgcap_jax.models.unrolling import constant_product


def dropout(x: Array, rate: float, dropout_keys: Array | None) -> Array:
    """Inverted dropout whose masks belong to the rows of the batch, not to the device that holds them.

    Every row draws from its own key, so 1, 2 and 4 devices drop the same units (``nnx.Dropout`` draws one
    mask for whatever part of the batch it sees).

    Args:
        x: [B, ...].
        rate: share of units dropped, 0 to 1.
        dropout_keys: [B] PRNG keys; None: no dropout (evaluation).
    """
    if dropout_keys is None or rate == 0.0:
        return x
    # 16 random bits a unit: the share kept is exact to 1/65536, and half as many numbers are drawn as by
    # jax.random.bernoulli, which on a CPU is a twentieth of a training step.
    kept = max(1, round((1.0 - rate) * 65536))
    if kept == 65536:
        return x
    count = math.prod(x.shape[1:])
    bits = jax.vmap(lambda key: jax.random.bits(key, (-(-count // 2),)))(dropout_keys)  # uint32 [B,count/2]
    halves = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(len(x), -1)[:, :count]
    keep = (halves < kept).reshape(x.shape)
    return jnp.where(keep, x * (65536 / kept), 0.0).astype(x.dtype)


def draw_words(probs: Array, uniform: Array) -> Array:
    """Words drawn from probabilities [...,V] by uniform numbers [...], 0 to 1: indices [...].

    A single number a word, looked up in the cumulative distribution: on a CPU six times as fast as
    ``jax.random.categorical``, which draws V of them. The entries of words with probability 0 are cleared, for a
    parallel cumsum may round two equal sums apart; the maximum is taken after that, so some word always is hit.
    """
    reached = jnp.where(probs > 0, jnp.cumsum(probs, axis=-1), 0.0)  # [...,V]
    target = uniform * jnp.max(reached, axis=-1)  # [...]
    return jnp.argmax(reached > target[..., None], axis=-1)  # the first that passes the target


def row_keys(keys: Array | None, number: int | Array) -> Array | None:
    """Derives one further key a row: ``fold_in`` of ``number`` into each of ``keys`` [B]."""
    if keys is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def masked_mean(regions: Array, region_mask: Array | None) -> Array:
    """Mean of regions [B,N,D] over those that exist (region_mask [B,N], None: all) -> [B,D]."""
    if region_mask is None:
        return regions.mean(axis=1)
    weight = region_mask.astype(regions.dtype)[..., None]  # [B,N,1]
    return (regions * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)


class Linear(nnx.Linear):
    """x W + b, for use inside a decoder's step: W's gradient is taken once for all steps."""

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        """x [...,I] -> [...,O]."""
        y = constant_product(_products[jnp.dtype(self.dtype)], x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embed(nnx.Embed):
    """Word vectors, for use inside a decoder's step: their gradient is taken once for all steps."""

    def __call__(self, tokens: Array, out_sharding: Any = None) -> Array:
        """tokens int32 [...] -> [...,E]."""
        return constant_product(_rows, tokens, self.embedding[...]).astype(self.dtype)


def _rows(tokens: Array, table: Array) -> Array:
    return jnp.take(table, tokens, axis=0)


def _product(dtype: Any, x: Array, kernel: Array) -> Array:
    # With all axes but the last made one, for XLA would copy both sides of the kernel's gradient to do so itself.
    flat = x.astype(dtype).reshape(-1, x.shape[-1]) @ kernel.astype(dtype)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


_products = {jnp.dtype(dtype): partial(_product, dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float64)}


class LSTMCell(nnx.Module):
    """The LSTM of Hochreiter & Schmidhuber (1997) with forget gates (Gers et al. 2000), gates in one product.

    The forget gate's bias starts at 1 (Jozefowicz et al. 2015).
    """

    def __init__(self, input_size: int, hidden_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.hidden_size = hidden_size
        bias = jnp.zeros((4 * hidden_size,)).at[hidden_size : 2 * hidden_size].set(1.0)
        self.gates = Linear(input_size + hidden_size, 4 * hidden_size, dtype=dtype, rngs=rngs)
        self.gates.bias = nnx.Param(bias)

    def __call__(self, carry: tuple[Array, Array], inputs: Array, constant: Array | None = None) -> tuple[Array, Array]:
        """One step: carry (h, c), each [...,H] float32, and inputs [...,I] -> the next (h, c).

        ``constant`` [...,4H] is added to the gates: the part of an input that is the same at all steps.
        """
        hidden, cell = carry
        gates = self.gates(jnp.concatenate([inputs, hidden.astype(inputs.dtype)], axis=-1))  # [...,4H]
        if constant is not None:
            gates = gates + constant
        # The cell accumulates over the caption, so it stays in float32 whatever the products use.
        return _lstm_cell(gates.astype(jnp.float32), cell)


@partial(jax.checkpoint, prevent_cse=False)  # the gates are kept, rather than all that follows from them
def _lstm_cell(gates: Array, cell: Array) -> tuple[Array, Array]:
    gate_in, forget, candidate, out = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(gate_in) * jnp.tanh(candidate)
    return jax.nn.sigmoid(out) * jnp.tanh(cell), cell


class AdditiveAttention(nnx.Module):
    """Soft attention over regions with an additive score (Bahdanau et al. 2015; Xu et al. 2015, section 4.2)."""

    def __init__(
        self, region_size: int, query_size: int, attention_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.key = nnx.Linear(region_size, attention_size, dtype=dtype, rngs=rngs)
        self.query = Linear(query_size, attention_size, use_bias=False, dtype=dtype, rngs=rngs)
        self.score = nnx.Linear(attention_size, 1, use_bias=False, dtype=dtype, rngs=rngs)

    def keys(self, regions: Array) -> Array:
        """The part of the score that doesn't change over time: regions [B,N,D] -> [B,N,A]."""
        return self.key(regions)

    def __call__(
        self,
        query: Array,
        keys: Array,
        regions: Array,
        region_mask: Array | None,
        sentinel: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """Attends: query [B,M,Q], keys [B,N,A], regions [B,N,D] -> context [B,M,D], weights float32 [B,M,N].

        ``sentinel``, the key [B,M,A] and value [B,M,D] of one more place to attend, which each sequence has for
        itself (Lu et al. 2017); the weights of the regions then sum to less than 1.
        """
        query = self.query(query)
        score = self.score.kernel[..., 0]  # [A]
        scores = additive_scores(query, keys, score)  # [B,M,N]
        if region_mask is not None:
            scores = jnp.where(region_mask[:, None], scores, -1e9)
        if sentinel is not None:
            key, value = sentinel
            last = jnp.sum(score * jnp.tanh((key + query).astype(jnp.float32)), axis=-1, keepdims=True)  # [B,M,1]
            scores = jnp.concatenate([scores, last], axis=-1)  # [B,M,N+1]
        weights = jax.nn.softmax(scores, axis=-1)
        seen = weights[..., : keys.shape[1]]  # [B,M,N]
        context = constant_product(_weighted_sum, seen, regions)
        if sentinel is not None:
            context = context + weights[..., -1:].astype(value.dtype) * value
        return context, seen


def _weighted_sum(weights: Array, regions: Array) -> Array:
    return jnp.einsum("...bmn,bnd->...bmd", weights.astype(regions.dtype), regions)


def multi_head_attention(
    query: Array, keys: Array, values: Array, heads: int, mask: Array | None = None
) -> tuple[Array, Array]:
    """Scaled dot-product attention of several heads (Vaswani et al. 2017, section 3.2), without its projections.

    Args:
        query: [...,Q,H].
        keys: [...,S,H].
        values: [...,S,H].
        heads: into how many slices H is cut; it has to be divisible.
        mask: bool, broadcastable to [...,Q,S]: what may be attended; None: everything.

    Returns:
        The heads' results one behind the other [...,Q,H], and the mean of their weights, float32 [...,Q,S].
    """
    query, keys, values = (x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads) for x in (query, keys, values))
    scores = jnp.einsum("...qhc,...shc->...hqs", query, keys, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[..., None, :, :], scores, -1e9)
    weights = jax.nn.softmax(scores, axis=-1)  # [...,heads,Q,S]
    result = jnp.einsum("...hqs,...shc->...qhc", weights.astype(values.dtype), values)
    return result.reshape(*result.shape[:-2], -1), weights.mean(axis=-3)


class WordLogits(nnx.Module):
    """The layer from a hidden vector to the vocabulary, with its own matrix or the embedding's (tied).

    Tying: Press & Wolf (2017), Inan et al. (2017).
    """

    def __init__(self, hidden_size: int, vocabulary_size: int, *, tied: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        self.kernel = (
            None if tied else nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (hidden_size, vocabulary_size)))
        )
        self.bias = nnx.Param(jnp.zeros((vocabulary_size,)))

    def __call__(self, hidden: Array, embedding: nnx.Embed) -> Array:
        """hidden [...,H] -> logits [...,V]; a tied layer reads ``embedding``."""
        kernel: Any = embedding.embedding[...].T if self.kernel is None else self.kernel[...]
        # Products in bfloat16 are summed and given in float32: 8 bits would make ties of near-equal words.
        product = jnp.matmul(hidden.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return product + self.bias[...]
