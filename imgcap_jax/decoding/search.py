"""The loop that beam, diverse beam and constrained beam search share.

Hypotheses live in G groups of K an image. Each step feeds all of them to the decoder at once; a function chooses, for
each group, K continuations; those that end go to the group's finished ones, of which the K best are kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.decoding.decoded import Decoded, StepFn, check_steps, parallel_shape
from imgcap_jax.decoding.rules import FORBIDDEN, LOWEST, Rule, apply_rules
from imgcap_jax.errors import UserError
from imgcap_jax.special_tokens import BOS, EOS, PAD

LengthPenalty = Literal["power", "gnmt"]
"""power: length**a (a = 1 is the average a word). gnmt: ((5 + length) / 6)**a (Wu et al. 2016, arXiv:1609.08144)."""


class Hypotheses(NamedTuple):
    """K partial or whole captions in each of G groups an image; an empty slot has score FORBIDDEN."""

    score: Array  # float32 [B,G,K]: live ones: sum of ruled log-probabilities; finished ones: what is ranked
    tokens: Array  # int32 [B,G,K,T]
    word_log_probs: Array  # float32 [B,G,K,T]


class Choice(NamedTuple):
    """K continuations in each group: their totals, the hypotheses they continue (of all G*K) and their words."""

    total: Array  # float32 [B,G,K]
    parent: Array  # int32 [B,G,K]
    word: Array  # int32 [B,G,K]


class _State(NamedTuple):
    t: Array  # int32 []: words that each live hypothesis has
    carry: Any  # pytree of [B,G*K,...], of the live hypotheses
    live: Hypotheses
    finished: Hypotheses  # best first


def check_search(carry: Any, rows: int, max_steps: int, length_norm: float, n_best: int | None) -> None:
    """Raises UserError or ValueError unless the settings that all searches share make sense (``rows``: G*K)."""
    check_steps(max_steps)
    if n_best is not None and n_best < 1:
        raise UserError(f"decoding: n_best is {n_best}; give at least 1")
    if length_norm < 0:
        raise UserError(f"decoding: length_norm is {length_norm}; give 0 (none) or more")
    _, parallel = parallel_shape(carry)
    if parallel != rows:
        raise ValueError(f"the carry was started with {parallel} sequences an image, the search has {rows}")


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
    """Runs a search to its end.

    The loop ends when for every image no live hypothesis can still enter the ``n_best`` finished ones of its group,
    which never changes them: log-probabilities only fall, and no length helps more than T does, so total / penalty(T)
    bounds whatever a live hypothesis may become. Hypotheses still unfinished at T compete too, without eos.

    Args:
        step: (carry, tokens int32 [B,G*K]) -> (carry, logits [B,G*K,V]).
        carry: pytree, every leaf [B,G*K,...], the rows of an image equal.
        choose: totals float32 [B,G,K,V] of all continuations -> those that go on.
        groups: G.
        width: K.
        first: which groups hold the empty caption at the start.
        wanted: whose finished ones decide the end.
        shared: a live hypothesis of any group may come to enter a wanted group; otherwise only its own.
        max_steps: T.
        length_norm: exponent of the length penalty.
        length_penalty: its kind.
        rules: logit rules, applied in order.
        n_best: how many of a group's K are sure to be the best that it finds in T steps; None: all. Fewer end sooner.

    Returns:
        The best hypotheses of each group, best first, and the steps run int32 [].
    """
    batch = parallel_shape(carry)[0]
    flat = batch, groups * width
    # A table, for a power that is computed in two places may be rounded in two ways, and then the early exit would no
    # longer be exact.
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

        # Fewer continuations than places exist in the first steps of a wide beam and once hypotheses have ended: what
        # top_k adds then descends from an empty slot or a forbidden word.
        exists = ~(choice.total < LOWEST)  # [B,G,K]; so put, a NaN of a broken model stays visible
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
    # The rows of a group start alike: only its first is live, or the same caption would fill the group K times.
    start = jnp.where(jnp.asarray(first), 0.0, FORBIDDEN)  # [G]
    live = nothing._replace(score=nothing.score.at[:, :, 0].set(start))
    end = jax.lax.while_loop(unfinished, advance, _State(jnp.int32(0), carry, live, nothing))

    # What is live after an early exit can't enter; after the last step it competes as it is, without eos.
    left = jnp.where(end.live.score < LOWEST, FORBIDDEN, end.live.score / norms[end.t - 1])  # [B,G,K]
    return best(end.finished, end.live._replace(score=left)), end.t


def decoded(hypotheses: Hypotheses, steps: Array) -> Decoded:
    """The hypotheses [B,1,K] of a search's only remaining group as its result."""
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
    """The K best of each group of two sets, best first; the first set's where scores tie."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), first, second)  # [B,G,2K,...]
    _, index = jax.lax.top_k(both.score, second.score.shape[2])  # [B,G,K]
    return jax.tree.map(lambda leaf: jax.vmap(jax.vmap(lambda row, i: row[i]))(leaf, index), both)


def merged(hypotheses: Hypotheses, width: int) -> Hypotheses:
    """The ``width`` best of all groups as one group, best first; where scores tie, the earlier group's."""
    one = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], 1, -1, *leaf.shape[3:]), hypotheses)
    empty = jax.tree.map(lambda leaf: leaf[:, :, :width], one)
    return best(one, empty._replace(score=jnp.full_like(empty.score, -jnp.inf)))


def top_continuations(totals: Array, width: int) -> tuple[Array, Array, Array]:
    """The K best of totals [B,P,V]: totals, parents among P and words, [B,K] each.

    Where totals tie, the lower parent, then the lower id, goes first.
    """
    total, index = jax.lax.top_k(totals.reshape(totals.shape[0], -1), width)
    return total, index // totals.shape[-1], index % totals.shape[-1]


def take_rows(tree: Any, index: Array) -> Any:
    """Reorders axis 1 of every leaf [B,M,...] by index [B,K], each image by its own row."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda row, i: row[i])(leaf, index), tree)


def _penalties(max_steps: int, length_norm: float, kind: LengthPenalty) -> np.ndarray:
    """What scores of lengths 1 to T are divided by [T]."""
    lengths = np.arange(1, max_steps + 1)
    return (lengths if kind == "power" else (5 + lengths) / 6) ** float(length_norm)


def _decided(live: Array, worst: Array, largest: Array) -> Array:
    """Whether no live score [B,G,...] can beat the worst finished one that is wanted, [B,G], any more: bool []."""
    hope = jnp.max(live, axis=-1)  # [B,G]
    # A tie doesn't enter: `best` prefers what was finished earlier.
    beaten = hope / largest <= worst  # [B,G]
    return jnp.all(beaten | (hope < LOWEST))
