"""Losses over captions, as sums over words, so that the sums of any number of devices can be added."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.loops import Loop, named_loop
from imgcap_jax.models.members import has_effect, most
from imgcap_jax.special_tokens import BOS, EOS, PAD

CHUNK = 768
"""The largest number of words that are scored at a time."""


class WordLoss(Protocol):
    """A loss per word: a pure function of the scores of a word and the true word. It is differentiated by JAX.

    As a field of an experiment it is a frozen dataclass, such as ``SmoothedCrossEntropy``.
    """

    def __call__(self, logits: Array, targets: Array) -> Array:
        """Logits float32 [n,V] and true words int32 [n] -> losses float32 [n].

        Losses must be finite for all finite logits. The targets are words, unk or eos.
        """
        ...


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """Cross-entropy with label smoothing (Szegedy et al. 2016)."""

    label_smoothing: float = 0.0
    """The share of the target's mass that is spread evenly over the V - 2 words that can occur: all except pad and
    bos."""

    def __call__(self, logits: Array, targets: Array) -> Array:
        """See ``WordLoss``."""
        words = jnp.arange(logits.shape[-1])
        spread = jnp.where((words == PAD) | (words == BOS), 0.0, self.label_smoothing / max(1, len(words) - 2))
        wanted = jnp.where(words == targets[:, None], 1.0 - self.label_smoothing, 0.0) + spread
        return log_normaliser(logits) - (wanted * logits).sum(axis=-1)


@dataclass(frozen=True)
class RDrop:
    """The mean loss of two passes with different dropout masks, and how much their distributions differ.

    R-Drop (Liang et al. 2021, https://arxiv.org/abs/2106.14448), equation 4, divided by two.
    """

    weight: float
    """alpha in the paper, which uses 1 to 5: that of the mean of both KL divergences."""
    word_loss: WordLoss
    """The loss of a pass."""

    def __call__(self, logits: Array, targets: Array) -> Array:
        """Logits float32 [n,2,V] of the two passes and true words int32 [n] -> losses float32 [n]."""
        first, second = (jax.nn.log_softmax(logits[:, number]) for number in (0, 1))
        # The sum of KL(p, q) and KL(q, p). Words that cannot occur have -inf in both.
        difference = jnp.where(jnp.isfinite(first), first - second, 0.0)
        divergence = ((jnp.exp(first) - jnp.exp(second)) * difference).sum(axis=-1)
        losses = self.word_loss(logits[:, 0], targets) + self.word_loss(logits[:, 1], targets)
        return 0.5 * losses + 0.25 * self.weight * divergence


@dataclass(frozen=True)
class Distillation:
    """The loss of the true word, and the cross-entropy with the distribution of a teacher.

    Word-level knowledge distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Kim and Rush 2016,
    https://arxiv.org/abs/1606.07947).
    """

    weight: float
    """The share of the teacher's distribution, 0 to 1."""
    word_loss: WordLoss
    """The loss of the true word."""

    def __call__(self, logits: Array, targets: Array) -> Array:
        """Logits float32 [n,2,V] of the student and the teacher, true words int32 [n] -> losses float32 [n]."""
        student, teacher = logits[:, 0], jax.lax.stop_gradient(logits[:, 1])
        imitation = log_normaliser(student) - (jax.nn.softmax(teacher) * student).sum(axis=-1)
        return (1 - self.weight) * self.word_loss(student, targets) + self.weight * imitation


@jax.custom_jvp
def log_normaliser(logits: Array) -> Array:
    """``logsumexp`` of logits [n,V] over V: [n].

    Its derivative is the softmax, which is computed from the logits and the result in one pass over V. The derivative
    of ``jax.nn.logsumexp`` keeps a second array [n,V] for it.
    """
    return jax.nn.logsumexp(logits, axis=-1)


@log_normaliser.defjvp
def _log_normaliser_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logits,), (tangent,) = primals, tangents
    log_total = log_normaliser(logits)
    return log_total, (jnp.exp(logits - log_total[:, None]) * tangent).sum(axis=-1)


CROSS_ENTROPY = SmoothedCrossEntropy()


class LossSums(NamedTuple):
    """objective: what is differentiated; log_likelihood: of the true words, without smoothing; words: their number."""

    objective: Array
    log_likelihood: Array
    words: Array


def caption_loss(
    score_words: Callable[[Array], Array],
    hidden: Array,
    tokens: Array,
    weight: Array,
    *,
    word_loss: WordLoss = CROSS_ENTROPY,
    attention: Array | None = None,
    attention_penalty: float = 0.0,
    region_mask: Array | None = None,
) -> LossSums:
    """The loss of the next words, summed over all words of the batch.

    Args:
        score_words: hidden [n,F] -> logits [n,V] (the decoder's ``logits``).
        hidden: [B,M,T-1,F], the decoder's output after reading tokens[..., :-1].
        tokens: [B,M,T]; the targets are tokens[..., 1:], and ``pad`` is not counted.
        weight: [B], 0 for rows that only fill the batch.
        word_loss: the loss per word.
        attention: [B,M,T-1,N] weights, for the penalty.
        attention_penalty: lambda of the doubly stochastic penalty, added to the loss of each caption:
            lambda * sum_i (1 - sum_t alpha_ti)^2 (Xu et al. 2015, equation 14).
        region_mask: [B,N], the regions that exist; None: all of them. The penalty ignores the others.
    """
    targets = tokens[..., 1:]
    counted = (targets != PAD) * weight[:, None, None].astype(jnp.float32)  # [B,M,T-1]
    log_likelihood, objective = packed_word_loss(score_words, hidden, targets, counted, word_loss)
    if attention is not None and has_effect(attention_penalty):
        seen = (attention * counted[..., None]).sum(axis=2)  # [B,M,N]
        has_words = counted.max(axis=2)  # [B,M]
        unseen = jnp.square(1.0 - seen)
        if region_mask is not None:
            unseen = unseen * region_mask[:, None]
        objective += attention_penalty * (unseen.sum(axis=-1) * has_words).sum()
    return LossSums(objective, log_likelihood, counted.sum())


def packed_word_loss(
    score_words: Callable[[Array], Array], hidden: Array, targets: Array, counted: Array, word_loss: WordLoss
) -> tuple[Array, Array]:
    """Weighted sums of the words' log-likelihoods and losses.

    The vocabulary layer takes most of a step's arithmetic, its logits most of a step's memory, and half of the places
    in a batch of captions are pad. Therefore the counted words are packed and scored in chunks, as many as this batch
    has words for. The gradient of a chunk is computed while its logits exist, so that they are neither kept nor
    computed again.

    Args:
        score_words: hidden [n,F] -> logits [n,V], or [n,P,V] of P passes for a loss that compares them. It can close
            over float arrays, which are differentiated too, and must not close over other arrays.
        hidden: [...,F].
        targets: int32 [...], the true words.
        counted: float32 [...], the weight of each word; words of weight 0 are not scored.
        word_loss: the loss per word. It must not close over arrays.

    Returns:
        (log_likelihood, objective), float32 [] both; the log-likelihood is that of the first pass. Only the objective
        has a gradient, with respect to ``hidden`` and the arrays that ``score_words`` closes over, but not to
        ``counted``.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk_size(flat.shape[0])
    converted, closed_over = _converted(score_words, flat, [chunk, chunk * 3 // 4, chunk // 4])
    log_likelihood, objective = _packed(
        converted, word_loss, chunk, closed_over, flat, targets.reshape(-1), counted.reshape(-1)
    )
    return jax.lax.stop_gradient(log_likelihood), objective


def chunk_size(places: int) -> int:
    """The number of words that are scored at a time, for this number of places of words: a multiple of 4."""
    # Captions of COCO have 0.55 words per step of 20, which one chunk of 4/7 holds.
    return -(-min(CHUNK, -(-places * 4 // 7)) // 4) * 4


def _converted(
    score_words: Callable[[Array], Array], hidden: Array, sizes: Sequence[int]
) -> tuple[Callable[..., Array], list[Array]]:
    """``jax.closure_convert`` for several numbers of rows.

    Returns:
        (hidden [n,F], *arrays) -> logits [n,V], for every n in ``sizes``; and the arrays, which ``score_words`` closes
        over.
    """
    versions: dict[int, tuple[Callable[..., Array], list[int]]] = {}
    closed_over: list[Array] = []
    for size in sizes:
        version, arrays = jax.closure_convert(score_words, jax.ShapeDtypeStruct((size, hidden.shape[1]), hidden.dtype))
        # The same arrays are closed over, perhaps in another order.
        closed_over.extend(array for array in arrays if not any(array is known for known in closed_over))
        versions[size] = version, [next(i for i, known in enumerate(closed_over) if known is array) for array in arrays]

    def score(hidden: Array, *closed_over: Array) -> Array:
        version, places = versions[len(hidden)]
        return version(hidden, *(closed_over[place] for place in places))

    return score, closed_over


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _packed(
    score: Callable[..., Array],
    word_loss: WordLoss,
    chunk: int,
    closed_over: list[Array],
    hidden: Array,
    targets: Array,
    counted: Array,
) -> tuple[Array, Array]:
    def sums(h: Array, target: Array, weight: Array) -> tuple[tuple[Array, Array], tuple[()]]:
        objective, log_likelihood = _chunk_sums(score(h, *closed_over), target, weight, word_loss)
        return (log_likelihood, objective), ()

    return _over_chunks(sums, (hidden, targets, counted), counted != 0, chunk)[0]


def _packed_forward(
    score: Callable[..., Array],
    word_loss: WordLoss,
    chunk: int,
    closed_over: list[Array],
    hidden: Array,
    targets: Array,
    counted: Array,
) -> tuple[tuple[Array, Array], tuple[Any, Array]]:
    def differentiated(h: Array, target: Array, weight: Array) -> tuple[Any, Array]:
        def chunk_loss(h: Array, closed_over: list[Array]) -> tuple[Array, Array]:
            return _chunk_sums(score(h, *closed_over), target, weight, word_loss)

        objective, transpose, log_likelihood = jax.vjp(chunk_loss, h, closed_over, has_aux=True)
        by_hidden, gradients = transpose(jnp.ones_like(objective))
        return ((log_likelihood, objective), gradients), by_hidden

    (sums, gradients), by_hidden = _over_chunks(differentiated, (hidden, targets, counted), counted != 0, chunk)
    return sums, (gradients, by_hidden)


def _packed_backward(
    score: Callable[..., Array], word_loss: WordLoss, chunk: int, kept: tuple[Any, Array], by_sums: tuple[Array, Array]
) -> tuple[Any, Array, None, None]:
    _, by_objective = by_sums
    gradients, by_hidden = jax.tree.map(lambda leaf: (leaf * by_objective).astype(leaf.dtype), kept)
    return gradients, by_hidden, None, None


_packed.defvjp(_packed_forward, _packed_backward)


def _over_chunks(
    function: Callable[..., tuple[Any, Any]], arrays: Sequence[Array], counted: Array, chunk: int
) -> tuple[Any, Any]:
    """Applies a function to chunks of the counted rows.

    The first chunk is always computed. Chunks of the same size follow while they are more than 3/4 full. The rest is
    one chunk of 1/4 or 3/4 of the size.

    Args:
        function: (rows of each array, [n,...]) -> (a pytree to add up over chunks, a pytree of values [n,...] of the
            rows). The rows that fill the last chunk are 0.
        arrays: [P,...] each, the rows in their places.
        counted: bool [P], the places of the rows that count.
        chunk: the number of rows per chunk, a multiple of 4.

    Returns:
        The sums, and the values of the rows in their places [P,...]; the values of the others are 0, or those of a row
        of zeros.
    """
    places = counted.shape[0]
    count = most(jnp.sum(counted, dtype=jnp.int32))
    order = jnp.argsort(~counted, stable=True)  # counted rows come first
    order = jnp.pad(order, (0, chunk), constant_values=places)  # past the end: read as 0

    def of_chunk(start: Array | int, size: int) -> tuple[Any, Any]:
        rows = jax.lax.dynamic_slice_in_dim(order, start, size)
        return function(*(leaf.at[rows].get(mode="fill", fill_value=0) for leaf in arrays))

    def put(values: Any, more: Any, start: Array | int) -> Any:
        return jax.tree.map(
            lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part, start, axis=0), values, more
        )

    def advance(state: tuple[Array, Any, Any], size: int) -> tuple[Array, Any, Any]:
        start, sums, values = state
        more_sums, more_values = of_chunk(start, size)
        return start + size, jax.tree.map(jnp.add, sums, more_sums), put(values, more_values, start)

    # The sums start with those of the first chunk, because adding to zeros takes time for arrays as large as a model.
    sums, values = of_chunk(0, chunk)
    every = jax.tree.map(lambda leaf: jnp.zeros((len(order), *leaf.shape[1:]), leaf.dtype), values)
    state = jnp.asarray(chunk, jnp.int32), sums, put(every, values, 0)
    # Each loop but the first runs once at most. Unlike a branch, it does not copy the sums.
    for name, size, fewest in _loops(chunk):
        if places > chunk + fewest:
            with named_loop(name):
                state = jax.lax.while_loop(
                    lambda state, fewest=fewest: state[0] + fewest < count,  # type: ignore[misc]
                    partial(advance, size=size),
                    state,
                )
    _, sums, every = state
    back = jnp.argsort(order[:places])
    return sums, jax.tree.map(lambda leaf: leaf[back], every)


def _loops(chunk: int) -> tuple[tuple[Loop, int, int], ...]:
    """The loops of ``_over_chunks``: their name, the rows per pass, and the rows left with which they end."""
    quarter = chunk // 4
    return (
        ("word_chunks", chunk, 3 * quarter),
        ("three_quarter_chunk", 3 * quarter, quarter),
        ("quarter_chunk", quarter, 0),
    )


def passes_of_loops(places: int, count: int) -> dict[Loop, int]:
    """How often the loops over chunks run, in addition to the first chunk, for this number of counted words.

    Args:
        places: the places of words in the batch of one device.
        count: those that are counted.
    """
    chunk = chunk_size(places)
    start, passes = chunk, {}
    for name, size, fewest in _loops(chunk):
        passes[name] = 0
        while places > chunk + fewest and start + fewest < count:
            start, passes[name] = start + size, passes[name] + 1
    return passes


def _chunk_sums(logits: Array, targets: Array, weight: Array, word_loss: WordLoss) -> tuple[Array, Array]:
    """Weighted sums of the losses and of the log-likelihoods of logits [n,V] or [n,P,V]."""
    logits = logits.astype(jnp.float32)
    first = logits if logits.ndim == 2 else logits[:, 0]
    true = jnp.take_along_axis(first, targets[:, None], axis=-1)[:, 0]
    log_likelihood = jax.lax.stop_gradient(true - log_normaliser(first))  # [n]
    # Rows of weight 0 fill the last chunk. They get a target that occurs, because a loss may be infinite for pad.
    losses = word_loss(logits, jnp.where(weight != 0, targets, EOS))
    if losses.shape != targets.shape:
        raise UserError(
            f"the word loss {word_loss!r} returned shape {list(losses.shape)} for {list(targets.shape)} words; it must "
            f"return one number per word"
        )
    return (losses * weight).sum(), (log_likelihood * weight).sum()
