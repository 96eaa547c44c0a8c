"""Layers that several decoders share: per-row dropout, the LSTM cell, attention, word logits.

Shape letters are those of ``decoders/contract.py``. A is the attention size, H the hidden size, E the embedding size.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.models.additive_scores import additive_scores
from imgcap_jax.models.constants import with_constants


def dropout(x: Array, rate: float | Array, dropout_keys: Array | None) -> Array:
    """Inverted dropout with one PRNG key per row of the batch.

    The mask of a row depends on its key only, so that 1, 2 and 4 devices drop the same units. ``nnx.Dropout`` draws one
    mask for the part of the batch on a device, so its masks depend on the number of devices. TPUs drop other units than
    CPUs and GPUs.

    Args:
        x: [B,...].
        rate: probability of dropping a unit, 0 to 1; an array [] in populations.
        dropout_keys: PRNG keys [B]; None: no dropout (evaluation).

    Returns:
        An array of the shape and type of x.
    """
    if dropout_keys is None:
        return x
    # With 16 random bits per unit, the probability is exact to 1/65536. This draws half as many numbers as
    # jax.random.bernoulli, which takes a noticeable share of a training step on a CPU.
    kept: int | Array
    if isinstance(rate, float | int):
        kept = max(1, round((1.0 - rate) * 65536))
        if kept == 65536:
            return x
    else:
        kept = jnp.maximum(1, jnp.round((1.0 - jax.lax.stop_gradient(rate)) * 65536).astype(jnp.int32))
    count = math.prod(x.shape[1:])
    bits = jax.vmap(lambda key: jax.random.bits(key, (-(-count // 2),)))(dropout_keys)  # uint32 [B,count/2]
    halves = jax.lax.platform_dependent(bits, tpu=_low_halves_first, default=_halves)[:, :count]
    keep = (halves < kept).reshape(x.shape)
    return jnp.where(keep, x * (65536 / kept), 0.0).astype(x.dtype)


def _halves(bits: Array) -> Array:
    """The 16-bit halves of uint32 [B,n] in the order of memory: uint16 [B,2n]."""
    return jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(len(bits), -1)


def _low_halves_first(bits: Array) -> Array:
    """All low halves, then all high halves: uint16 [B,2n].

    Interleaving them takes more cycles on TPU, by the estimate of its compiler: 17.1 instead of 14.3 million per step
    of ``imgcap plan coco --topology v5e:2x2 --data.feed host``.
    """
    return jnp.concatenate([bits & 0xFFFF, bits >> 16], axis=1).astype(jnp.uint16)


def draw_words(logits: Array, uniform: Array) -> tuple[Array, Array]:
    """Draws words from the softmax of logits, by inverting the cumulative distribution.

    One random number per word is enough. ``jax.random.categorical`` draws V numbers per word and takes six times as
    long on a CPU. The probabilities are added up in blocks of words: first the block is chosen, then the word in it. A
    cumulative sum over all words takes several passes over them.

    Args:
        logits: [...,V], not normalised; -inf for words that cannot be drawn. At least one is finite.
        uniform: uniform random numbers [...], 0 to 1.

    Returns:
        Word ids int32 [...], and their log-probabilities [...].
    """
    logits = logits.astype(jnp.float32)  # sums of many probabilities need more than 8 bits
    size = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -size % _BLOCK)]
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(*logits.shape[:-1], -1, _BLOCK)
    sums = jnp.sum(jnp.exp(blocks - top[..., None]), axis=-1)  # [...,V/block]
    reached = _reached(sums)
    target = uniform * jnp.max(reached, axis=-1)  # [...]
    block = jnp.argmax(reached > target[..., None], axis=-1)  # the first block that passes the target
    earlier = jnp.arange(reached.shape[-1]) < block[..., None]
    before = jnp.max(jnp.where(earlier, reached, 0.0), axis=-1)  # at most the target
    words = block[..., None] * _BLOCK + jnp.arange(_BLOCK)  # [...,block]

    def by_words(logits: Array, blocks: Array) -> Array:
        return jnp.take_along_axis(logits, jnp.minimum(words, size - 1), axis=-1)

    def by_block(logits: Array, blocks: Array) -> Array:
        flat = blocks.reshape(-1, *blocks.shape[-2:])  # [n,V/block,block]
        return flat[jnp.arange(len(flat)), block.reshape(-1)].reshape(words.shape)

    # On TPU, a gather of one row of 128 words in place of 128 gathered numbers. The compiler (``imgcap plan``) has no
    # estimate of the time of gathers. The words after the last one are not used.
    inside = jax.lax.platform_dependent(logits, blocks, tpu=by_block, default=by_words)
    probs = jnp.where(words < size, jnp.exp(inside - top), 0.0)
    reached = _reached(probs) + before[..., None]
    # The sums of the block and of its words are rounded differently: a target that no word passes is the last word's.
    passes = (reached > target[..., None]) & (probs > 0)
    last = _BLOCK - 1 - jnp.argmax(probs[..., ::-1] > 0, axis=-1)
    place = jnp.where(passes.any(axis=-1), jnp.argmax(passes, axis=-1), last)
    drawn = jnp.take_along_axis(inside, place[..., None], axis=-1)[..., 0]
    log_probs = drawn - top[..., 0] - jnp.log(jnp.sum(sums, axis=-1))
    # Logits that are not finite give some word of the vocabulary.
    return jnp.minimum(block * _BLOCK + place, size - 1).astype(jnp.int32), log_probs


_BLOCK = 128


def _reached(weights: Array) -> Array:
    """The cumulative sums over the last axis, 0 at weights of 0.

    A parallel cumsum can round two equal sums differently, so that a weight of 0 would seem to raise the sum.
    """
    return jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)


@overload
def row_keys(keys: Array, number: int | Array) -> Array: ...
@overload
def row_keys(keys: Array | None, number: int | Array) -> Array | None: ...
def row_keys(keys: Array | None, number: int | Array) -> Array | None:
    """Derives a new key per row: ``jax.random.fold_in`` of ``number`` into each of ``keys`` [B]. None stays None."""
    if keys is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def masked_mean(regions: Array, region_mask: Array | None) -> Array:
    """Mean of regions [B,N,D] over those that exist (``region_mask`` [B,N]; None: all of them) -> [B,D]."""
    if region_mask is None:
        return regions.mean(axis=1)
    weight = region_mask.astype(regions.dtype)[..., None]  # [B,N,1]
    return (regions * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)


class Linear(nnx.Linear):
    """x W + b for a decoder's step. The gradient of W is computed once for all steps (see ``unrolling``)."""

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        """x [...,I] -> [...,O]."""
        y = with_constants(_product_in(jnp.dtype(self.dtype or jnp.float32)), x, self.kernel[...])
        return y if self.bias is None else _add_bias(y, self.bias[...])


class Projection(nnx.Linear):
    """``nnx.Linear`` with a bias whose gradient is summed in float32. For products that no scan repeats."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """inputs [...,I] -> [...,O]."""
        x, kernel = self.promote_dtype((inputs, self.kernel[...]), dtype=self.dtype)
        y = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=self.precision)
        return y if self.bias is None else _add_bias(y, self.bias[...])


def _add_bias(y: Array, bias: Array) -> Array:
    """y [...,O] plus a bias float32 [O], in the type of y.

    They are added in float32, because the gradient of the bias is a sum over all rows in the type of the addition, and
    a bfloat16 sum of thousands of rows is wrong in the second digit.
    """
    return (y.astype(bias.dtype) + bias).astype(y.dtype)


class Embed(nnx.Embed):
    """Word embedding for a decoder's step. Its gradient is computed once for all steps (see ``unrolling``)."""

    def __call__(self, tokens: Array, out_sharding: Any = None) -> Array:
        """tokens int32 [...] -> [...,E]."""
        return with_constants(_rows, tokens, self.embedding[...]).astype(self.dtype)


def _rows(tokens: Array, table: Array) -> Array:
    return jnp.take(table, tokens, axis=0)


def _product(dtype: Any, x: Array, kernel: Array) -> Array:
    # The leading axes are merged here, because XLA would copy both operands of the kernel's gradient to merge them.
    flat = x.astype(dtype).reshape(-1, x.shape[-1]) @ kernel.astype(dtype)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


@cache
def _product_in(dtype: Any) -> Callable[[Array, Array], Array]:
    return partial(_product, dtype)


class LSTMCell(nnx.Module):
    """The LSTM of Hochreiter & Schmidhuber (1997) with forget gates (Gers et al. 2000).

    One product computes all gates. The bias of the forget gate starts at 1 (Jozefowicz et al. 2015).
    """

    def __init__(self, input_size: int, hidden_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.hidden_size = hidden_size
        bias = jnp.zeros((4 * hidden_size,)).at[hidden_size : 2 * hidden_size].set(1.0)
        self.gates = Linear(input_size + hidden_size, 4 * hidden_size, dtype=dtype, rngs=rngs)
        self.gates.bias = nnx.Param(bias)

    def __call__(self, carry: tuple[Array, Array], inputs: Array, constant: Array | None = None) -> tuple[Array, Array]:
        """Runs one step.

        Args:
            carry: (h, c), each float32 [...,H].
            inputs: [...,I].
            constant: [...,4H], added to the gates: the part of the input that is the same at all steps. Or None.

        Returns:
            The next (h, c), each float32 [...,H].
        """
        hidden, cell = carry
        gates = self.gates(jnp.concatenate([inputs, hidden.astype(inputs.dtype)], axis=-1))  # [...,4H]
        if constant is not None:
            gates = gates + constant
        # The cell state accumulates over the caption, so it stays in float32, whatever type the products have.
        return _lstm_cell(gates.astype(jnp.float32), cell)


@partial(jax.checkpoint, prevent_cse=False)  # the backward pass recomputes everything from the gates
def _lstm_cell(gates: Array, cell: Array) -> tuple[Array, Array]:
    gate_in, forget, candidate, out = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(gate_in) * jnp.tanh(candidate)
    return jax.nn.sigmoid(out) * jnp.tanh(cell), cell


class AdditiveAttention(nnx.Module):
    """Soft attention over regions with an additive score (Bahdanau et al. 2015; Xu et al. 2015, section 4.2)."""

    def __init__(
        self, region_size: int, query_size: int, attention_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.key = Projection(region_size, attention_size, dtype=dtype, rngs=rngs)
        self.query = Linear(query_size, attention_size, use_bias=False, dtype=dtype, rngs=rngs)
        self.score = nnx.Linear(attention_size, 1, use_bias=False, dtype=dtype, rngs=rngs)

    def project_keys(self, regions: Array) -> Array:
        """The part of the score that is the same at all steps: regions [B,N,D] -> keys [B,N,A]."""
        return self.key(regions)

    def __call__(
        self,
        query: Array,
        keys: Array,
        regions: Array,
        region_mask: Array | None,
        sentinel: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """Attends to the regions.

        Args:
            query: [B,M,Q].
            keys: [B,N,A], from ``project_keys``.
            regions: [B,N,D].
            region_mask: bool [B,N], the regions that exist; None: all of them.
            sentinel: the key [B,M,A] and value [B,M,D] of one more position to attend to, different for each sequence
                (Lu et al. 2017). The weights of the regions then sum to less than 1.

        Returns:
            The context [B,M,D] and the weights of the regions, float32 [B,M,N].
        """
        query = self.query(query)
        scores = with_constants(_scores, query, keys, self.score.kernel[...])  # [B,M,N]
        if region_mask is not None:
            scores = jnp.where(region_mask[:, None], scores, -1e9)
        if sentinel is not None:
            key, value = sentinel
            score = self.score.kernel[..., 0]  # [A]
            last = jnp.sum(score * jnp.tanh((key + query).astype(jnp.float32)), axis=-1, keepdims=True)  # [B,M,1]
            scores = jnp.concatenate([scores, last], axis=-1)  # [B,M,N+1]
        weights = jax.nn.softmax(scores, axis=-1)
        seen = weights[..., : keys.shape[1]]  # [B,M,N]
        context = with_constants(_weighted_sum, seen, regions)
        if sentinel is not None:
            context = context + weights[..., -1:].astype(value.dtype) * value
        return context, seen


def _scores(query: Array, keys: Array, kernel: Array) -> Array:
    return additive_scores(query, keys, kernel[:, 0])


def _weighted_sum(weights: Array, regions: Array) -> Array:
    return jnp.einsum("...bmn,bnd->...bmd", weights.astype(regions.dtype), regions)


def multi_head_attention(
    query: Array, keys: Array, values: Array, heads: int, mask: Array | None = None
) -> tuple[Array, Array]:
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, section 3.2), without the projections.

    Args:
        query: [...,Q,H].
        keys: [...,S,H].
        values: [...,S,H].
        heads: the number of heads; it must divide H.
        mask: bool, broadcastable to [...,Q,S], the positions that each query can attend to; None: all of them.

    Returns:
        The concatenated results of the heads [...,Q,H], and the mean of their weights, float32 [...,Q,S].
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
    """The output layer, from a hidden vector to the vocabulary.

    It has its own matrix or shares the embedding's (tied; Press & Wolf 2017, Inan et al. 2017).
    """

    def __init__(self, hidden_size: int, vocabulary_size: int, *, tied: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        self.kernel = (
            None if tied else nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (hidden_size, vocabulary_size)))
        )
        self.bias = nnx.Param(jnp.zeros((vocabulary_size,)))

    def __call__(self, hidden: Array, embedding: nnx.Embed) -> Array:
        """hidden [...,H] -> logits float32 [...,V]. ``embedding`` is used only if the layer is tied."""
        kernel: Any = embedding.embedding[...].T if self.kernel is None else self.kernel[...]
        # A bfloat16 product is accumulated and returned in float32. With 8 bits, words of similar score would tie.
        if jnp.dtype(self.dtype) == jnp.bfloat16:
            return _bfloat16_product(hidden, kernel) + self.bias[...]
        product = jnp.matmul(hidden.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return product + self.bias[...]


@jax.custom_vjp
def _bfloat16_product(x: Array, kernel: Array) -> Array:
    """x [...,I] times kernel [I,O] -> float32 [...,O]: operands in bfloat16, sums in float32.

    In the derivative of ``jnp.matmul`` with a float32 result, the gradient of the result is float32, and with it both
    products. Here it is rounded to bfloat16 first. The gradient of the kernel is not rounded again.
    """
    return jnp.matmul(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _bfloat16_product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _bfloat16_product(x, kernel), (x, kernel)


def _bfloat16_product_backward(kept: tuple[Array, Array], by_y: Array) -> tuple[Array, Array]:
    x, kernel = kept
    flat = by_y.astype(jnp.bfloat16).reshape(-1, by_y.shape[-1])
    by_x = jnp.matmul(flat, kernel.astype(jnp.bfloat16).T, preferred_element_type=jnp.float32).reshape(x.shape)
    rows = x.astype(jnp.bfloat16).reshape(-1, x.shape[-1])
    by_kernel = jnp.matmul(rows.T, flat, preferred_element_type=jnp.float32)
    return by_x.astype(x.dtype), by_kernel.astype(kernel.dtype)


_bfloat16_product.defvjp(_bfloat16_product_forward, _bfloat16_product_backward)
