"""Contact sheets: images with their captions in one PNG."""

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imgcap_jax.data.builders.layout import PREPARE_AGAIN
from imgcap_jax.data.image_files import ImageError
from imgcap_jax.data.images import Resize, view
from imgcap_jax.errors import UserError, counted
from imgcap_jax.files import replacing

if TYPE_CHECKING:
    from imgcap_jax.data.sources import CaptionExample, CaptionSource

# Sizes in pixels.
_TILE = 256  # a multiple of 64, the side of the drawn scenes
_GAP = 22
_MARGIN = 26
_FONT_SIZE, _TITLE_SIZE = 14, 20
_LINE = 19
_PAPER, _INK, _FAINT = (255, 255, 255), (34, 34, 38), (150, 150, 156)


def contact_sheet(
    images: Sequence[np.ndarray],
    texts: Sequence[Sequence[str] | str],
    path: Path,
    columns: int = 4,
    title: str = "",
) -> None:
    """Writes a PNG of images, uint8 [h, w, 3] of any sizes, with a text or a list of texts below each.

    See ``draw_sheet``.
    """
    sheet = draw_sheet(images, texts, columns, title)
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def draw_sheet(
    images: Sequence[np.ndarray],
    texts: Sequence[Sequence[str] | str],
    columns: int = 4,
    title: str = "",
    tile: int = _TILE,
) -> Image.Image:
    """Draws images, uint8 [h, w, 3] of any sizes, with a text or a list of texts below each.

    Images that fit half a tile are enlarged by an integer factor without smoothing, so that their pixels stay visible.

    Args:
        images: the images.
        texts: of each image.
        columns: at most this number of images are next to each other.
        title: above the images.
        tile: the longest side of an image, in pixels.

    Raises:
        ValueError: there are no images, or the numbers of images and texts differ.
    """
    if not len(images) or len(images) != len(texts):
        raise ValueError(
            f"{len(images)} images and {len(texts)} texts; there must be one text per image and at least one image"
        )
    columns = min(columns, len(images))
    pictures = [_fit(image, tile) for image in images]
    captions = [_wrap([text] if isinstance(text, str) else text, tile) for text in texts]
    rows = [slice(start, start + columns) for start in range(0, len(images), columns)]
    # The height of a row is that of its highest picture plus its longest text.
    picture_heights = [max(picture.height for picture in pictures[row]) for row in rows]
    text_heights = [max(len(lines) for lines in captions[row]) * _LINE for row in rows]
    head = 40 if title else 0
    content = max(columns * tile + (columns - 1) * _GAP, math.ceil(_font(_TITLE_SIZE).getlength(title)))
    width = 2 * _MARGIN + content
    height = 2 * _MARGIN + head + sum(picture_heights) + sum(text_heights) + len(rows) * 10 + (len(rows) - 1) * _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN - 4), title, font=_font(_TITLE_SIZE), fill=_INK)
    top = _MARGIN + head
    for row, picture_height, text_height in zip(rows, picture_heights, text_heights, strict=True):
        for column, (picture, lines) in enumerate(zip(pictures[row], captions[row], strict=True)):
            left = _MARGIN + column * (tile + _GAP)
            sheet.paste(picture, (left, top))
            for number, (bullet, line) in enumerate(lines):
                y = top + picture_height + 10 + number * _LINE
                if bullet:
                    draw.text((left, y), "•", font=_font(_FONT_SIZE), fill=_FAINT)
                draw.text((left + 12, y), line, font=_font(_FONT_SIZE), fill=_INK)
        top += picture_height + text_height + 10 + _GAP
    return sheet


def dataset_sheet(source: "CaptionSource", path: Path, *, count: int = 12, columns: int = 4, seed: int = 0) -> None:
    """Writes a contact sheet of randomly chosen images of a split with all their captions.

    Raises:
        UserError: count is below 1, or an image cannot be decoded.
    """
    if count < 1:
        raise UserError(f"contact sheet: count is {count}; it must be at least 1")
    chosen = np.random.default_rng(seed).permutation(len(source))[:count]
    examples = [source[int(i)] for i in chosen]
    images = [example_picture(example, _TILE) for example in examples]
    title = f"{source.name} · {source.split} · {len(examples)} of {counted(len(source), 'image')}"
    contact_sheet(images, [example.captions for example in examples], path, columns, title)


def example_picture(example: "CaptionExample", longest: int, resize: Resize = "squash") -> np.ndarray:
    """The image of an example, or the part that an encoder sees, uint8 [h,w,3], with no side above `longest` pixels.

    Raises:
        UserError: the image cannot be decoded.
    """
    try:
        return view(example.image, longest, resize)
    except ImageError as error:
        raise UserError(f"{example.filename}: {error}; {PREPARE_AGAIN}") from error


def _fit(image: np.ndarray, tile: int) -> Image.Image:
    picture = Image.fromarray(image)
    factor = tile / max(picture.size)
    if factor >= 2:
        return picture.resize((picture.width * int(factor), picture.height * int(factor)), Image.Resampling.NEAREST)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Matplotlib contains DejaVu Sans. The system may have no fonts.
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _wrap(texts: Sequence[str], tile: int) -> list[tuple[bool, str]]:
    """Wraps texts to the tile width. Returns (whether the line begins a text, line) for each line."""
    font = _font(_FONT_SIZE)
    lines: list[tuple[bool, str]] = []
    for text in texts:
        line = ""
        begins = True
        # Some captions have spaces before punctuation. A no-break space keeps it from starting a line.
        for word in re.sub(r" (?=[.,;:!?]( |$))", "\N{NO-BREAK SPACE}", " ".join(text.split())).split(" "):
            while font.getlength(word) > tile - 12:  # split words that are wider than the tile
                keep = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= tile - 12)
                if line:
                    lines.append((begins, line))
                    line, begins = "", False
                lines.append((begins, word[:keep]))
                begins, word = False, word[keep:]
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > tile - 12:
                lines.append((begins, line))
                line, begins = word, False
            else:
                line = longer
        if line:
            lines.append((begins, line))
    return lines
