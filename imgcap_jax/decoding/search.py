"""The loop shared by beam search, diverse beam search and constrained beam search.

Each image has G groups of K hypotheses. Each step runs the decoder on all of them at once. A function then chooses K
continuations for each group. Continuations that end move to the finished hypotheses of their group, which keeps the K
best.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn, parallel_shape
from imgcap_jax.decoding.rules import FORBIDDEN, LOWEST, Rule, apply_rules
from imgcap_jax.loops import named_loop
from imgcap_jax.special_tokens import BOS, EOS, PAD

LengthPenalty = Literal["power", "gnmt"]
"""power: length**a (a = 1: mean per word). gnmt: ((5 + length) / 6)**a (Wu et al. 2016, arXiv:1609.08144)."""


class Hypotheses(NamedTuple):
    """K partial or complete captions in each of the G groups of an image. An empty slot has score FORBIDDEN."""

    score: Array  # float32 [B,G,K]: sum of log-probabilities after the rules (live), or ranking score (finished)
    tokens: Array  # int32 [B,G,K,T]
    word_log_probs: Array  # float32 [B,G,K,T]


class Choice(NamedTuple):
    """K continuations for each group."""

    total: Array  # float32 [B,G,K]: sum of log-probabilities after the rules
    parent: Array  # int32 [B,G,K]: index of the continued hypothesis, 0 to G*K - 1
    word: Array  # int32 [B,G,K]


class _State(NamedTuple):
    t: Array  # int32 []: number of words in each live hypothesis
    carry: Any  # pytree with leaves [B,G*K,...], of the live hypotheses
    live: Hypotheses
    finished: Hypotheses  # best first


def check_carry(carry: Any, rows: int) -> None:
    """Raises ValueError unless the leaves of the carry all start with [B,rows]; rows is G*K."""
    _, parallel = parallel_shape(carry)
    if parallel != rows:
        raise ValueError(f"the carry has {parallel} sequences per image; the search needs {rows}")


def group_search(
    step: StepFn,
    carry: Any,
    choose: Callable[[Array], Choice],
    *,
    groups: int,
    width: int,
    first: Sequence[bool],
    wanted: Sequence[bool],
    shared: bool,
    max_steps: int,
    length_norm: float,
    length_penalty: LengthPenalty,
    rules: Sequence[Rule],
    n_best: int | None,
) -> tuple[Hypotheses, Array]:
    """Runs a search.

    The loop ends when, for every image, no live hypothesis can still enter the ``n_best`` finished hypotheses of its
    group. This early exit does not change the result: the total log-probability never rises, and the penalty is largest
    at length T, so total / penalty(T) is an upper bound of the final score of a live hypothesis. Hypotheses that are
    unfinished after T steps also compete, without eos.

    Args:
        step: (carry, tokens int32 [B,G*K]) -> (carry, logits [B,G*K,V]).
        carry: pytree with leaves [B,G*K,...]. The rows of an image are equal.
        choose: total log-probabilities float32 [B,G,K,V] of all continuations -> the continuations to keep.
        groups: G.
        width: K.
        first: [G], whether a group starts with the empty caption.
        wanted: [G], whether the finished hypotheses of a group are needed. Only these groups decide when the loop ends.
        shared: whether descendants of a live hypothesis can enter every wanted group. If False, they stay in their own
            group.
        max_steps: T.
        length_norm: exponent of the length penalty.
        length_penalty: kind of the length penalty.
        rules: logit rules, applied in order.
        n_best: the number of hypotheses per group that are guaranteed to be the best that the group finds in T steps.
            None means all K. A smaller number ends the loop earlier.

    Returns:
        The K best hypotheses of each group, best first, and the number of steps, int32 [].
    """
    batch = parallel_shape(carry)[0]
    flat = batch, groups * width
    # A table, because a power that is computed in two places can be rounded in two ways. The early exit would then not
    # be exact.
    norms = jnp.asarray(_penalties(max_steps, length_norm, length_penalty), jnp.float32)  # [T]
    ends_count = np.flatnonzero(np.asarray(wanted))
    sure = min(n_best or width, width)

    def unfinished(s: _State) -> Array:
        live = s.live.score.reshape(batch, 1, -1) if shared else s.live.score[:, ends_count]  # [B,G',...]
        worst = s.finished.score[:, ends_count, sure - 1]  # [B,G'']
        return (s.t < max_steps) & ~_decided(live, worst, norms[-1])

    def advance(s: _State) -> _State:
        tokens = s.live.tokens.reshape(*flat, max_steps)  # [B,G*K,T]
        previous = jnp.where(s.t == 0, BOS, tokens[:, :, s.t - 1])  # [B,G*K]
        carry, logits = step(s.carry, previous)  # [B,G*K,V]
        log_probs, ruled = apply_rules(logits, tokens, s.t, rules)  # [B,G*K,V] both
        totals = s.live.score[..., None] + ruled.reshape(batch, groups, width, -1)  # [B,G,K,V]
        choice = choose(totals)
        parent, word = choice.parent.reshape(flat), choice.word.reshape(flat)  # [B,G*K] both
        index = parent * logits.shape[-1] + word
        log_prob = jnp.take_along_axis(log_probs.reshape(batch, -1), index, axis=-1)  # [B,G*K]

        # In the first steps of a wide beam, and after hypotheses have ended, there can be fewer than K continuations.
        # top_k then also returns continuations of empty slots or with forbidden words.
        exists = ~(choice.total < LOWEST)  # [B,G,K]; the negation keeps the NaN of a broken model visible
        ended = exists & (choice.word == EOS)  # [B,G,K]
        old = tokens, s.live.word_log_probs.reshape(*flat, max_steps)
        tokens, word_log_probs = take_rows(old, parent)  # [B,G*K,T] both
        tokens = tokens.at[:, :, s.t].set(word).reshape(batch, groups, width, max_steps)
        word_log_probs = word_log_probs.at[:, :, s.t].set(log_prob).reshape(tokens.shape)

        ranked = jnp.where(ended, choice.total / norms[s.t], FORBIDDEN)  # [B,G,K]
        return _State(
            t=s.t + 1,
            carry=take_rows(carry, parent),
            live=Hypotheses(jnp.where(exists & ~ended, choice.total, FORBIDDEN), tokens, word_log_probs),
            finished=best(s.finished, Hypotheses(ranked, tokens, word_log_probs)),
        )

    shape = batch, groups, width
    nothing = Hypotheses(
        score=jnp.full(shape, FORBIDDEN, jnp.float32),
        tokens=jnp.full((*shape, max_steps), PAD, jnp.int32),
        word_log_probs=jnp.zeros((*shape, max_steps), jnp.float32),
    )
    # The rows of a group start equal. Only the first is live; otherwise the group would contain every caption K times.
    start = jnp.where(jnp.asarray(first), 0.0, FORBIDDEN)  # [G]
    live = nothing._replace(score=nothing.score.at[:, :, 0].set(start))
    with named_loop("search"):
        end = jax.lax.while_loop(unfinished, advance, _State(jnp.int32(0), carry, live, nothing))

    # After an early exit no live hypothesis can enter. After T steps the live hypotheses compete without eos.
    left = jnp.where(end.live.score < LOWEST, FORBIDDEN, end.live.score / norms[end.t - 1])  # [B,G,K]
    return best(end.finished, end.live._replace(score=left)), end.t


def decoded(hypotheses: Hypotheses, steps: Array) -> Decoded:
    """Converts the hypotheses [B,1,K] of a single group to the result of a search."""
    score, tokens, word_log_probs = (leaf[:, 0] for leaf in hypotheses)
    exists = ~(score < LOWEST)  # [B,K]
    return Decoded(
        tokens=jnp.where(exists[..., None], tokens, PAD),
        word_log_probs=jnp.where(exists[..., None], word_log_probs, 0.0),
        log_prob=jnp.where(exists, jnp.sum(word_log_probs, axis=-1), FORBIDDEN),
        score=score,
        steps=steps,
    )


def best(first: Hypotheses, second: Hypotheses) -> Hypotheses:
    """The K best of each group of two sets, best first. If scores tie, the first set ranks first."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), first, second)  # [B,G,2K,...]
    _, index = jax.lax.top_k(both.score, second.score.shape[2])  # [B,G,K]
    return jax.tree.map(lambda leaf: jax.vmap(jax.vmap(lambda row, i: row[i]))(leaf, index), both)


def merged(hypotheses: Hypotheses, width: int) -> Hypotheses:
    """The ``width`` best of all groups as one group, best first. If scores tie, the earlier group ranks first."""
    one = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], 1, -1, *leaf.shape[3:]), hypotheses)
    empty = jax.tree.map(lambda leaf: leaf[:, :, :width], one)
    return best(one, empty._replace(score=jnp.full_like(empty.score, -jnp.inf)))


def top_continuations(totals: Array, width: int) -> tuple[Array, Array, Array]:
    """The K best of totals [B,P,V].

    If totals tie, the lower parent ranks first, then the lower id.

    Returns:
        Totals, parents (0 to P - 1) and words, each [B,K].
    """
    total, index = jax.lax.top_k(totals.reshape(totals.shape[0], -1), width)
    return total, index // totals.shape[-1], index % totals.shape[-1]


def take_rows(tree: Any, index: Array) -> Any:
    """Gathers rows of axis 1 of every leaf [B,M,...] by index [B,K], separately for each image."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda row, i: row[i])(leaf, index), tree)


def _penalties(max_steps: int, length_norm: float, kind: LengthPenalty) -> np.ndarray:
    """The length penalty for lengths 1 to T, [T]."""
    lengths = np.arange(1, max_steps + 1)
    return (lengths if kind == "power" else (5 + lengths) / 6) ** float(length_norm)


def _decided(live: Array, worst: Array, largest: Array) -> Array:
    """Whether no live score [B,G,...] can still beat the worst finished score that is needed, [B,G]: bool []."""
    hope = jnp.max(live, axis=-1)  # [B,G]
    # A tie does not enter, because `best` prefers the hypothesis that finished earlier.
    beaten = hope / largest <= worst  # [B,G]
    return jnp.all(beaten | (hope < LOWEST))
