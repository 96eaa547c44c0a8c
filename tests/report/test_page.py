"""The HTML page is complete, escaped and self-contained."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from imgcap_jax.report.figures import Row, WordAttention
from imgcap_jax.report.page import caption_page


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_complete_escaped_and_self_contained(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawing = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    photo = np.full((300, 1500, 3), (200, 30, 60), np.uint8)
    evil = "<script>alert('x')</script> \"quoted\" & more"
    rows = [
        Row(drawing, evil, ("a first reference", evil), verdict="true of its scene", true=True, note="CIDEr-D 7"),
        Row(photo, "a red field", true=False, name=f"{evil}.jpg"),
    ]
    caption_page(
        rows,
        tmp_path / "new" / "page.html",
        evil,
        {"CIDEr-D <dev>": "101.2"},
        facts={"Run": "runs/<mine>"},
        legend=["Green & red."],
        paragraphs=["One & only."],
    )
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.tags.count("script") == 1  # that of the page
    assert not [address for address in re.findall(r"https?://[^\s\"']+", page) if "www.w3.org/2000/svg" not in address]
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none'; img-src data:;")
    for name, kind in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert " style=" not in page  # which the policy forbids
    # In the title, the heading, a caption and a reference.
    assert reader.text.count(evil) == 4
    assert {"CIDEr-D <dev>", "101.2", "One & only.", "a first reference", "a red field"} <= set(reader.text)
    assert {"Run", "runs/<mine>", "Green & red.", "true of its scene", "CIDEr-D 7"} <= set(reader.text)
    assert [image["alt"] for image in reader.images] == ["", f"{evil}.jpg"]  # not the caption, which follows
    pictures = []
    for image in reader.images:
        kind, data = (image["src"] or "").split(",")
        pictures.append((kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))))
    assert pictures[0][0] == "data:image/png;base64"
    np.testing.assert_array_equal(pictures[0][1], drawing)
    assert [image.get("class") for image in reader.images] == ["drawing", None]
    assert pictures[1][1].shape == (128, 640, 3)
    assert np.abs(pictures[1][1].astype(int) - photo[0, 0]).max() < 8
    assert page.count('<figure class="shot good">') == page.count('<figure class="shot bad">') == 1


def test_words_show_where_the_attention_was(tmp_path: Path) -> None:
    photo = np.full((300, 600, 3), 200, np.uint8)
    weights = np.zeros((2, 7, 7))
    weights[0, 0, 6], weights[1] = 0.6, 1 / 49
    attention = WordAttention(("<b>", "dog"), " ", weights)
    caption_page([Row(photo, "<b> dog", attention=attention)], tmp_path / "page.html", "title", {})
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert "b" not in reader.tags
    words = [text for text in reader.text if text in ("<b>", "dog")]
    assert words == ["<b>", "dog"]
    # The arrow keys go to the second word.
    assert re.findall(r'class="word" role="button" tabindex="(-?\d)"', page) == ["0", "-1"]
    assert re.findall(r'data-share="(\d+)"', page) == ["60"]
    assert 'width="600" height="300"' in page
    ((side, packed),) = re.findall(r'data-grid="(\d+)" data-attention="([^"]+)"', page)
    levels = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(2, int(side), int(side))
    assert side == "7"
    assert levels[0, 0, 6] == 255  # relative to the largest weight of the word
    assert levels[0].sum() == 255
    assert (levels[1] == 255).all()
