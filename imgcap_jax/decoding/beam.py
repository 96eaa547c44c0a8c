"""Beam search and diverse beam search."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn
from imgcap_jax.decoding.rules import LOWEST, Rule
from imgcap_jax.decoding.search import (
    Choice,
    LengthPenalty,
    check_search,
    decoded,
    group_search,
    merged,
    top_continuations,
)
from imgcap_jax.errors import UserError


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
    """Finds K captions an image with (nearly) the highest score.

    Each step takes the K best continuations of the live hypotheses, eos included. Those that end go to the
    finished set, which keeps the K best by score; the rest stay live. Hypotheses still unfinished at T
    compete too, without eos. So beam 1 is greedy decoding, whatever the length norm, and a beam of at least
    all prefixes and their continuations is exhaustive search. Where scores tie, the lower beam, then the
    lower id, goes first. The loop ends as soon as nothing better can come (see ``group_search``).

    Args:
        step: (carry, tokens int32 [B,K]) -> (carry, logits [B,K,V]).
        carry: pytree, every leaf [B,K,...], the K rows of an image equal.
        beam: K, with which the carry was started.
        max_steps: T, the longest caption with its eos.
        length_norm: exponent of the length penalty, the length counting eos; 0: none.
        length_penalty: what the log-probability is divided by, see ``LengthPenalty``.
        rules: logit rules, applied in order. Ranking goes by what they leave of the log-probabilities (not
            normalised again), `log_prob` and `word_log_probs` are the model's own.
        n_best: how many of the K captions are sure to be the best that K beams find; None: all. The loop ends sooner
            for fewer; what else it returns is what it had found by then.

    Returns:
        Decoded with [B,K] captions, best first; `score` is what was ranked, length penalty included.

    Raises:
        UserError: beam or max_steps below 1, or a negative length_norm.
        ValueError: the carry's leaves don't lead with one [B,K].
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

    The beams are cut into groups that choose one after the other at each step: a continuation's log-probability is
    lowered by ``diversity`` for each time that an earlier group has just chosen the same word, eos included. This
    decides only what is chosen; hypotheses go on, and are ranked at the end, with the log-probability that they have
    without it. One group is beam search.

    Args:
        step: (carry, tokens int32 [B,K]) -> (carry, logits [B,K,V]).
        carry: pytree, every leaf [B,K,...], the K rows of an image equal.
        beam: K, the beams of all groups together.
        groups: G; K has to be divisible by it.
        diversity: the paper's lambda, 0.2 to 0.8 in its experiments.
        max_steps: T, the longest caption with its eos.
        length_norm: as in ``beam_search``.
        length_penalty: as in ``beam_search``.
        rules: as in ``beam_search``.
        n_best: as in ``beam_search``.

    Returns:
        Decoded with the [B,K] captions of all groups, best first; two groups may have found the same one.

    Raises:
        UserError: beam, groups or max_steps below 1, beams that don't divide, or a negative length_norm or diversity.
        ValueError: the carry's leaves don't lead with one [B,K].
    """
    if beam < 1:
        raise UserError(f"decoding: beam is {beam}; give at least 1")
    if groups < 1 or beam % groups:
        raise UserError(f"decoding: {beam} beams don't divide into {groups} groups; give a divisor")
    if diversity < 0:
        raise UserError(f"decoding: diversity is {diversity}; give 0 or more")
    check_search(carry, beam, max_steps, length_norm, n_best)
    width = beam // groups

    def choose(totals: Array) -> Choice:
        batch, vocabulary = totals.shape[0], totals.shape[-1]
        chosen = jnp.zeros((batch, vocabulary), jnp.float32)  # how often earlier groups took each word
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
