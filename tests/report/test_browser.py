"""The pages in a browser: attention, charts, tables, keys, and that nothing is requested."""

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcap_jax.report.figures import Row, WordAttention, figures
from imgcap_jax.report.html import Cell, document, number, table

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with it
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield opened
        opened.close()


class Opened:
    """A page in the browser, with everything that it requested and every error."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.fixture(params=[1280, 375], ids=["desktop", "phone"])
def report(browser: Any, reported: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    options = {"viewport": {"width": request.param, "height": 800}, "reduced_motion": "reduce"}
    with Opened(browser, reported / "report.html", **options) as opened:
        yield opened
        assert not opened.errors


def test_nothing_is_requested(browser: Any, reported: Path, file_server: Any) -> None:
    with Opened(browser, reported / "report.html") as opened:
        opened.page.evaluate("for (const image of document.images) image.loading = 'eager'")
        opened.page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth)")
        outside = [url for url in opened.requests if not url.startswith("data:")]
        assert outside == [(reported / "report.html").as_uri()]
        # The policy stops what a caption with markup could ask for.
        opened.page.evaluate(
            """async (base) => {
                const kinds = { img: "src", link: "href", script: "src", iframe: "src" };
                await fetch(base + "/fetch").catch(() => {});
                for (const [name, address] of Object.entries(kinds)) {
                    const element = document.createElement(name);
                    if (name === "link") element.rel = "stylesheet";
                    element[address] = base + "/" + name;
                    document.body.append(element);
                }
                await new Promise((resolve) => setTimeout(resolve, 300));
            }""",
            file_server.base,
        )
        assert file_server.asked == []
        assert len(opened.errors) >= 5  # each refusal is reported


def test_page_fits_the_screen(report: Opened) -> None:
    width = report.page.evaluate("document.documentElement.clientWidth")
    assert report.page.evaluate("document.documentElement.scrollWidth") == width
    visible = [svg.is_visible() for svg in report.page.locator(".hero svg.plot").all()]
    assert sorted(visible) == [False, True]  # one of the two forms


def alpha(page: Any, figure: Any, place: int, side: int) -> int:
    """The opacity of the canvas of a figure at the centre of a region, 0 to 255."""
    return figure.locator("canvas").evaluate(
        """(canvas, [place, side]) => {
            const x = Math.floor(((place % side) + 0.5) * canvas.width / side);
            const y = Math.floor((Math.floor(place / side) + 0.5) * canvas.height / side);
            return canvas.getContext("2d").getImageData(x, y, 1, 1).data[3];
        }""",
        [place, side],
    )


def check_attention(page: Any, figure: Any, word: int) -> None:
    """The canvas is transparent where the weight of the word is largest, and dark where it is lowest."""
    side = int(figure.get_attribute("data-grid"))
    text = figure.get_attribute("data-attention")
    weights = np.array(page.evaluate("(text) => [...atob(text)].map((letter) => letter.charCodeAt(0))", text))
    of_word = weights.reshape(-1, side * side)[word]
    largest, lowest = alpha(page, figure, int(of_word.argmax()), side), alpha(page, figure, int(of_word.argmin()), side)
    assert largest < 40
    assert lowest == pytest.approx(255 * 0.85 * (1 - of_word.min() / 255), abs=40)


def test_attention_follows_the_pointer(report: Opened) -> None:
    page = report.page
    figure = page.locator("figure.shot").first
    words = figure.locator(".word")
    assert figure.locator("canvas").count() == 0
    for word in (1, 0):
        words.nth(word).hover()
        check_attention(page, figure, word)
    page.locator("h1").hover()
    assert figure.locator("canvas").count() == 0


def test_attention_follows_the_keys(report: Opened) -> None:
    page = report.page
    figure = page.locator("figure.shot").first
    words = figure.locator(".word")
    words.first.focus()
    check_attention(page, figure, 0)
    page.keyboard.press("ArrowRight")
    assert words.nth(1).evaluate("word => word === document.activeElement")
    check_attention(page, figure, 1)
    page.keyboard.press("End")
    assert words.last.evaluate("word => word === document.activeElement")
    page.keyboard.press("Tab")  # one stop per caption
    assert page.locator("figure.shot").nth(1).locator(".word").first.evaluate("word => word === document.activeElement")
    page.keyboard.press("Escape")
    assert page.locator("canvas").count() == 0


def test_attention_follows_a_tap(browser: Any, reported: Path) -> None:
    phone = {"viewport": {"width": 375, "height": 800}, "has_touch": True, "is_mobile": True}
    with Opened(browser, reported / "report.html", **phone) as opened:
        figure = opened.page.locator("figure.shot").first
        figure.locator(".word").nth(1).tap()
        check_attention(opened.page, figure, 1)
        opened.page.locator("#captions h2").tap()
        assert figure.locator("canvas").count() == 0
        assert not opened.errors


def test_charts_show_values(report: Opened) -> None:
    page = report.page
    plot = next(svg for svg in page.locator(".hero svg.plot").all() if svg.is_visible())
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.97 * box["width"], box["y"] + 0.5 * box["height"])
    shown = page.locator("#tip").inner_text()
    assert "epoch 2" in shown
    assert re.search(r"pair \(2 seeds\): 60\.0 ± 28", shown)
    assert plot.locator("circle.mark").count() == 2
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()
    plot.focus()
    assert plot.get_attribute("role") == "application"  # screen readers leave the arrow keys to it
    page.keyboard.press("Home")
    assert "pair (2 seeds): 30.0" in page.locator("[aria-live]").inner_text()
    page.keyboard.press("ArrowRight")
    assert "epoch 2" in page.locator("[aria-live]").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    # A line can be hidden.
    button = page.locator(".hero .lines button").nth(1)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    plot.focus()
    page.keyboard.press("End")
    assert "pair" not in page.locator("#tip").inner_text()
    bar = page.locator("#words g[data-tip]").first
    bar.hover()
    assert "references:" in page.locator("#tip").inner_text()


def test_tables_are_sorted_by_clicks_and_keys(report: Opened) -> None:
    table = report.page.locator("#sweeps table").last
    head = table.locator("thead th").filter(has_text="CIDEr-D")

    def column() -> list[str]:
        place = head.evaluate("cell => cell.cellIndex")
        return [row.locator("td, th").nth(place).inner_text() for row in table.locator("tbody tr").all()]

    assert column() == ["25.0", "75.0", "50.0"]
    head.locator("button").click()
    assert (head.get_attribute("aria-sort"), column()) == ("descending", ["75.0", "50.0", "25.0"])
    head.locator("button").press("Enter")
    assert (head.get_attribute("aria-sort"), column()) == ("ascending", ["25.0", "50.0", "75.0"])
    first = table.locator("thead th").first
    first.locator("button").press("Space")
    assert (first.get_attribute("aria-sort"), head.get_attribute("aria-sort")) == ("descending", "none")
    assert column() == ["50.0", "75.0", "25.0"]


def test_cells_without_a_value_are_last_in_both_directions(browser: Any, tmp_path: Path) -> None:
    values = [3.0, None, 1.0, None, 2.0, 5.0, None, -4.0, 0.5, math.inf]
    rows = [[Cell(f"row {place}"), number(value)] for place, value in enumerate(values)]
    (tmp_path / "page.html").write_text(document("sorted", table(["name", "value"], rows, "values")))
    with Opened(browser, tmp_path / "page.html") as opened:
        button = opened.page.locator("thead button").last

        def column() -> list[str]:
            return opened.page.locator("tbody td").all_inner_texts()

        button.click()
        assert column() == ["5.0", "3.0", "2.0", "1.0", "0.5", "-4.0", "–", "–", "–", "inf"]
        button.click()
        assert column() == ["-4.0", "0.5", "1.0", "2.0", "3.0", "5.0", "–", "–", "–", "inf"]


def contrast(page: Any, first: str, second: str) -> float:
    """The contrast ratio of two CSS colours (WCAG 2)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_have_a_visible_focus_and_are_announced(browser: Any, tmp_path: Path, scheme: str) -> None:
    weights = np.zeros((3, 7, 7))
    weights[0, 0, 6], weights[0, 6, 0] = 0.45, 0.15
    weights[1] = 1 / 49
    weights[2, 3, 3] = 1.0
    attention = WordAttention(("a", "red", "dog"), " ", weights)
    row = Row(np.full((300, 400, 3), 200, np.uint8), "a red dog", attention=attention, name="dog.jpg")
    (tmp_path / "page.html").write_text(document("words", f"<main>{figures([row])}</main>"))
    with Opened(browser, tmp_path / "page.html", color_scheme=scheme) as opened:
        page = opened.page
        said = page.locator("[aria-live]")
        page.keyboard.press("Tab")
        word = page.get_by_role("button", name="a", exact=True)
        assert word.evaluate("word => word === document.activeElement")
        style = word.evaluate("word => { const s = getComputedStyle(word); return [s.outlineStyle, s.outlineWidth]; }")
        assert style == ["solid", "2px"]
        outline = word.evaluate("word => getComputedStyle(word).outlineColor")
        card = page.locator("figure").evaluate("figure => getComputedStyle(figure).backgroundColor")
        assert contrast(page, outline, card) >= 3
        assert said.inner_text() == (
            "a: 75 % of the attention on the image is at the top right. 60 % of the attention is on the image."
        )
        assert page.locator("#tip").inner_text() == "60 % of the attention is on the image"
        page.keyboard.press("End")
        assert said.inner_text() == "dog: 100 % of the attention on the image is at the centre."
        assert page.locator("#tip").is_hidden()
        page.keyboard.press("Enter")
        sync_api.expect(said).to_have_text(re.compile("^dog: 100 %"))
        page.evaluate("getSelection().selectAllChildren(document.querySelector('.caption'))")
        assert page.evaluate("getSelection().toString()").strip() == "a red dog"
        assert page.locator("img").get_attribute("alt") == "dog.jpg"


def test_images_are_found_by_words(report: Opened) -> None:
    page = report.page
    texts = page.locator("figure.shot figcaption").all_text_contents()
    word = next(
        word for word in " ".join(texts).split() if 0 < sum(word in text.lower() for text in texts) < len(texts)
    )
    page.locator(".search input").fill(word.upper())
    expected = sum(word in text.lower() for text in texts)
    assert page.locator("figure.shot:visible").count() == expected
    assert page.locator(".search output").inner_text() == f"{expected} of {len(texts)} images"
    page.locator(".search input").fill("nothinglikethis")
    assert page.locator(".group:visible").count() == 0
    page.locator(".search input").fill("")
    assert page.locator("figure.shot:visible").count() == len(texts)


def test_colours_follow_the_system_and_paper_shows_everything(browser: Any, reported: Path) -> None:
    papers = []
    for scheme in ("light", "dark"):
        with Opened(browser, reported / "report.html", color_scheme=scheme) as opened:
            papers.append(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
            if scheme == "light":
                assert not opened.page.locator("details[open]").count()
                assert opened.page.pdf().startswith(b"%PDF")
                assert opened.page.locator("#settings details[open]").count() == 1
                assert not opened.page.locator(".chart details[open]").count()  # the charts are there
    assert papers == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def different_photos(count: int) -> Iterator[np.ndarray]:
    """Different images with about as much detail as photos: noise whose amplitudes fall with the frequency."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None, :])
    frequencies[0, 0] = 1.0
    for _ in range(count):
        noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(256, 256))) / frequencies**1.3)
        tint = rng.uniform(0.6, 1.0, 3)
        yield ((128 + 45 * noise / noise.std())[..., None] * tint).clip(0, 255).astype(np.uint8)


@pytest.mark.slow
def test_a_thousand_images_open_in_three_seconds(browser: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = tuple(f"word{place}" for place in range(10))
    rows = [
        Row(
            photo,
            " ".join(words),
            (" ".join(words),) * 5,
            attention=WordAttention(words, " ", rng.random((10, 14, 14))),
        )
        for photo in different_photos(1000)
    ]
    path = tmp_path / "page.html"
    path.write_text(document("many", f"<main>{figures(rows, quality=75)}</main>"))
    addresses = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', path.read_text())
    assert len(set(addresses)) == 1000
    # 100 photos of Flickr8k have 11,300 bytes on average at this quality (224 pixels).
    assert sum(map(len, addresses)) * 3 / 4 / 1000 > 11_300
    assert path.stat().st_size < 30e6
    seconds = []
    for _ in range(3):  # other programs can use the processor meanwhile
        begun = time.perf_counter()
        with Opened(browser, path) as opened:
            opened.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            seconds.append(time.perf_counter() - begun)
            assert opened.page.locator("figure.shot").count() == 1000
    print(f"{path.stat().st_size / 1e6:.1f} MB; opened in {', '.join(f'{one:.2f}' for one in seconds)} s")
    assert min(seconds) < 3
