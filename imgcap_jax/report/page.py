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
from imgcap_jax.report.attention import darkness

# Images up to this side length (pixels) are drawings. They are stored without loss and enlarged without smoothing.
_DRAWING = 128
# Larger images are reduced to this side length (pixels).
PICTURE = 640
_SMOOTH = 4  # attention is enlarged by this factor with bicubic interpolation; the browser does the rest

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #59606a; --line: #e2e5e9;
  --card: #f7f8fa; --good: #1a7f37; --bad: #c93c37; --mark: #fff3c4; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7eb; --faint: #9199a3;
  --line: #2d333b; --card: #1d2126; --good: #57ab5a; --bad: #e5716b; --mark: #574a1c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .35rem; }
p { max-width: 46rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
dl { margin: 0 0 1.25rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dl.facts dt { color: var(--faint); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
dl.scores { display: flex; flex-wrap: wrap; gap: .6rem; }
dl.scores div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .45rem .8rem; }
dl.scores dt { color: var(--faint); font-size: .8rem; }
dl.scores dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.legend { max-width: 60rem; margin: 0 0 1.5rem; padding: .8rem 1rem; border-left: 4px solid var(--line); }
.legend ul { margin: 0; padding-left: 1.1rem; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { position: relative; margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; }
figure > img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--line); }
figure img.drawing { image-rendering: pixelated; }
figcaption { padding: .75rem .9rem .9rem; }
.caption { font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.word { cursor: help; border-bottom: 1px dotted var(--faint); }
.word:hover, .word:focus { background: var(--mark); outline: 0; }
.word img { display: none; position: absolute; pointer-events: none; top: 0; left: var(--left); width: var(--width);
  margin-top: var(--top); height: auto; aspect-ratio: var(--ratio); }
.word:hover img, .word:focus img { display: block; }
main:has(.word:hover) .word:focus:not(:hover) img { display: none; }
.note { font-size: .85rem; margin: .35rem 0 0; color: var(--faint); }
.good .verdict { color: var(--good); } .bad .verdict { color: var(--bad); }
.references { margin: .6rem 0 0; padding: .55rem 0 0 1rem; border-top: 1px solid var(--line);
  color: var(--faint); font-size: .85rem; }
"""


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
    """An image, uint8 [h, w, 3], with its generated caption and its reference captions.

    `verdict` is a remark below the caption. `true` sets its colour: True is green, False is red, None is neither.
    `note` is a further remark. `attention` makes the words of the caption show where the model looked.
    """

    image: np.ndarray
    caption: str
    references: tuple[str, ...] = ()
    verdict: str = ""
    true: bool | None = None
    note: str = ""
    attention: WordAttention | None = None


def caption_page(
    rows: Sequence[Row],
    path: Path,
    title: str,
    scores: Mapping[str, str],
    *,
    facts: Mapping[str, str] | None = None,
    legend: Sequence[str] = (),
    paragraphs: Sequence[str] = (),
) -> None:
    """Writes an HTML page with embedded images.

    Args:
        rows: the images.
        path: the file.
        title: the heading.
        scores: name -> value, shown as tiles.
        facts: name -> value, shown as a table below the heading.
        legend: sentences that explain the page, shown as a list above the images.
        paragraphs: plain text below the scores.
    """
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        + _pairs("facts", facts or {}, "{}\n")
        + _pairs("scores", scores, "<div>{}</div>\n")
        + "".join(f"<p>{_text(paragraph)}</p>\n" for paragraph in paragraphs)
        + _legend(legend)
        + f"<main>\n{''.join(map(_figure, rows))}</main>\n</body>\n</html>\n"
    )
    write_text(path, page)


def _pairs(kind: str, values: Mapping[str, str], frame: str) -> str:
    pairs = (frame.format(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>") for name, value in values.items())
    return f'<dl class="{kind}">\n{"".join(pairs)}</dl>\n' if values else ""


def _legend(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{_text(sentence)}</li>\n" for sentence in sentences)
    return f'<section class="legend">\n<h2>How to read this page</h2>\n<ul>\n{items}</ul>\n</section>\n'


def _figure(row: Row) -> str:
    kind = {True: ' class="good"', False: ' class="bad"', None: ""}[row.true]
    drawing = max(row.image.shape[:2]) <= _DRAWING
    css = " class='drawing'" if drawing else ""
    references = "".join(f"<li>{_text(reference)}</li>" for reference in row.references)
    place, caption = "", _text(row.caption)
    if row.attention is not None:
        place = f' style="{_place(row.image)}"'
        words = zip(row.attention.words, row.attention.weights, strict=True)
        caption = _text(row.attention.separator).join(_word(word, weights) for word, weights in words)
    return (
        f"<figure{kind}{place}>"
        f"<img{css} src='{_data_url(row.image, drawing)}' alt='{_text(row.caption)}'>"
        f'<figcaption><p class="caption">{caption}</p>'
        + (f'<p class="note verdict">{_text(row.verdict)}</p>' if row.verdict else "")
        + (f'<p class="note">{_text(row.note)}</p>' if row.note else "")
        + (f'<ul class="references">{references}</ul>' if references else "")
        + "</figcaption></figure>\n"
    )


def _place(image: np.ndarray) -> str:
    """The place of the image in the square that contains it, for the pictures of attention."""
    height, width = image.shape[:2]
    side = max(height, width)
    values = {"left": (side - width) / 2, "top": (side - height) / 2, "width": width}
    percent = "".join(f"--{name}:{100 * value / side:.3f}%;" for name, value in values.items())
    return f"{percent}--ratio:{width / height:.4f}"


def _word(word: str, weights: np.ndarray) -> str:
    """A word that shows its attention while it is pointed at or has the focus: the image is darker where it is low."""
    grid = darkness(weights, (weights.shape[1] * _SMOOTH, weights.shape[0] * _SMOOTH))
    picture = Image.fromarray(np.stack([np.zeros_like(grid), grid], -1), "LA")
    share = float(weights.sum())
    elsewhere = f' title="{100 * share:.0f} % of the attention is on the image"' if share < 0.995 else ""
    return f'<span class="word" tabindex="0"{elsewhere}>{_text(word)}<img src="{_url(picture, "PNG")}" alt=""></span>'


def _data_url(image: np.ndarray, drawing: bool) -> str:
    picture = Image.fromarray(image)
    if drawing:
        return _url(picture, "PNG")
    picture.thumbnail((PICTURE, PICTURE))
    return _url(picture, "JPEG")


def _url(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(text: str) -> str:
    return html.escape(text)
