"""Logit rules: they forbid words, or reshape the distribution from which a word is drawn.

A rule changes the log-probabilities of the next word. Your own rules go into ``Decoding.rules``. They are applied in
order, after the built-in rules. If ``Decoding.prefix`` is set, rules apply only to the words after the prefix. A rule
is a frozen dataclass::

    @dataclass(frozen=True)
    class ForbidWord:
        word: int

        def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
            return logits.at[..., self.word].set(FORBIDDEN)

Arguments of ``__call__``, with B images per batch, M parallel sequences per image, T = decoding.max_words and V words:

- ``logits``: float32 [B,M,V], the model's log-probabilities of the next word, as changed by the rules before this one.
  Pad, bos and the words that earlier rules forbid have values below ``LOWEST``: ``FORBIDDEN``, or also -inf.
- ``tokens``: int32 [B,M,T], the ids of the words so far, without bos. The positions from t on are pad.
- ``t``: int32 [], the number of words so far, from 0 to T - 1. It is the same for all sequences.

The result is the changed logits, float32 [B,M,V]. A value below ``LOWEST`` forbids the word. A smaller decrease is a
penalty. Sequences that have ended and empty slots of a beam are also passed, with arbitrary tokens. Their result is
ignored.

A rule must be hashable, and equal rules must have the same effect, because compiled searches are cached by their
``Decoding``, which includes the rules. The fields must therefore be numbers, strings, tuples or other frozen
dataclasses, not arrays. Make arrays in ``__call__``. The fields are also saved in the run's ``experiment.json``, with
the name of the class (see ``imgcap_jax.user_code``).

A rule must not

- raise a logit above 0, because the early exit of beam search relies on totals that never rise.
- return NaN for any sequence, because NaN does not count as forbidden and spoils the ranking. -inf - -inf is NaN.
- use Python control flow on the values of its arguments, because JAX traces the rule. Use ``jnp.where`` instead. Shapes
  are static and can be used in Python.
- have side effects or keep state, because the code runs only while JAX traces it, not in every step, and because beam
  search reorders the sequences in every step.
- draw random numbers, because the samples of an image must depend only on its key.
- let one sequence depend on another, because the captions of an image must not depend on the other images of its batch.
- change the shape or the dtype, because the search relies on both.

Logits are not normalised between rules or before ranking. Beam search under a rule that forbids words therefore finds
the allowed sequences with the highest probability under the *model*. With normalisation, a very unlikely word would
cost nothing if its alternatives are forbidden, so captions would be rewarded for running into the rule. If the rules
forbid all words, eos is allowed (see ``apply_rules``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from imgcap_jax.decoding.limits import check_limits
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.degeneration_device import FunctionWords, repeating_words
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK

FORBIDDEN = -1e30
"""The logit of a forbidden word. It is finite because -inf - -inf is NaN. A sum of many stays finite in float32."""
LOWEST = -1e9
"""Logits below this are forbidden, including -inf and a rescaled FORBIDDEN. No sum of log-probabilities is so low."""
_LAST_RESORT = -1e6  # lower bound of the logit of eos if no other word is allowed


class Rule(Protocol):
    """The type of a logit rule. The module docstring states what a rule must and must not do."""

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        """logits float32 [B,M,V], tokens so far int32 [B,M,T], their number t int32 [] -> logits float32 [B,M,V]."""
        ...


def apply_rules(logits: Array, tokens: Array, t: Array, rules: Sequence[Rule]) -> tuple[Array, Array]:
    """Computes the log-probabilities of the next word before and after the rules.

    Pad and bos are always forbidden. If the rules forbid all words of a sequence, eos is allowed with its
    log-probability before the rules, so that every caption can end.

    Args:
        logits: [B,M,V] of any float dtype. The softmax is computed in float32.
        tokens: int32 [B,M,T], the words so far.
        t: int32 [], the number of words so far.
        rules: logit rules, applied in order.

    Returns:
        (log_probs, ruled), the log-probabilities before and after the rules, both float32 [B,M,V]. In `ruled`, the
        value of forbidden words is exactly FORBIDDEN.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))  # [B,M,V]
    words = jnp.arange(logits.shape[-1])  # [V]
    unspoken = (words == PAD) | (words == BOS)  # [V]
    # Forbidden before the rules, so that top-k and top-p do not count them, and after, so that no rule allows them.
    ruled = jnp.where(unspoken, FORBIDDEN, log_probs)  # [B,M,V]
    for rule in rules:
        ruled = rule(ruled, tokens, t)  # [B,M,V]
    ruled = jnp.where(unspoken | (ruled < LOWEST), FORBIDDEN, ruled)  # [B,M,V]
    stuck = jnp.all(ruled == FORBIDDEN, axis=-1, keepdims=True)  # [B,M,1]
    ruled = jnp.where(stuck & (words == EOS), jnp.maximum(log_probs, _LAST_RESORT), ruled)  # [B,M,V]
    return log_probs, ruled


@dataclass(frozen=True)
class NoRepeatNgram:
    """Forbids words that would repeat an n-gram of the caption.

    n = 3 is the trigram blocking of Paulus et al. 2018, arXiv:1705.04304.

    Raises:
        UserError: n is below 1.
    """

    n: int = 3

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"NoRepeatNgram: n is {self.n}; it must be at least 1")

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        batch, parallel, length = tokens.shape
        starts = length - self.n + 1
        if starts < 1:
            return logits
        # The last n-1 words. If t < n-1, the slice is clamped to other positions, but then no n-gram is complete.
        last = jax.lax.dynamic_slice_in_dim(tokens, t - (self.n - 1), self.n - 1, axis=-1)  # [B,M,n-1]
        complete = jnp.arange(starts) + self.n <= t  # [starts]
        match = jnp.broadcast_to(complete, (batch, parallel, starts))
        for i in range(self.n - 1):
            match &= tokens[..., i : i + starts] == last[..., i : i + 1]  # [B,M,starts]
        # The words that followed each match. Without a match the id is V, which mode="drop" ignores.
        followers = jnp.where(match, tokens[..., self.n - 1 :], logits.shape[-1])  # [B,M,starts]
        b, m = jnp.arange(batch)[:, None, None], jnp.arange(parallel)[None, :, None]
        return logits.at[b, m, followers].set(FORBIDDEN, mode="drop")  # [B,M,V]


@dataclass(frozen=True)
class MinLength:
    """Forbids eos until a caption has this number of words, not counting eos.

    Raises:
        UserError: the number is negative.
    """

    words: int

    def __post_init__(self) -> None:
        check_limits(min_words=self.words)

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        return logits.at[..., EOS].min(jnp.where(t < self.words, FORBIDDEN, jnp.inf))


@dataclass(frozen=True)
class SuppressUnk:
    """Forbids the unknown word, <unk>."""

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        return logits.at[..., UNK].set(FORBIDDEN)


@dataclass(frozen=True)
class ForbidBadEnding:
    """Forbids captions that end on one of these words, given as ids ("a", "of", "with" ...).

    The words are forbidden directly before eos and as word T, where a caption is cut.
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
class ForbidRepeatedWords:
    """Forbids repeated content words, as in "a car in a car" and "a baby is playing with a baby".

    ``imgcap_jax.metrics.degeneration.repeated_words`` defines them. Function words are never forbidden.
    """

    function_words: FunctionWords

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        words = repeating_words(tokens, t, self.function_words)  # [B,M,N], between pads
        words = jnp.where(words == PAD, logits.shape[-1], words)  # mode="drop" ignores the id V
        # Not NumPy's: the number of images is symbolic in exported programs.
        b, m = jnp.arange(tokens.shape[0])[:, None, None], jnp.arange(tokens.shape[1])[:, None]
        return logits.at[b, m, words].set(FORBIDDEN, mode="drop")  # [B,M,V]


@dataclass(frozen=True)
class ForcedPrefix:
    """Forces the first words of a caption and applies other rules only to the words after them.

    The forced words keep their log-probabilities.

    Raises:
        UserError: the prefix contains pad, bos or eos.
    """

    words: tuple[int, ...]
    rules: tuple[Rule, ...] = ()
    """Rules for the words after the prefix, applied in order."""

    def __post_init__(self) -> None:
        if {PAD, BOS, EOS} & set(self.words):
            raise UserError("ForcedPrefix: words contains pad, bos or eos; it must contain only ids of words")

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
    """Divides the logits by a temperature. Below 1 the distribution becomes sharper, above 1 flatter.

    Raises:
        UserError: the temperature is below 0.01, at which a very unlikely word could count as forbidden.
    """

    value: float

    def __post_init__(self) -> None:
        check_limits(temperature=self.value)

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        return jnp.where(logits < LOWEST, FORBIDDEN, logits / self.value)


@dataclass(frozen=True)
class TopK:
    """Keeps the k most likely words (Fan et al. 2018, arXiv:1805.04833) and all words that tie with the k-th.

    Raises:
        UserError: k is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"TopK: k is {self.k}; it must be at least 1")

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][..., -1:]  # [B,M,1]
        return jnp.where(logits < kth, FORBIDDEN, logits)


@dataclass(frozen=True)
class TopP:
    """Keeps the most likely words whose probabilities add up to p (Holtzman et al. 2020, arXiv:1904.09751).

    The probabilities are those after the previous rules, normalised. The word that crosses p is kept, so at least one
    word remains. Words that tie with the last kept word are also kept.

    Raises:
        UserError: p is not in (0, 1].
    """

    p: float

    def __post_init__(self) -> None:
        check_limits(top_p=self.p)

    def __call__(self, logits: Array, tokens: Array, t: Array) -> Array:
        # Bisection for the largest threshold at which the words with at least this probability add up to p. It takes
        # thirty passes over V; XLA's sort takes ten times as long on a CPU. Floats from 0 to 1 have the same order as
        # their bits, so bisecting the bits as integers finds the exact float.
        probs = jax.nn.softmax(logits)  # [B,M,V]
        bits = jax.lax.bitcast_convert_type(probs, jnp.int32)  # [B,M,V], from 0 to less than 2**30

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # [B,M,1] both: at `low` the mass reaches p, at `high` it does not
            middle = (low + high) // 2  # [B,M,1]
            mass = jnp.sum(jnp.where(bits >= middle, probs, 0.0), axis=-1, keepdims=True)  # [B,M,1]
            return jnp.where(mass >= self.p, middle, low), jnp.where(mass >= self.p, high, middle)

        none = jnp.zeros_like(bits[..., :1])  # [B,M,1]
        lowest, _ = jax.lax.fori_loop(0, 30, halve, (none, none + 2**30))  # [B,M,1]
        return jnp.where(bits < lowest, FORBIDDEN, logits)
