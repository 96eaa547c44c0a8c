"""The HTML page is complete, escaped and self-contained."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from imgcap_jax.report.page import Row, caption_page


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
        Row(drawing, evil, ("a first reference", evil), note="true of its scene", verdict=True),
        Row(photo, "a red field", verdict=False),
    ]
    caption_page(rows, tmp_path / "new" / "page.html", evil, {"CIDEr-D <dev>": "101.2"}, ["One & only."])
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert "http" not in page  # no external resources
    # In the title, the heading, a caption and a reference. The alternative text is an attribute and not counted.
    assert reader.text.count(evil) == 4
    assert {"CIDEr-D <dev>", "101.2", "One & only.", "a first reference", "a red field"} <= set(reader.text)
    assert [image["alt"] for image in reader.images] == [evil, "a red field"]
    pictures = []
    for image in reader.images:
        kind, data = (image["src"] or "").split(",")
        pictures.append((kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))))
    assert pictures[0][0] == "data:image/png;base64"
    np.testing.assert_array_equal(pictures[0][1], drawing)
    assert [image.get("class") for image in reader.images] == ["drawing", None]
    assert pictures[1][1].shape == (128, 640, 3)
    assert np.abs(pictures[1][1].astype(int) - photo[0, 0]).max() < 8
    assert page.count('<figure class="good">') == page.count('<figure class="bad">') == 1
