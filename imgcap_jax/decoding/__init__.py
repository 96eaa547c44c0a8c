"""Turning a decoder's step into captions: greedy, sampling and three beam searches, with logit rules.

Letters of the shape comments: B images in a batch, M parallel sequences an image (K where they are beams), T
= max_steps, V vocabulary. Nothing here knows a model: a search sees a function `step(carry, tokens [B,M]) ->
(carry, logits [B,M,V])` and a carry, any pytree whose every leaf leads with [B,M].
"""

from imgcap_jax.decoding.beam import beam_search, diverse_beam_search
from imgcap_jax.decoding.constrained import constrained_beam_search, constrained_rows
from imgcap_jax.decoding.decoded import Decoded, StepFn
from imgcap_jax.decoding.greedy import greedy
from imgcap_jax.decoding.rules import (
    ForbidBadEnding,
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
