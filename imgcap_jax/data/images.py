"""Decodes, resizes and augments encoded images."""

import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Resize = Literal["squash", "crop"]
Box = tuple[float, float, float, float]
"""Left, top, width and height, in pixels of the upright image."""
BoxChoice = Callable[[int, int], Box]

# Matches "left-handed", "leftmost", "rightward", "top-right"; not "upright", "bright" or "cleft". It also matches the
# past tense of "leave"; the only effect is that the image is not mirrored.
_SIDE = re.compile(r"\b(?:left|right)", re.IGNORECASE)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

_LARGEST_PIXELS = 2**28
_RATIO = (3 / 4, 4 / 3)
_CROP_TRIES = 10
# Luma of ITU-R BT.601, as PIL's conversion to grey.
_GREY = np.array([0.299, 0.587, 0.114])


class ImageError(ValueError):
    """An image cannot be decoded. The message is the reason; callers add the file name."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image. The defaults change nothing."""

    crop_scale_min: float = 1.0
    """Smallest share of the image area that a random resized crop keeps; 1: no crop."""
    flip: bool = False
    """Mirror images with probability 1/2, except those with a caption that names a side."""
    jitter: float = 0.0
    """Multiply brightness, contrast and saturation each by a random factor from 1 - jitter to 1 + jitter."""


def names_side(captions: Iterable[str]) -> bool:
    """Whether a caption says left or right, so that it would be wrong for the mirror image."""
    return any(_SIDE.search(caption) for caption in captions)


def decode(image: bytes | Pixels, size: int, resize: Resize = "squash") -> Pixels:
    """Decodes an image to RGB, applies its EXIF orientation and resizes it (bicubic, antialiased).

    Args:
        image: an encoded image (JPEG, PNG or anything else that PIL reads), or RGB pixels [h, w, 3].
        size: side length of the result in pixels.
        resize: "squash" ignores the aspect ratio; "crop" resizes the shorter side to `size` and cuts out the
            centre.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ImageError: the image cannot be decoded, or the pixels are not uint8 [h, w, 3].
    """
    return np.asarray(_resample(image, size, lambda width, height: _plain_box(width, height, resize)))


def augment(
    image: bytes | Pixels,
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
        ImageError: the image cannot be decoded.
    """
    picture = _resample(
        image,
        size,
        lambda width, height: _random_box(width, height, augmentation.crop_scale_min, resize, rng),
    )
    if augmentation.flip and rng.random() < 0.5 and not names_side(captions):
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


def _resample(image: bytes | Pixels, size: int, choose_box: BoxChoice) -> Image.Image:
    """Resizes the chosen box of the image to size x size. Decodes the image no larger than that needs."""
    width, height, load = _open(image) if isinstance(image, bytes) else _open_pixels(image)
    left, top, box_width, box_height = choose_box(width, height)
    picture = load(math.ceil(size * width / box_width), math.ceil(size * height / box_height))
    if picture.size == (size, size) and (box_width, box_height) == (width, height):
        return picture
    across, down = picture.width / width, picture.height / height
    box = (
        left * across,
        top * down,
        min((left + box_width) * across, picture.width),
        min((top + box_height) * down, picture.height),
    )
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


# Width and height of the upright image, and a function that decodes it. The function takes the smallest width and
# height that the result may have; an image that is smaller is decoded at its full size.
_Opened = tuple[int, int, Callable[[int, int], Image.Image]]


def _open_pixels(pixels: Pixels) -> _Opened:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ImageError(f"pixels are {pixels.dtype} {list(pixels.shape)}; they must be uint8 RGB [h, w, 3]")
    picture = Image.fromarray(pixels)
    return picture.width, picture.height, lambda width, height: picture


def _open(image: bytes) -> _Opened:
    if not image:
        raise ImageError("the file is empty")
    if simplejpeg.is_jpeg(image):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        except ValueError:
            return _open_other(image)
        # libjpeg-turbo does not convert CMYK; PIL does.
        if colours in ("YCbCr", "RGB", "Gray"):
            return _open_jpeg(image, width, height)
    return _open_other(image)


def _open_jpeg(image: bytes, width: int, height: int) -> _Opened:
    orientation = _jpeg_orientation(image)

    def load(min_width: int, min_height: int) -> Image.Image:
        if orientation in _SIDEWAYS:
            min_width, min_height = min_height, min_width
        # Powers of two only: libjpeg-turbo's other scales (3/8, 5/8) are hardly any faster and blur visibly.
        scale = 1
        while scale < 8 and width >= 2 * scale * min_width and height >= 2 * scale * min_height:
            scale *= 2
        scaled_width, scaled_height = -(-width // scale), -(-height // scale)
        if scaled_width * scaled_height > _LARGEST_PIXELS:
            raise ImageError(f"the image is too large ({width} x {height} pixels)")
        try:
            pixels = simplejpeg.decode_jpeg(image, min_width=scaled_width, min_height=scaled_height)
        except ValueError:
            # libjpeg-turbo also rejects damage that PIL tolerates (a stray byte before a marker). PIL rejects the rest.
            return _open_other(image)[2](min_width, min_height)
        return _upright(Image.fromarray(pixels), orientation)

    return (height, width, load) if orientation in _SIDEWAYS else (width, height, load)


def _open_other(image: bytes) -> _Opened:
    try:
        picture = Image.open(io.BytesIO(image))
    except Image.UnidentifiedImageError as error:
        raise ImageError("unknown image format, or the start of the file is damaged") from error
    except Exception as error:  # PIL's readers raise almost any type of exception on damaged files.
        raise ImageError(f"cannot be decoded ({error})") from error
    orientation = _orientation(picture)
    width, height = picture.size[::-1] if orientation in _SIDEWAYS else picture.size

    def load(min_width: int, min_height: int) -> Image.Image:
        try:
            return _upright(_rgb(picture), orientation)
        except Exception as error:
            raise ImageError(f"cannot be decoded ({error})") from error

    return width, height, load


def _jpeg_orientation(image: bytes) -> int:
    # Searching the bytes takes microseconds; letting PIL parse every header takes ten times as long.
    if b"Exif\0\0" not in image:
        return 1
    try:
        return _orientation(Image.open(io.BytesIO(image)))
    except Exception:  # simplejpeg may still decode what PIL rejects.
        return 1


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # An image with damaged EXIF data is still usable.
        return 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16-bit grey, which PIL's conversion would clip to white.
        picture = Image.fromarray((np.asarray(picture) // 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
