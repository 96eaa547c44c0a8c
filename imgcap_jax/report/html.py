"""Self-contained HTML pages: one style sheet and one script for all of them, and a policy that forbids requests."""

import base64
import hashlib
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image

# Images up to this side length (pixels) are drawings. They are stored without loss and enlarged without smoothing.
DRAWING = 128
PICTURE = 640  # larger images are reduced to this side length (pixels)
_SHORT = 40  # characters of a cell that is not wrapped
_QUALITY = 88  # of JPEG; photos of pages with many of them are smaller


def text(value: str) -> str:
    """Text as HTML, also for attributes in quotes."""
    return html.escape(value)


def document(title: str, body: str) -> str:
    """A page with the style sheet and the script. The browser loads nothing else, even if a caption contained markup.

    Args:
        title: plain text.
        body: the HTML of the body.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        f"base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


@cache
def _asset(name: str) -> str:
    return (resources.files("imgcap_jax.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def image_url(image: np.ndarray, *, quality: int = _QUALITY) -> str:
    """An image, uint8 [h,w,3], as a data URL: PNG for small drawings, JPEG of at most ``PICTURE`` pixels for photos."""
    drawing, picture, buffer = is_drawing(image), Image.fromarray(image), io.BytesIO()
    if drawing:
        picture.save(buffer, "PNG")
    else:
        picture.thumbnail((PICTURE, PICTURE))
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return f"data:image/{'png' if drawing else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def is_drawing(image: np.ndarray) -> bool:
    """Whether an image [h,w,3] is small enough to be a drawing."""
    return max(image.shape[:2]) <= DRAWING


def pairs(kind: str, values: Iterable[tuple[str, str]]) -> str:
    """A list of names and values (plain text) of a class of the style sheet; "" if there are none."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>\n" for name, value in values)
    return f'<dl class="{kind}">\n{rows}</dl>\n' if rows else ""


def listed(kind: str, sentences: Sequence[str], title: str = "") -> str:
    """A box with a list of sentences (plain text); "" if there are none."""
    if not sentences:
        return ""
    items = "".join(f"<li>{text(sentence)}</li>\n" for sentence in sentences)
    head = f"<h2>{text(title)}</h2>\n" if title else ""
    return f'<section class="{kind}">\n{head}<ul>\n{items}</ul>\n</section>\n'


def section(name: str, title: str, content: str) -> str:
    """A section of a page. name: its id; title: plain text; content: HTML."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{text(title)}</h2>\n'
        f"{content}</section>\n"
    )


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the number by which its column is sorted.

    value: None: the column is sorted by the text. NaN: the cell has no value, and is last in both directions.
    raw: whether the text is HTML.
    """

    text: str
    value: float | None = None
    raw: bool = False


def number(value: float | None, digits: int = 1, unit: str = "") -> Cell:
    """A cell with a number; a dash for None."""
    return Cell("–", math.nan) if value is None else Cell(f"{value:,.{digits}f}{unit}", float(value))


def table(head: Sequence[str], rows: Sequence[Sequence[Cell | str]], caption: str, *, left: int = 1) -> str:
    """A table whose columns can be sorted by a click or a key.

    Args:
        head: the titles of the columns.
        rows: the cells; a text is a cell that is sorted by its text.
        caption: what the table shows (plain text).
        left: the number of columns, from the left, that contain text. The others are right-aligned.
    """
    heads = "".join(
        f'<th scope="col" aria-sort="none"{"" if place < left else " class=n"}>'
        f'<button type="button">{text(name)}</button></th>'
        for place, name in enumerate(head)
    )
    body = "".join(f"<tr>{''.join(_cell(cell, place, left) for place, cell in enumerate(row))}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table class="sortable">\n'
        f"<caption>{text(caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _cell(cell: Cell | str, place: int, left: int) -> str:
    cell = Cell(cell) if isinstance(cell, str) else cell
    content = cell.text if cell.raw else text(cell.text)
    value = "" if cell.value is None else f' data-v="{cell.value:.6g}"' if math.isfinite(cell.value) else ' data-v=""'
    kind = " class=n" if place >= left else " class=t" if len(cell.text) <= _SHORT else ""
    return f'<th scope="row"{value}{kind}>{content}</th>' if place == 0 else f"<td{value}{kind}>{content}</td>"
