"""Pictures of where a caption's words looked."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imgcap_jax.errors import UserError
from imgcap_jax.report.contact_sheet import contact_sheet

_DARKEST = 0.15  # what is left of a pixel that a word didn't look at


def attention_picture(
    photo: np.ndarray, words: Sequence[str], log_probs: Sequence[float], attention: np.ndarray, path: Path
) -> None:
    """Draws a photo, and under each word of its caption the photo dimmed by the word's attention, into a PNG.

    Weights are shown relative to the largest of their word. Where a word's weights sum to less than 1, the rest went to
    a sentinel (Lu et al. 2017), and the sum is told.

    Args:
        photo: uint8 [h,w,3], what the regions cover.
        words: the caption's.
        log_probs: each word's.
        attention: float [words,N], N = g x g regions, row by row.
        path: the PNG.

    Raises:
        UserError: the regions are no square grid.
    """
    side = math.isqrt(attention.shape[-1])
    if side * side != attention.shape[-1]:
        raise UserError(f"the model's {attention.shape[-1]} regions are no square grid, so there is nothing to draw")
    images: list[np.ndarray] = [photo]
    texts: list[str] = ["the photo; below each word, how likely the model found it"]
    for word, log_prob, weights in zip(words, log_probs, attention, strict=True):
        images.append(dimmed(photo, weights.reshape(side, side)))
        looked = weights.sum()
        share = f", looked {100 * looked:.0f} %" if looked < 0.995 else ""
        texts.append(f"{word} ({100 * math.exp(log_prob):.0f} %{share})")
    contact_sheet(images, texts, path, columns=5, title=" ".join(words))


def dimmed(photo: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The photo, uint8 [h,w,3], as dark as the weights [g,g] are low, between whose centres it is interpolated."""
    light = Image.fromarray((weights / max(float(weights.max()), 1e-12)).astype(np.float32))
    light = light.resize((photo.shape[1], photo.shape[0]), Image.Resampling.BICUBIC)
    share = _DARKEST + (1 - _DARKEST) * np.clip(np.asarray(light), 0, 1)
    return (photo * share[..., None]).round().astype(np.uint8)
