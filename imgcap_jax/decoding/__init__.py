"""Decoding of captions: greedy decoding, sampling and three beam searches, all with logit rules.

Letters in the shape comments: B images per batch, M parallel sequences per image (K if they are beams), T = max_steps,
V vocabulary size. The package does not depend on the models. A search takes a function `step(carry, tokens [B,M]) ->
(carry, logits [B,M,V])` and a carry, which is any pytree whose leaves all have shape [B,M,...].
"""

from imgcap_jax.decoding.beam import beam_search, diverse_beam_search
from imgcap_jax.decoding.constrained import constrained_beam_search, constrained_rows
from imgcap_jax.decoding.decoded import Decoded, StepFn
from imgcap_jax.decoding.greedy import greedy
from imgcap_jax.decoding.rules import (
    ForbidBadEnding,
    ForbidRepeatedWords,
    ForcedPrefix,
    MinLength,
    NoRepeatNgram,
    Rule,
    SuppressUnk,
    Temperature,
    TopK,
    TopP,
)
from imgcap_jax.decoding.sampling import sample

__all__ = [
    "Decoded",
    "ForbidBadEnding",
    "ForbidRepeatedWords",
    "ForcedPrefix",
    "MinLength",
    "NoRepeatNgram",
    "Rule",
    "StepFn",
    "SuppressUnk",
    "Temperature",
    "TopK",
    "TopP",
    "beam_search",
    "constrained_beam_search",
    "constrained_rows",
    "diverse_beam_search",
    "greedy",
    "sample",
]
