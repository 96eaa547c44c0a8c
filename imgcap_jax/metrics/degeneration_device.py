"""Repeated content words of captions from token ids on the device: for self-critical training and a logit rule.

Letters: B images per batch, M captions per image, T caption length.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.special_tokens import BOS, EOS, PAD


def repeated_words(tokens: Array, function_words: tuple[int, ...]) -> Array:
    """Counts the content words that complete a repetition, as ``degeneration.repeated_words`` does.

    Args:
        tokens: ids int32 [B,M,T]: words, eos, pad.
        function_words: the ids of the words that are left out.

    Returns:
        Counts int32 [B,M].
    """
    length = tokens.shape[-1]
    words = _content_words(tokens, function_words)  # [B,M,T]
    size = np.arange(1, length // 2 + 1)[:, None]  # [S,1], the length of a phrase
    place = np.arange(length)  # [T]
    earlier = words[..., np.maximum(place - size, 0)]  # [B,M,S,T]
    same = (words[..., None, :] == earlier) & (earlier != PAD) & (place >= size)  # [B,M,S,T]
    total = jnp.cumsum(same, axis=-1)  # [B,M,S,T]
    before = jnp.where(place >= size, jnp.take_along_axis(total, np.maximum(place - size, 0)[None, None], axis=-1), 0)
    return jnp.any(total - before == size, axis=-2).sum(-1)


def repeating_words(tokens: Array, function_words: tuple[int, ...]) -> Array:
    """The content words that would complete a repetition if they came next.

    Args:
        tokens: ids int32 [B,M,T] of the words so far, then pad.
        function_words: the ids of the words that are left out.

    Returns:
        Ids int32 [B,M,S], S = T // 2; pad if a phrase of this length cannot be completed.
    """
    length = tokens.shape[-1]
    longest = length // 2
    words = _content_words(tokens, function_words)[..., ::-1]  # [B,M,T], the last word first
    size = np.arange(1, longest + 1)  # [S]
    back = np.arange(longest - 1)  # [S-1]
    # A phrase of n words is completed by the n-th last word if the last n-1 words equal the n-1 words before that one.
    equal = words[..., None, : longest - 1] == words[..., back + size[:, None]]  # [B,M,S,S-1]
    complete = jnp.all(equal | (back >= size[:, None] - 1), axis=-1)  # [B,M,S]
    return jnp.where(complete, words[..., size - 1], PAD)


def _content_words(tokens: Array, function_words: tuple[int, ...]) -> Array:
    """The content words of captions [B,M,T] in their order, preceded by pad: [B,M,T]."""
    left_out = np.zeros(max((EOS, *function_words)) + 1, bool)  # a table, because a search calls this in every step
    left_out[[PAD, BOS, EOS, *function_words]] = True
    content = ~jnp.take(jnp.asarray(left_out), tokens, mode="fill", fill_value=False)  # [B,M,T]
    length = tokens.shape[-1]
    after = jnp.cumsum(content[..., ::-1], axis=-1)[..., ::-1]  # [B,M,T], the number of content words from here on
    moves = content[..., None] & (length - after[..., None] == np.arange(length))  # [B,M,T,T]
    return jnp.where(moves, tokens[..., None], PAD).sum(-2)
