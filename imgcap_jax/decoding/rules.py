"""Logit rules: what a caption may not be, and how a distribution is reshaped before a word is drawn.

A rule is a pure function `(logits float32 [B,M,V], tokens int32 [B,M,T], t) -> logits`: `tokens` holds the
words so far (without bos), `t` (int32 scalar) says how many they are, pad fills the rest. The logits that
come in are the model's log-probabilities as changed by the rules before it. They are not normalised again
between rules or before ranking, so that a beam search under a rule that forbids finds the sequences to which
the *model* gives most, among those allowed. (Normalised again, a word that is all but ruled out by the model
would cost nothing once its rival is forbidden, and a caption would be rewarded for running into the rule.)

A rule of one's own may lower logits or scale them; it must not raise one above 0, on which the early exit of
the beam relies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK

FORBIDDEN = -1e30
"""The logit of a word that must not come. Finite, for -inf - -inf is NaN; float32 holds the sum of many."""
LOWEST = -1e9
"""Anything below is forbidden, be it -inf or a rescaled FORBIDDEN. No sum of log-probabilities comes near."""
_LAST_RESORT = -1e6


class Rule(Protocol):
    """A pure change of logits; frozen dataclasses, so that they hash and compare."""

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        """logits [B,M,V], tokens so far [B,M,T], their number t [] -> logits [B,M,V]."""
        ...


def apply_rules(logits: Array, tokens: Array, t: Array, rules: Sequence[Rule]) -> tuple[Array, Array]:
    """The model's log-probabilities of the next word, and what is left of them under the rules.

    Pad and bos are always forbidden. Where the rules leave nothing, eos is allowed at the model's own
    log-probability, so that every caption has an end.

    Args:
        logits: [B,M,V] of any float dtype; the softmax is taken in float32.
        tokens: int32 [B,M,T], the words so far.
        t: int32 [], their number.
        rules: applied in this order.

    Returns:
        (log_probs, ruled): float32 [B,M,V] both; a forbidden word's `ruled` is exactly FORBIDDEN.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))  # [B,M,V]
    words = jnp.arange(logits.shape[-1])  # [V]
    unspoken = (words == PAD) | (words == BOS)  # [V]
    # Before the rules, so that top-k and top-p don't count them; and after, so that no rule brings them back.
    ruled = jnp.where(unspoken, FORBIDDEN, log_probs)  # [B,M,V]
    for rule in rules:
        ruled = rule(ruled, tokens, t)  # [B,M,V]
    ruled = jnp.where(unspoken | (ruled < LOWEST), FORBIDDEN, ruled)  # [B,M,V]
    stuck = jnp.all(ruled == FORBIDDEN, axis=-1, keepdims=True)  # [B,M,1]
    ruled = jnp.where(stuck & (words == EOS), jnp.maximum(log_probs, _LAST_RESORT), ruled)  # [B,M,V]
    return log_probs, ruled


@dataclass(frozen=True)
class NoRepeatNgram:
    """No n-gram of words comes twice in a caption.

    With n = 3 the trigram blocking of Paulus et al. 2018, arXiv:1705.04304.

    Raises:
        UserError: n < 1.
    """

    n: int = 3

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"NoRepeatNgram: n is {self.n}; give at least 1")

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        batch, parallel, length = tokens.shape
        starts = length - self.n + 1
        if starts < 1:
            return logits
        # The last n-1 words. With fewer the slice lies elsewhere, but then no n-gram is complete either.
        last = jax.lax.dynamic_slice_in_dim(tokens, t - (self.n - 1), self.n - 1, axis=-1)  # [B,M,n-1]
        complete = jnp.arange(starts) + self.n <= t  # [starts]
        match = jnp.broadcast_to(complete, (batch, parallel, starts))
        for i in range(self.n - 1):
            match &= tokens[..., i : i + starts] == last[..., i : i + 1]  # [B,M,starts]
        # The words that followed; where nothing matched, an id beyond the vocabulary, which scatter drops.
        followers = jnp.where(match, tokens[..., self.n - 1 :], logits.shape[-1])  # [B,M,starts]
        b, m = jnp.arange(batch)[:, None, None], jnp.arange(parallel)[None, :, None]
        return logits.at[b, m, followers].set(FORBIDDEN, mode="drop")  # [B,M,V]


@dataclass(frozen=True)
class MinLength:
    """A caption has at least this many words (eos isn't one).

    Raises:
        UserError: a negative number.
    """

    words: int

    def __post_init__(self) -> None:
        if self.words < 0:
            raise UserError(f"MinLength: words is {self.words}; give 0 or more")

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        return logits.at[..., EOS].min(jnp.where(t < self.words, FORBIDDEN, jnp.inf))


@dataclass(frozen=True)
class SuppressUnk:
    """The unknown word isn't written."""

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        return logits.at[..., UNK].set(FORBIDDEN)


@dataclass(frozen=True)
class ForbidBadEnding:
    """A caption doesn't end on one of these words ("a", "of", "with" …; the list is the caller's, as ids).

    Neither before eos nor as the last word for which there is room, which is where cut captions end on an
    article.
    """

    words: tuple[int, ...]

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        if not self.words:
            return logits
        bad = jnp.array(self.words)  # [W]
        length = tokens.shape[-1]
        last = jax.lax.dynamic_index_in_dim(tokens, t - 1, axis=-1)  # [B,M,1]
        ends_badly = (t > 0) & jnp.any(last == bad, axis=-1)  # [B,M]
        logits = logits.at[..., EOS].min(jnp.where(ends_badly, FORBIDDEN, jnp.inf))  # [B,M,V]
        return logits.at[..., bad].min(jnp.where(t == length - 1, FORBIDDEN, jnp.inf))  # [B,M,V]


@dataclass(frozen=True)
class ForcedPrefix:
    """A caption begins with these words, at the model's own log-probabilities; other rules hold from then on.

    Raises:
        UserError: a prefix that ends the caption.
    """

    words: tuple[int, ...]
    rules: tuple[Rule, ...] = ()
    """Those that hold for the words that follow, applied in order."""

    def __post_init__(self) -> None:
        if {PAD, BOS, EOS} & set(self.words):
            raise UserError("ForcedPrefix: the prefix holds pad, bos or eos; give words only")

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        free = logits
        for rule in self.rules:
            free = rule(free, tokens, t)
        if not self.words:
            return free
        word = jnp.array(self.words)[jnp.minimum(t, len(self.words) - 1)]  # []
        forced = jnp.where(jnp.arange(logits.shape[-1]) == word, logits, FORBIDDEN)
        return jnp.where(t < len(self.words), forced, free)


@dataclass(frozen=True)
class Temperature:
    """Logits divided by the temperature: below 1 sharper, above 1 flatter.

    Raises:
        UserError: below 0.01, where a word that is only unlikely would come to count as forbidden.
    """

    value: float

    def __post_init__(self) -> None:
        if not self.value >= 0.01:
            raise UserError(f"Temperature: {self.value} is below 0.01; for the likeliest word decode greedily")

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        return jnp.where(logits < LOWEST, FORBIDDEN, logits / self.value)


@dataclass(frozen=True)
class TopK:
    """Only the k likeliest words (Fan et al. 2018, arXiv:1805.04833); words that tie with the k-th stay.

    Raises:
        UserError: k < 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"TopK: k is {self.k}; give at least 1")

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][..., -1:]  # [B,M,1]
        return jnp.where(logits < kth, FORBIDDEN, logits)


@dataclass(frozen=True)
class TopP:
    """Only the nucleus: the likeliest words that together reach p (Holtzman et al. 2020, arXiv:1904.09751).

    Probabilities are those left by the rules before it, normalised. The word that crosses p belongs to the
    nucleus, which therefore is never empty; words that tie with its last stay.

    Raises:
        UserError: p not in (0, 1].
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UserError(f"TopP: p is {self.p}; give a share above 0 and at most 1")

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        # The largest probability from which on upwards the mass reaches p, by halving: thirty passes over V,
        # where XLA's sort takes ten times as long on a CPU. Floats from 0 to 1 are ordered as their bits,
        # so that halving integers ends on the very float.
        probs = jax.nn.softmax(logits)  # [B,M,V]
        bits = jax.lax.bitcast_convert_type(probs, jnp.int32)  # [B,M,V], from 0 to less than 2**30

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # [B,M,1] both: from `low` the mass is enough, from `high` it isn't
            middle = (low + high) // 2  # [B,M,1]
            mass = jnp.sum(jnp.where(bits >= middle, probs, 0.0), axis=-1, keepdims=True)  # [B,M,1]
            return jnp.where(mass >= self.p, middle, low), jnp.where(mass >= self.p, high, middle)

        none = jnp.zeros_like(bits[..., :1])  # [B,M,1]
        lowest, _ = jax.lax.fori_loop(0, 30, halve, (none, none + 2**30))  # [B,M,1]
        return jnp.where(bits < lowest, FORBIDDEN, logits)
