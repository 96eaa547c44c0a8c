"""A self-contained HTML page of captioned images."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from imgcap_jax.files import write_text

# Images up to this side length (pixels) are drawings. They are stored without loss and enlarged without smoothing.
_DRAWING = 128
# Larger images are reduced to this side length (pixels).
PICTURE = 640

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #6a717b; --line: #e2e5e9;
  --card: #f7f8fa; --good: #1a7f37; --bad: #c93c37; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7eb; --faint: #9199a3;
  --line: #2d333b; --card: #1d2126; --good: #57ab5a; --bad: #e5716b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .75rem; }
p { max-width: 46rem; margin: 0 0 .75rem; }
dl.scores { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0 1.75rem; }
dl.scores div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .55rem .9rem; }
dl.scores dt { color: var(--faint); font-size: .8rem; }
dl.scores dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--line); }
figure img.drawing { image-rendering: pixelated; }
figcaption { padding: .75rem .9rem .9rem; }
.caption { font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.note { font-size: .85rem; margin: .35rem 0 0; color: var(--faint); }
.good .note { color: var(--good); } .bad .note { color: var(--bad); }
.references { margin: .6rem 0 0; padding: .55rem 0 0 1rem; border-top: 1px solid var(--line);
  color: var(--faint); font-size: .85rem; }
"""


@dataclass(frozen=True)
class Row:
    """An image, uint8 [h, w, 3], with its generated caption and its reference captions.

    `note` is a remark below the caption. `verdict` sets its colour: True is correct, False is wrong, None is unknown.
    """

    image: np.ndarray
    caption: str
    references: tuple[str, ...] = ()
    note: str = ""
    verdict: bool | None = None


def caption_page(
    rows: Sequence[Row], path: Path, title: str, scores: Mapping[str, str], paragraphs: Sequence[str] = ()
) -> None:
    """Writes an HTML page with embedded images: title, paragraphs of plain text, scores, then the rows."""
    tiles = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>\n" for name, value in scores.items())
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        + "".join(f"<p>{_text(paragraph)}</p>\n" for paragraph in paragraphs)
        + (f'<dl class="scores">\n{tiles}</dl>\n' if tiles else "")
        + f"<main>\n{''.join(map(_figure, rows))}</main>\n</body>\n</html>\n"
    )
    write_text(path, page)


def _figure(row: Row) -> str:
    verdict = {True: ' class="good"', False: ' class="bad"', None: ""}[row.verdict]
    drawing = max(row.image.shape[:2]) <= _DRAWING
    css = " class='drawing'" if drawing else ""
    references = "".join(f"<li>{_text(reference)}</li>" for reference in row.references)
    return (
        f"<figure{verdict}>"
        f"<img{css} src='{_data_url(row.image, drawing)}' alt='{_text(row.caption)}'>"
        f'<figcaption><p class="caption">{_text(row.caption)}</p>'
        + (f'<p class="note">{_text(row.note)}</p>' if row.note else "")
        + (f'<ul class="references">{references}</ul>' if references else "")
        + "</figcaption></figure>\n"
    )


def _data_url(image: np.ndarray, drawing: bool) -> str:
    buffer = io.BytesIO()
    if drawing:
        Image.fromarray(image).save(buffer, "PNG")
    else:
        picture = Image.fromarray(image)
        picture.thumbnail((PICTURE, PICTURE))
        picture.save(buffer, "JPEG", quality=88)
    return f"data:image/{'png' if drawing else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(text: str) -> str:
    return html.escape(text)
