"""Images with their captions in HTML. The words of a caption show where the model looked."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imgcap_jax.report.html import image_url, is_drawing, text

# Weights are stored as bytes, relative to the largest weight of their word. The script draws them as ``dimmed`` does
# (report/attention.py).
_LEVELS = 255


@dataclass(frozen=True)
class WordAttention:
    """The attention of each word of a caption.

    Attributes:
        words: the words.
        separator: what stands between them in the caption.
        weights: float [words,g,g], the attention of each word to the parts of the image; the rest to 1 goes elsewhere.
    """

    words: tuple[str, ...]
    separator: str
    weights: np.ndarray


@dataclass(frozen=True)
class Row:
    """An image, uint8 [h, w, 3], with its generated caption and its reference captions. None: the image is not there.

    `verdict` is a remark below the caption. `true` sets its colour: True is green, False is red, None is neither.
    `note` is a further remark. `attention` makes the words of the caption show where the model looked. `others` are
    captions by other models, each with the name of its model and a remark. `name` is the alternative text of the image,
    and is shown if there is none.
    """

    image: np.ndarray | None
    caption: str
    references: tuple[str, ...] = ()
    verdict: str = ""
    true: bool | None = None
    note: str = ""
    attention: WordAttention | None = None
    others: tuple[tuple[str, str, str], ...] = ()
    name: str = ""


def figures(rows: Sequence[Row], *, quality: int = 88) -> str:
    """The images in a grid. quality: of their JPEG compression."""
    return f'<div class="shots">\n{"".join(_figure(row, quality) for row in rows)}</div>\n'


def _figure(row: Row, quality: int) -> str:
    kind = {True: " good", False: " bad", None: ""}[row.true]
    caption = text(row.caption)
    attention = ""
    if row.attention is not None:
        words = zip(row.attention.words, row.attention.weights, strict=True)
        separator = text(row.attention.separator)
        caption = separator.join(_word(number, word, weights) for number, (word, weights) in enumerate(words))
        side = row.attention.weights.shape[-1]
        attention = f' data-grid="{side}" data-attention="{_packed(row.attention.weights)}"'
    references = "".join(f"<li>{text(reference)}</li>" for reference in row.references)
    others = "".join(
        f"<dt>{text(name)}</dt><dd>{text(other)}{f' <small>{text(remark)}</small>' if remark else ''}</dd>"
        for name, other, remark in row.others
    )
    return (
        f'<figure class="shot{kind}"{attention}>{_picture(row, quality)}'
        f'<figcaption><p class="caption">{caption}</p>'
        + (f'<p class="note verdict">{text(row.verdict)}</p>' if row.verdict else "")
        + (f'<p class="note">{text(row.note)}</p>' if row.note else "")
        + (f'<dl class="others">{others}</dl>' if others else "")
        + (f'<ul class="references" aria-label="reference captions">{references}</ul>' if references else "")
        + "</figcaption></figure>\n"
    )


def _picture(row: Row, quality: int) -> str:
    if row.image is None:
        return f'<div class="photo none">{text(row.name)}</div>'
    height, width = row.image.shape[:2]
    css = ' class="drawing"' if is_drawing(row.image) else ""
    return (
        f'<div class="photo"><img{css} src="{image_url(row.image, quality=quality)}" alt="{text(row.name)}" '
        f'width="{width}" height="{height}" loading="lazy" decoding="async"></div>'
    )


def _word(number: int, word: str, weights: np.ndarray) -> str:
    """A word that shows its attention while it is pointed at or has the focus.

    It is not a button element, because their text cannot be selected in all browsers. Only the first word of a caption
    is reached with the tab key; the arrow keys go through the others.
    """
    share = float(weights.sum())
    elsewhere = f' data-share="{100 * share:.0f}"' if share < 0.995 else ""
    place = 0 if number == 0 else -1
    return f'<span class="word" role="button" tabindex="{place}"{elsewhere}>{text(word)}</span>'


def _packed(weights: np.ndarray) -> str:
    """The weights [words,g,g] as base64 of one byte each, relative to the largest one of the word."""
    largest = np.maximum(weights.max(axis=(1, 2), keepdims=True), 1e-12)
    return base64.b64encode((_LEVELS * np.clip(weights / largest, 0, 1)).round().astype(np.uint8).tobytes()).decode()
