"""Beam search and diverse beam search."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn
from imgcap_jax.decoding.limits import check_limits
from imgcap_jax.decoding.rules import LOWEST, Rule
from imgcap_jax.decoding.search import (
    Choice,
    LengthPenalty,
    check_carry,
    decoded,
    group_search,
    merged,
    top_continuations,
)


def beam_search(
    step: StepFn,
    carry: Any,
    *,
    beam: int,
    max_steps: int,
    length_norm: float = 0.0,
    length_penalty: LengthPenalty = "power",
    rules: Sequence[Rule] = (),
    n_best: int | None = None,
) -> Decoded:
    """Finds K captions per image with (approximately) the highest score.

    Each step takes the K best continuations of the live hypotheses, including eos. Hypotheses that end move to the
    finished set, which keeps the K best by score. The others stay live. Hypotheses that are unfinished after T steps
    also compete, without eos. Beam 1 is therefore greedy decoding for every length norm, and a beam that can hold all
    prefixes and their continuations is exhaustive search. If scores tie, the lower beam ranks first, then the lower id.
    The loop ends as soon as no better caption is possible (see ``group_search``).

    Args:
        step: (carry, tokens int32 [B,K]) -> (carry, logits [B,K,V]).
        carry: pytree with leaves [B,K,...]. The K rows of an image are equal.
        beam: K, the number of beams. The carry must have the same number.
        max_steps: T, the maximum caption length, including eos.
        length_norm: exponent of the length penalty. The length includes eos. 0 disables the penalty.
        length_penalty: the divisor of the log-probability, see ``LengthPenalty``.
        rules: logit rules, applied in order. Hypotheses are ranked by the log-probabilities after the rules, which are
            not normalised. `log_prob` and `word_log_probs` are the model's log-probabilities before the rules.
        n_best: the number of captions that are guaranteed to be the best that K beams find. None means all K. A smaller
            number ends the loop earlier; the remaining captions are the best found up to that step.

    Returns:
        Decoded with [B,K] captions, best first. `score` is the ranking score, including the length penalty.

    Raises:
        UserError: beam, max_steps or n_best is below 1, or length_norm is negative.
        ValueError: the leaves of the carry do not all start with [B,K].
    """
    return diverse_beam_search(
        step,
        carry,
        beam=beam,
        groups=1,
        diversity=0.0,
        max_steps=max_steps,
        length_norm=length_norm,
        length_penalty=length_penalty,
        rules=rules,
        n_best=n_best,
    )


def diverse_beam_search(
    step: StepFn,
    carry: Any,
    *,
    beam: int,
    groups: int,
    diversity: float,
    max_steps: int,
    length_norm: float = 0.0,
    length_penalty: LengthPenalty = "power",
    rules: Sequence[Rule] = (),
    n_best: int | None = None,
) -> Decoded:
    """Diverse beam search with Hamming diversity (Vijayakumar et al. 2016, arXiv:1610.02424, algorithm 1).

    The beams are divided into groups, which choose one after another within each step. The log-probability of a
    continuation is lowered by ``diversity`` for each time that an earlier group has chosen the same word (or eos) in
    this step. The penalty affects only this choice. Hypotheses are continued and ranked with their log-probability
    without it. With one group this is beam search.

    Args:
        step: (carry, tokens int32 [B,K]) -> (carry, logits [B,K,V]).
        carry: pytree with leaves [B,K,...]. The K rows of an image are equal.
        beam: K, the total number of beams in all groups.
        groups: G, the number of groups. K must be divisible by G.
        diversity: lambda in the paper, which uses 0.2 to 0.8 in its experiments.
        max_steps: T, the maximum caption length, including eos.
        length_norm: as in ``beam_search``.
        length_penalty: as in ``beam_search``.
        rules: as in ``beam_search``.
        n_best: as in ``beam_search``.

    Returns:
        Decoded with the [B,K] captions of all groups, best first. Two groups can find the same caption.

    Raises:
        UserError: beam, groups, max_steps or n_best is below 1, beam is not divisible by groups, or length_norm or
            diversity is negative.
        ValueError: the leaves of the carry do not all start with [B,K].
    """
    check_limits(
        beam=beam, groups=groups, diversity=diversity, max_steps=max_steps, length_norm=length_norm, n_best=n_best
    )
    check_carry(carry, beam)
    width = beam // groups

    def choose(totals: Array) -> Choice:
        batch, vocabulary = totals.shape[0], totals.shape[-1]
        chosen = jnp.zeros((batch, vocabulary), jnp.float32)  # number of times earlier groups chose each word
        rows = jnp.arange(batch)[:, None]
        parts: list[Choice] = []
        for group in range(groups):
            own = totals[:, group]  # [B,K,V]
            total, parent, word = top_continuations(own - diversity * chosen[:, None] if group else own, width)
            if group:
                flat = own.reshape(batch, -1)
                total = jnp.take_along_axis(flat, parent * vocabulary + word, axis=-1)
            chosen = chosen.at[rows, word].add(jnp.where(total < LOWEST, 0.0, 1.0))
            parts.append(Choice(total, group * width + parent, word))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *parts)

    everywhere = (True,) * groups
    hypotheses, steps = group_search(
        step,
        carry,
        choose,
        groups=groups,
        width=width,
        first=everywhere,
        wanted=everywhere,
        shared=False,
        max_steps=max_steps,
        length_norm=length_norm,
        length_penalty=length_penalty,
        rules=rules,
        n_best=n_best,
    )
    return decoded(merged(hypotheses, beam), steps)
