"""What pages show about the caption of an image: whether it is true of its scene, and where the model looked."""

import math
from collections.abc import Sequence

import numpy as np

from imgcap_jax.data.regions import has_ready_regions
from imgcap_jax.data.scenes.language import is_true, parse_caption
from imgcap_jax.data.scenes.world import Scene
from imgcap_jax.experiment import Experiment
from imgcap_jax.report.figures import WordAttention


def scene_verdict(caption: str, scene: str) -> tuple[str, bool | None]:
    """Whether the caption of a drawn scene (JSON) is true, in words and as a flag; ("", None) for a photo."""
    if not scene:
        return "", None
    statement = parse_caption(caption)
    true = is_true(statement, Scene.from_json(scene))
    wrong = "not covered by the grammar" if statement is None else "not entirely true"
    return "entirely true" if true else wrong, true


def word_attention(
    experiments: Sequence[Experiment], words: Sequence[str], attention: np.ndarray | None, caption: str
) -> WordAttention | None:
    """The attention [words,N] of a caption's words; None if there is none, or if its regions are not a grid."""
    separator = next((between for between in (" ", "") if between.join(words) == caption), None)
    if attention is None or not words or separator is None:
        return None
    if any(has_ready_regions(experiment.encoder) for experiment in experiments):
        return None  # such as boxes around objects
    side = math.isqrt(attention.shape[-1])
    if side < 2 or side * side != attention.shape[-1]:
        return None
    return WordAttention(tuple(words), separator, attention.reshape(-1, side, side))
