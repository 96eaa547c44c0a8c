"""Contact sheets show every image and every word."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.report import contact_sheet as module
from imgcap_jax.report.contact_sheet import contact_sheet


def test_drawings_are_enlarged_without_smoothing(tmp_path: Path) -> None:
    images = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(3)]
    contact_sheet(images, ["one", ["two", "zwei"], "three"], tmp_path / "sheet.png", columns=2, title="Sheet")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for image in images:
        large = image.repeat(4, axis=0).repeat(4, axis=1)
        corners = np.argwhere((sheet[:-255, :-255] == large[0, 0]).all(axis=-1))
        assert any(np.array_equal(sheet[y : y + 256, x : x + 256], large) for y, x in corners)


def test_texts_stay_in_their_column(tmp_path: Path) -> None:
    photo = np.full((90, 300, 3), 200, np.uint8)
    word = "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft"
    text = f"a {word} and {word} at the end ."
    contact_sheet([photo] * 2, [[text, "short"], ""], tmp_path / "sheet.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    right = sheet[:, module._MARGIN + module._TILE :]
    dark = (right.max(axis=-1) < 120).any(axis=0)
    assert not dark.any()  # no text reaches the second column, whose own text is empty
    lines = module._wrap([text], module._TILE)
    assert "".join(line for _, line in lines).replace("\N{NO-BREAK SPACE}", "").replace(" ", "") == (
        text.replace(" ", "")
    )
    assert lines[-1][1].endswith("end\N{NO-BREAK SPACE}.")  # no line begins with the full stop
    assert [begins for begins, _ in lines] == [True] + [False] * (len(lines) - 1)


def test_a_title_that_is_wider_than_the_pictures_is_not_cut_off(tmp_path: Path) -> None:
    contact_sheet([np.zeros((8, 8, 3), np.uint8)], [""], tmp_path / "sheet.png", title="W" * 40)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[: module._MARGIN + 30, : -module._MARGIN].min(axis=-1) < 120).any(axis=0)[-20:].any()
    assert (sheet[:, -module._MARGIN :] == 255).all()


def test_numbers_of_images_and_texts_must_match(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 images and 2 texts"):
        contact_sheet([np.zeros((8, 8, 3), np.uint8)], ["a", "b"], tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())
