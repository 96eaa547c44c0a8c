"""What every search takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from imgcap_jax.errors import UserError

StepFn = Callable[[Any, Array], tuple[Any, Array]]
"""(carry, tokens int32 [B,M]) -> (carry, logits [B,M,V]): feed the last words, get the logits of the next."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoded:
    """Captions of a batch; M is K beams (best first), M samples (as drawn) or 1.

    A hypothesis that doesn't exist (a beam wider than the number of sequences there are) has tokens all pad
    and a log_prob and score of `rules.FORBIDDEN`; the first always exists.
    """

    tokens: Array
    """int32 [B,M,T]: without bos; the words, then eos unless T came first, then pad."""
    word_log_probs: Array
    """float32 [B,M,T]: the model's own log-probability of each token (before rules), 0 after eos."""
    log_prob: Array
    """float32 [B,M]: the sum of word_log_probs."""
    score: Array
    """float32 [B,M]: what the search went by, after the rules; each search says what that is."""
    steps: Array
    """int32 []: decoder steps that were run; less than T where every caption of the batch ended early."""


def parallel_shape(carry: Any) -> tuple[int, int]:
    """The (B, M) with which every leaf of the carry leads.

    Raises:
        ValueError: the carry has no leaf, or its leaves lead with different sizes.
    """
    shapes = {leaf.shape[:2] for leaf in jax.tree.leaves(carry)}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        raise ValueError(f"every leaf of the carry has to lead with [B,M]; they lead with {sorted(shapes)}")
    return shape[0], shape[1]


def check_steps(max_steps: int) -> None:
    """Raises UserError unless there is room for a token."""
    if max_steps < 1:
        raise UserError(f"decoding: max_steps is {max_steps}; give at least 1 (the words and eos)")
