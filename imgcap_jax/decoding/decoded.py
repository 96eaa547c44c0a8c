"""The input and output types of all searches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

StepFn = Callable[[Any, Array], tuple[Any, Array]]
"""(carry, tokens int32 [B,M]) -> (carry, logits [B,M,V]): takes the last words, returns the logits of the next."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoded:
    """Captions of a batch. M is the number of beams K (best first), the number of samples (in drawing order), or 1.

    If a beam is wider than the number of possible sequences, the remaining slots are empty: all their tokens are pad,
    and their log_prob and score are `rules.FORBIDDEN`. The first slot is never empty.
    """

    tokens: Array
    """int32 [B,M,T]: the words without bos, then eos unless the caption was cut at T, then pad."""
    word_log_probs: Array
    """float32 [B,M,T]: the model's log-probability of each token before the rules; 0 after eos."""
    log_prob: Array
    """float32 [B,M]: the sum of word_log_probs."""
    score: Array
    """float32 [B,M]: the score that the search optimised, after the rules. Each search documents its score."""
    steps: Array
    """int32 []: number of decoder steps that were run. It is below T if the search ended early."""


def parallel_shape(carry: Any) -> tuple[int, int]:
    """The leading dimensions (B, M) of all leaves of the carry.

    Raises:
        ValueError: the carry has no leaves, or their leading dimensions differ.
    """
    shapes = {leaf.shape[:2] for leaf in jax.tree.leaves(carry)}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        raise ValueError(f"all leaves of the carry must start with the same [B,M]; they start with {sorted(shapes)}")
    return shape[0], shape[1]
