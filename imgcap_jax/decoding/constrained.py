"""Constrained beam search: given words must occur in the captions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn
from imgcap_jax.decoding.limits import check_limits
from imgcap_jax.decoding.rules import FORBIDDEN, LOWEST, Rule
from imgcap_jax.decoding.search import (
    Choice,
    Hypotheses,
    LengthPenalty,
    check_carry,
    decoded,
    group_search,
    merged,
    top_continuations,
)
from imgcap_jax.errors import UserError
from imgcap_jax.special_tokens import EOS

MOST_WORDS = 4
"""Maximum number of required words. Each word doubles the number of beams."""


def constrained_rows(beam: int, words: Sequence[Sequence[int]]) -> int:
    """The number of sequences per image that the carry of ``constrained_beam_search`` must have.

    Raises:
        UserError: there are more than ``MOST_WORDS`` words.
    """
    if len(words) > MOST_WORDS:
        raise UserError(f"decoding: {len(words)} words must occur; use at most {MOST_WORDS} (each doubles the beams)")
    return beam * 2 ** len(words)


def constrained_beam_search(
    step: StepFn,
    carry: Any,
    *,
    beam: int,
    words: Sequence[Sequence[int]],
    max_steps: int,
    length_norm: float = 0.0,
    length_penalty: LengthPenalty = "power",
    rules: Sequence[Rule] = (),
    n_best: int | None = None,
) -> Decoded:
    """Constrained beam search (Anderson et al. 2017, arXiv:1612.00576): each of n words must occur.

    A finite-state machine tracks which of the words a hypothesis contains. Each of its 2**n states has its own beam, so
    that hypotheses with a rare word do not compete with hypotheses without it. The beam of a state takes the K best
    continuations, from all states, that lead into this state. Only the state with all words is accepting. In the other
    states a caption ends only if the rules allow nothing except eos.

    Args:
        step: (carry, tokens int32 [B,K*2**n]) -> (carry, logits [B,K*2**n,V]).
        carry: pytree with leaves [B,K*2**n,...] (see ``constrained_rows``). The rows of an image are equal.
        beam: K, the number of beams per state.
        words: n tuples of ids. One id of each tuple must occur (the forms of a word).
        max_steps: T, the maximum caption length, including eos.
        length_norm: as in ``beam_search``.
        length_penalty: as in ``beam_search``.
        rules: as in ``beam_search``.
        n_best: as in ``beam_search``.

    Returns:
        Decoded with [B,K] captions, best first. If no caption with all words is found in T steps, these are the
        captions with the largest number of them.

    Raises:
        UserError: beam, max_steps or n_best is below 1, length_norm is negative, or there are more than ``MOST_WORDS``
            words.
        ValueError: the leaves of the carry do not all start with [B,K*2**n].
    """
    check_limits(beam=beam, max_steps=max_steps, length_norm=length_norm, n_best=n_best)
    check_carry(carry, constrained_rows(beam, words))
    states = 2 ** len(words)
    complete = states - 1  # bit i of a state is set if word i has occurred

    def choose(totals: Array) -> Choice:
        vocabulary = totals.shape[-1]
        gained = np.zeros(vocabulary, np.int32)
        for bit, forms in enumerate(words):
            gained[list(forms)] |= 1 << bit
        # Captions end in the accepting state. In other states they end only if no other word is allowed.
        others = jnp.max(totals.at[..., EOS].set(FORBIDDEN), axis=-1)  # [B,S,K]
        waits = (jnp.arange(states) != complete)[:, None] & ~(others < LOWEST)  # [B,S,K]
        totals = totals.at[..., EOS].set(jnp.where(waits, FORBIDDEN, totals[..., EOS]))
        parts: list[Choice] = []
        for state in range(states):
            sources = [source for source in range(states) if source | state == state]
            leads = np.stack([(source | gained) == state for source in sources])  # [sources,V]
            into = jnp.where(leads[:, None], totals[:, np.array(sources)], FORBIDDEN)  # [B,sources,K,V]
            total, parent, word = top_continuations(into.reshape(len(totals), -1, vocabulary), beam)
            parts.append(Choice(total, jnp.array(sources)[parent // beam] * beam + parent % beam, word))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *parts)

    hypotheses, steps = group_search(
        step,
        carry,
        choose,
        groups=states,
        width=beam,
        first=[state == 0 for state in range(states)],
        wanted=[state == complete for state in range(states)],
        shared=True,
        max_steps=max_steps,
        length_norm=length_norm,
        length_penalty=length_penalty,
        rules=rules,
        n_best=n_best,
    )
    return decoded(_most_words(hypotheses, beam), steps)


def _most_words(hypotheses: Hypotheses, beam: int) -> Hypotheses:
    """Reduces hypotheses [B,S,K] to the K best of those with the largest number of required words, [B,1,K]."""
    score = hypotheses.score
    found = jnp.array([bin(state).count("1") for state in range(score.shape[1])])  # [S]
    exists = jnp.any(~(score < LOWEST), axis=-1)  # [B,S]
    most = jnp.max(jnp.where(exists, found, -1), axis=-1, keepdims=True)  # [B,1]
    return merged(hypotheses._replace(score=jnp.where((found == most)[..., None], score, FORBIDDEN)), beam)
