"""A self-contained HTML page of captioned images: the page of ``imgcap evaluate --page``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from imgcap_jax.files import write_text
from imgcap_jax.report.figures import Row, figures
from imgcap_jax.report.html import document, listed, pairs, text


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
    body = (
        f"<main>\n<h1>{text(title)}</h1>\n"
        + pairs("facts", (facts or {}).items())
        + pairs("tiles", scores.items())
        + "".join(f"<p>{text(paragraph)}</p>\n" for paragraph in paragraphs)
        + listed("legend", legend, "How to read this page")
        + figures(rows)
        + "</main>\n"
    )
    write_text(path, document(title, body))
