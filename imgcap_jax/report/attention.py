"""Pictures of the attention weights of each word of a caption."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imgcap_jax.data.images import Resize
from imgcap_jax.data.sources import CaptionExample
from imgcap_jax.errors import UserError
from imgcap_jax.report.contact_sheet import contact_sheet, draw_sheet, example_picture

_SMALL = 96  # pixels of a photo in the picture of a logged sample, which has one per word
_DARKEST = 0.15  # brightness of pixels without attention, relative to the original


def attention_picture(
    photo: np.ndarray, words: Sequence[str], log_probs: Sequence[float], attention: np.ndarray, path: Path
) -> None:
    """Writes a PNG with a photo and, for each word of its caption, the photo dimmed by the word's attention.

    Weights are shown relative to the largest weight of the word. If the weights of a word sum to less than 1, the rest
    is the weight of a sentinel (Lu et al. 2017), and the sum is printed below the word.

    Args:
        photo: uint8 [h,w,3], the image area that the regions cover.
        words: the words of the caption.
        log_probs: the log-probability of each word.
        attention: float [words,N], the weights of N = g x g regions, row by row.
        path: the PNG file.

    Raises:
        UserError: the number of regions is not a square.
    """
    side = math.isqrt(attention.shape[-1])
    if side * side != attention.shape[-1]:
        raise UserError(f"the model has {attention.shape[-1]} regions; attention can only be drawn for a square grid")
    images: list[np.ndarray] = [photo]
    texts: list[str] = ["the photo; the number after each word is its probability"]
    for word, log_prob, weights in zip(words, log_probs, attention, strict=True):
        images.append(dimmed(photo, weights.reshape(side, side)))
        looked = weights.sum()
        share = f", attention {100 * looked:.0f} %" if looked < 0.995 else ""
        texts.append(f"{word} ({100 * math.exp(log_prob):.0f} %{share})")
    contact_sheet(images, texts, path, columns=5, title=" ".join(words))


def sample_picture(
    example: CaptionExample, resize: Resize, caption: str, words: tuple[str, ...], attention: np.ndarray | None
) -> np.ndarray:
    """Draws an image with its caption and, if the regions are a grid, the attention of each word. See ``Draw``.

    It is small, because a log has several of them per validation.
    """
    photo = example_picture(example, _SMALL, resize)
    images, texts = [photo], [""]
    side = 0 if attention is None else math.isqrt(attention.shape[-1])
    if attention is not None and side > 1 and side * side == attention.shape[-1]:
        images += [dimmed(photo, weights.reshape(side, side)) for weights in attention]
        texts += words
    title = caption if len(images) > 1 else ""
    if not title:
        texts = [caption]
    return np.asarray(draw_sheet(images, texts, columns=7, title=title, tile=_SMALL))


def dimmed(photo: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Dims a photo, uint8 [h,w,3], where the weights [g,g] are low, with bicubic interpolation between regions."""
    light = Image.fromarray((weights / max(float(weights.max()), 1e-12)).astype(np.float32))
    light = light.resize((photo.shape[1], photo.shape[0]), Image.Resampling.BICUBIC)
    brightness = _DARKEST + (1 - _DARKEST) * np.clip(np.asarray(light), 0, 1)
    return (photo * brightness[..., None]).round().astype(np.uint8)
