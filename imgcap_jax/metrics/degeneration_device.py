"""Repeated content words of captions from token ids on the device: for self-critical training and a logit rule.

``imgcap_jax.metrics.degeneration.repeated_words`` defines what a repeated word is.

Letters: B images per batch, M captions per image, T caption length.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.special_tokens import BOS, EOS, PAD


@dataclass(frozen=True)
class FunctionWords:
    """The ids of the words that separate phrases. All other words are content words.

    Attributes:
        ids: all function words.
        conjunctions: the function words that begin a clause.
    """

    ids: tuple[int, ...]
    conjunctions: tuple[int, ...] = ()


def repeated_words(tokens: Array, function_words: FunctionWords) -> Array:
    """Counts the repeated words of captions.

    Args:
        tokens: ids int32 [B,M,T]: words, eos, pad.
        function_words: the ids of the function words.

    Returns:
        Counts int32 [B,M].
    """

    def repeated(t: Array) -> Array:
        """Whether word t is a repeated word, bool [B,M]."""
        before = jnp.where(np.arange(tokens.shape[-1]) < t, tokens, PAD)  # [B,M,T]
        word = tokens[..., t, None]  # [B,M,1]
        return jnp.any((word == repeating_words(before, t, function_words)) & (word != PAD), axis=-1)

    return jax.vmap(repeated)(jnp.arange(tokens.shape[-1])).sum(0)


def repeating_words(tokens: Array, t: Array, function_words: FunctionWords) -> Array:
    """The content words that would be repeated words if they came next.

    Args:
        tokens: ids int32 [B,M,T] of the words so far, then pad.
        t: int32 [], the number of words so far.
        function_words: the ids of the function words.

    Returns:
        Ids int32 [B,M,N], between pads. N is T // 2 + T.
    """
    length = tokens.shape[-1]
    place = np.arange(length)
    words = jnp.where(place < t, jnp.take(tokens, jnp.maximum(t - 1 - place, 0), axis=-1), PAD)  # [B,M,T], last first
    content = ~_is_one_of(words, (PAD, BOS, EOS, *function_words.ids))  # [B,M,T]

    # The content words alone, last first. The word at n - 1 completes a phrase of n words that directly follows itself
    # if the n - 1 words before it equal the last n - 1 words.
    rank = jnp.cumsum(content, axis=-1) - 1  # [B,M,T]
    alone = jnp.where((content & (rank == place[:, None, None, None])), words, PAD).sum(-1)  # [T,B,M]
    alone = jnp.moveaxis(alone, 0, -1)  # [B,M,T]
    direct = _continues(alone, needed=jnp.broadcast_to(place, words.shape))[..., : length // 2]  # [B,M,T//2]

    # The word at n completes a phrase of the same clause that ends there if its other words equal the last words.
    size = _run(content)  # [B,M,T], the number of words of the phrase from its start to each of its words
    current = size[..., :1]  # [B,M,1], the number of words of the unfinished phrase
    ends = content & ~jnp.pad(content, [(0, 0), (0, 0), (1, 0)], constant_values=True)[..., :-1]  # [B,M,T]
    clause = jnp.cumsum(_is_one_of(words, function_words.conjunctions), axis=-1) == 0  # [B,M,T]
    again = ends & clause & (size == current + 1)
    again &= _continues(words, needed=jnp.broadcast_to(current, words.shape))
    return jnp.concatenate([jnp.where(direct, alone[..., : length // 2], PAD), jnp.where(again, words, PAD)], axis=-1)


def _continues(words: Array, needed: Array) -> Array:
    """Whether the words before each word equal the last words: [B,M,T] -> bool [B,M,T].

    ``words`` are in reverse order. ``needed`` [B,M,T] is the number of words that are compared for each of them.
    """
    length = words.shape[-1]
    last, back = np.arange(length), np.arange(length)[:, None] + 1
    padded = jnp.pad(words, [(0, 0), (0, 0), (0, length)], constant_values=PAD)
    equal = words[..., None, :] == padded[..., back + last]  # [B,M,T,T]
    return jnp.all(equal | (last >= needed[..., None]), axis=-1)


def _run(content: Array) -> Array:
    """The number of consecutive content words from each place on, 0 if it has none: bool [B,M,T] -> int32 [B,M,T]."""
    length = content.shape[-1]
    place = np.arange(length)
    # The next place without a content word. (ONNX has no cumulative minimum of integers.)
    later = place >= place[:, None]  # [T,T]
    stops = jnp.where(later & ~content[..., None, :], place, length).min(-1)
    return stops - place


def _is_one_of(words: Array, ids: tuple[int, ...]) -> Array:
    """Whether words are among ids. A search calls this in every step."""

    def by_table(words: Array) -> Array:
        table = np.zeros(max(ids, default=0) + 2, bool)  # the last entry stands for all larger ids
        table[list(ids)] = True
        return jnp.asarray(table)[jnp.minimum(words, len(table) - 1)]

    def by_comparison(words: Array) -> Array:
        return (words[..., None] == np.array(ids, np.int32)).any(-1)

    # On TPU, comparisons take the place of a gather, for which the compiler (``imgcap plan``) has no estimate of time.
    return jax.lax.platform_dependent(words, tpu=by_comparison, default=by_table)
