"""Constrained beam search: captions in which given words occur."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn
from imgcap_jax.decoding.rules import FORBIDDEN, LOWEST, Rule
from imgcap_jax.decoding.search import (
    Choice,
    Hypotheses,
    LengthPenalty,
    check_search,
    decoded,
    group_search,
    merged,
    top_continuations,
)
from imgcap_jax.errors import UserError
from imgcap_jax.special_tokens import EOS

MOST_WORDS = 4
"""So many words may be asked for: each doubles the beams."""


def constrained_rows(beam: int, words: Sequence[Sequence[int]]) -> int:
    """Sequences an image that ``constrained_beam_search`` needs its carry started with.

    Raises:
        UserError: too many words.
    """
    if len(words) > MOST_WORDS:
        raise UserError(f"decoding: {len(words)} words must occur; each doubles the beams, give at most {MOST_WORDS}")
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
    """Constrained beam search (Anderson et al. 2017, arXiv:1612.00576): each of n words has to occur.

    A finite-state machine notes which of the words a hypothesis has; each of its 2**n states has a beam of its own, so
    that hypotheses with a rare word needn't compete with those without. A state's beam takes the K best continuations,
    from whatever state, that lead into it. Only the state with all words accepts: elsewhere a caption ends only where
    the rules leave it nothing else.

    Args:
        step: (carry, tokens int32 [B,K*2**n]) -> (carry, logits [B,K*2**n,V]).
        carry: pytree, every leaf [B,K*2**n,...] (see ``constrained_rows``), the rows of an image equal.
        beam: K, beams a state.
        words: n tuples of ids; of each tuple one has to occur (forms of a word).
        max_steps: T, the longest caption with its eos.
        length_norm: as in ``beam_search``.
        length_penalty: as in ``beam_search``.
        rules: as in ``beam_search``.
        n_best: as in ``beam_search``.

    Returns:
        Decoded with [B,K] captions, best first. Where none with all words was found in T steps, those with most of
        them.

    Raises:
        UserError: beam or max_steps below 1, a negative length_norm, too many words.
        ValueError: the carry's leaves don't lead with one [B,K*2**n].
    """
    if beam < 1:
        raise UserError(f"decoding: beam is {beam}; give at least 1")
    check_search(carry, constrained_rows(beam, words), max_steps, length_norm, n_best)
    states = 2 ** len(words)
    complete = states - 1  # bit i of a state: word i has occurred

    def choose(totals: Array) -> Choice:
        vocabulary = totals.shape[-1]
        gained = np.zeros(vocabulary, np.int32)
        for bit, forms in enumerate(words):
            gained[list(forms)] |= 1 << bit
        # Captions end in the accepting state, elsewhere only where nothing else is left.
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
    """Of hypotheses [B,S,K], the K best among those that have as many of the words as any has: [B,1,K]."""
    score = hypotheses.score
    found = jnp.array([bin(state).count("1") for state in range(score.shape[1])])  # [S]
    exists = jnp.any(~(score < LOWEST), axis=-1)  # [B,S]
    most = jnp.max(jnp.where(exists, found, -1), axis=-1, keepdims=True)  # [B,1]
    return merged(hypotheses._replace(score=jnp.where((found == most)[..., None], score, FORBIDDEN)), beam)
