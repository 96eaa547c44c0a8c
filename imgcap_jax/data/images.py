"""Resizes and augments images."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from imgcap_jax.data.image_files import AnyImage, OpenedImage, Pixels, open_image
from imgcap_jax.errors import UserError, check_range
from imgcap_jax.tokenizers import unspaced_length

Resize = Literal["squash", "crop"]
Box = tuple[float, float, float, float]
"""Left, top, width and height, in pixels of the upright image."""
BoxChoice = Callable[[int, int], Box]

# They match "left-handed", "leftmost", "rightward" and "top-right", but not "upright", "bright" or "cleft". "left" also
# matches the past tense of "leave"; the only effect is that the image is not mirrored.
SIDE_WORDS = ("left", "right")

_RATIO = (3 / 4, 4 / 3)
_CROP_TRIES = 10
# Luma of ITU-R BT.601, as PIL's conversion to grey.
_GREY = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image. The defaults change nothing."""

    crop_scale_min: float = 1.0
    """Smallest share of the image area that a random resized crop keeps; 1: no crop."""
    flip: bool = False
    """Mirror images with probability 1/2, except those with a caption that names a side."""
    jitter: float = 0.0
    """Multiply brightness, contrast and saturation each by a random factor from 1 - jitter to 1 + jitter."""
    side_words: tuple[str, ...] = SIDE_WORDS
    """The beginnings of the words that name a side, in the language of the captions, also separated by commas;
    docs/training.md has a list."""

    def __post_init__(self) -> None:
        check_range("data.augmentation.crop_scale_min", self.crop_scale_min, above=0, at_most=1)
        check_range("data.augmentation.jitter", self.jitter, at_least=0, at_most=1)
        if all(isinstance(word, str) for word in self.side_words):  # as on the command line: left,right
            words = (word.strip() for part in self.side_words for word in part.split(","))
            object.__setattr__(self, "side_words", tuple(words))
        if not all(isinstance(word, str) and word.strip() for word in self.side_words):
            raise UserError(f"data.augmentation.side_words is {self.side_words!r}; it must be a list of words")

    def __repr__(self) -> str:
        # Feature stores are identified by this text. Those of English captions were computed before there were others.
        names = [item.name for item in fields(self) if item.name != "side_words" or self.side_words != SIDE_WORDS]
        return f"Augmentation({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def changes_images(self) -> bool:
        """Whether training images differ from the images in the dataset."""
        return replace(self, side_words=SIDE_WORDS) != Augmentation()


def names_side(captions: Iterable[str], side_words: tuple[str, ...] = SIDE_WORDS) -> bool:
    """Whether a caption names a side, as "left" or "right", so that it would be wrong for the mirror image.

    Case does not matter. A side word can be the beginning of another word. In a script without blanks between words,
    such as Chinese, it can be at any place.
    """
    pattern = _side_pattern(side_words)
    return pattern is not None and any(pattern.search(caption) for caption in captions)


@lru_cache
def _side_pattern(side_words: tuple[str, ...]) -> re.Pattern[str] | None:
    alternatives = [("" if unspaced_length(word[0]) else r"\b") + re.escape(word) for word in side_words]
    return re.compile("|".join(alternatives), re.IGNORECASE) if side_words else None


def decode(image: AnyImage, size: int, resize: Resize = "squash") -> Pixels:
    """Decodes an image to upright RGB and resizes it (bicubic, antialiased).

    Args:
        image: an encoded image, RGB pixels uint8 [h,w,3], or a PIL image.
        size: side length of the result in pixels.
        resize: "squash" ignores the aspect ratio; "crop" resizes the shorter side to `size` and cuts out the
            centre.

    Returns:
        uint8 [size,size,3].

    Raises:
        ImageError: see `image_files.open_image`.
    """
    return np.asarray(_resample(image, size, lambda width, height: _plain_box(width, height, resize)))


def view(image: AnyImage, longest: int, resize: Resize = "squash") -> Pixels:
    """Decodes an image for people: in its aspect ratio, and reduced so that no side is longer than `longest`.

    Args:
        image: see `decode`.
        longest: the largest side length of the result in pixels. Smaller images keep their size.
        resize: "crop" cuts out the square in the centre, which is what `decode` shows; "squash" keeps everything.

    Returns:
        uint8 [h,w,3].

    Raises:
        ImageError: see `image_files.open_image`.
    """
    opened = open_image(image)
    left, top, width, height = _plain_box(opened.width, opened.height, resize)
    share = min(1.0, longest / max(width, height))
    size = max(1, round(width * share)), max(1, round(height * share))
    return np.asarray(_cut(opened, (left, top, width, height), size))


def augment(
    image: AnyImage,
    captions: Iterable[str],
    size: int,
    rng: np.random.Generator,
    augmentation: Augmentation,
    resize: Resize = "squash",
) -> Pixels:
    """Decodes an image as `decode` does and augments it at random.

    The crop is the random resized crop of Szegedy et al. (2015): its share of the area is uniform in
    [crop_scale_min, 1] and its aspect ratio is log-uniform in [3/4, 4/3]. With "squash" the aspect ratio is relative
    to that of the image, so that a crop of the whole image equals the result of `decode`.

    Args:
        image: see `decode`.
        captions: all captions of the image. If one of them names a side, the image is not mirrored.
        size: side length of the result in pixels.
        rng: the only source of randomness.
        augmentation: which changes to make.
        resize: see `decode`.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ImageError: see `image_files.open_image`.
    """
    picture = _resample(
        image,
        size,
        lambda width, height: _random_box(width, height, augmentation.crop_scale_min, resize, rng),
    )
    if augmentation.flip and rng.random() < 0.5 and not names_side(captions, augmentation.side_words):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augmentation.jitter:
        brightness, contrast, saturation = 1 + augmentation.jitter * rng.uniform(-1, 1, 3)
        picture = _recolour(picture, brightness, contrast, saturation)
    return np.asarray(picture)


def _plain_box(width: int, height: int, resize: Resize) -> Box:
    if resize == "squash":
        return 0, 0, width, height
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side, side


def _random_box(width: int, height: int, scale_min: float, resize: Resize, rng: np.random.Generator) -> Box:
    if scale_min >= 1:
        return _plain_box(width, height, resize)
    # With "squash" the box is sampled in a unit square, so that its aspect ratio is relative to that of the image.
    whole_width, whole_height = (1.0, 1.0) if resize == "squash" else (float(width), float(height))
    for _ in range(_CROP_TRIES):
        area = whole_width * whole_height * rng.uniform(scale_min, 1)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        box_width, box_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if box_width <= whole_width and box_height <= whole_height:
            left, top = rng.uniform(0, whole_width - box_width), rng.uniform(0, whole_height - box_height)
            across, down = width / whole_width, height / whole_height
            return left * across, top * down, box_width * across, box_height * down
    return _plain_box(width, height, resize)


def _recolour(picture: Image.Image, brightness: float, contrast: float, saturation: float) -> Image.Image:
    """Applies brightness b, contrast c about the mean grey, and saturation s in one pass, because each is affine.

    x becomes b x, then c x + (1 - c) mean grey, then s x + (1 - s) grey of the pixel.
    """
    mean_grey = float(_GREY @ np.asarray(picture.resize((1, 1), Image.Resampling.BOX))[0, 0])
    colours = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _GREY)
    offset = (1 - contrast) * brightness * mean_grey
    matrix = np.column_stack([colours, np.full(3, offset)])
    return picture.convert("RGB", tuple(matrix.ravel().tolist()))


def _resample(image: AnyImage, size: int, choose_box: BoxChoice) -> Image.Image:
    """Resizes the chosen box of the image to size x size. Decodes the image no larger than that needs."""
    opened = open_image(image)
    return _cut(opened, choose_box(opened.width, opened.height), (size, size))


def _cut(opened: OpenedImage, box: Box, size: tuple[int, int]) -> Image.Image:
    """Resizes a box of an image to a width and height."""
    width, height = opened.width, opened.height
    left, top, box_width, box_height = box
    picture = opened.load(math.ceil(size[0] * width / box_width), math.ceil(size[1] * height / box_height))
    if picture.size == size and (box_width, box_height) == (width, height):
        return picture
    across, down = picture.width / width, picture.height / height
    part = (
        left * across,
        top * down,
        min((left + box_width) * across, picture.width),
        min((top + box_height) * down, picture.height),
    )
    return picture.resize(size, Image.Resampling.BICUBIC, box=part)
