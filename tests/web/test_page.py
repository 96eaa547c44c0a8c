"""The page in Chromium: drop, paste, camera, hover, errors, a phone, the dark."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.data.sources import open_source

playwright = pytest.importorskip("playwright.sync_api", reason="opens pages with playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

_DROP = """photo => {
  const data = new DataTransfer();
  const bytes = Uint8Array.from(atob(photo), letter => letter.charCodeAt(0));
  data.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
  return data;
}"""
_PASTE = "data => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}))"


@pytest.fixture
def page(service: Any) -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=options)
        opened = browser.new_context(viewport={"width": 1200, "height": 900}, permissions=["camera"]).new_page()
        opened.problems = []
        opened.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.on("console", lambda line: opened.problems.append(line.text) if "Security Policy" in line.text else None)
        opened.goto(f"http://127.0.0.1:{service.port}/")
        opened.wait_for_selector("#style option", state="attached")
        yield opened
        browser.close()


def test_photos_come_in_by_drop_paste_file_and_camera(page: Any, tiny_data: Path, tmp_path: Path) -> None:
    photos = [example.image for example in open_source("scenes", "test", tiny_data)]
    captions, expect = page.locator(".card .caption"), playwright.expect
    transfer = page.evaluate_handle(_DROP, base64.b64encode(photos[0]).decode())
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(captions).to_have_count(1, timeout=60_000)
    page.evaluate(_PASTE, page.evaluate_handle(_DROP, base64.b64encode(photos[1]).decode()))
    expect(captions).to_have_count(2, timeout=60_000)
    for number, photo in enumerate(photos[2:6]):
        (tmp_path / f"{number}.png").write_bytes(photo)
    page.set_input_files("#files", [str(tmp_path / f"{number}.png") for number in range(4)])
    expect(captions).to_have_count(6, timeout=60_000)
    page.select_option("#style", "fast")
    page.click("#camera")
    page.wait_for_selector("dialog[open]")
    page.wait_for_timeout(500)
    page.click("#shoot")
    expect(captions).to_have_count(7, timeout=60_000)
    assert page.locator("#state").inner_text() == "7 photos done"
    # The alternative text of each picture is its caption.
    texts = [one.strip() for one in captions.all_inner_texts()]
    assert [one.get_attribute("alt") for one in page.locator(".card img").all()] == texts
    assert page.problems == []


def test_a_word_shows_where_the_model_looked(page: Any, tiny_data: Path) -> None:
    photo = open_source("scenes", "test", tiny_data)[0].image
    page.dispatch_event(
        "#drop", "drop", {"dataTransfer": page.evaluate_handle(_DROP, base64.b64encode(photo).decode())}
    )
    words = page.locator(".card .caption span")
    playwright.expect(words.first).to_be_visible(timeout=60_000)
    assert page.locator("canvas").count() == 0
    words.first.hover()
    playwright.expect(page.locator(".photo canvas")).to_have_count(1)
    box, picture = page.locator(".photo canvas").bounding_box(), page.locator(".photo img").bounding_box()
    assert box == picture
    page.mouse.move(0, 0)
    playwright.expect(page.locator(".photo canvas")).to_have_count(0)
    words.first.focus()  # by the keyboard
    page.keyboard.press("ArrowRight")
    assert page.evaluate("() => [...document.querySelectorAll('.caption span')].indexOf(document.activeElement)") == 1
    playwright.expect(page.locator(".photo canvas")).to_have_count(1)


def test_errors_are_shown_and_can_be_tried_again(page: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xffno photo")
    page.set_input_files("#files", [str(tmp_path / "bad.jpg")])
    error = page.locator(".card .error")
    playwright.expect(error).to_contain_text("bad.jpg: cannot be decoded", timeout=60_000)
    page.route("**/api/caption*", lambda route: route.abort())
    page.get_by_role("button", name="Try again").click()
    playwright.expect(error).to_contain_text("The server can't be reached.")


@pytest.mark.parametrize("width", [320, 390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen_and_text_can_be_read(page: Any, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    root = "document.documentElement"
    assert page.evaluate(f"() => {root}.scrollWidth - {root}.clientWidth") == 0
    ink, paper = (
        page.evaluate(f"() => getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    dark, light = (sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper))
    assert (dark < light) == (scheme == "light")
    assert abs(dark - light) > 500
