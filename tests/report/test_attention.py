"""Pictures of attention weights."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.errors import UserError
from imgcap_jax.report import attention
from imgcap_jax.report.attention import attention_picture, dimmed


def test_region_with_attention_is_bright_and_the_others_are_dark() -> None:
    weights = np.zeros((4, 4))
    weights[0, 2] = 0.9  # first row, third column
    photo = np.full((80, 160, 3), 200, np.uint8)
    light = dimmed(photo, weights)
    assert light[10, 100].min() > 190
    for row, column in [(50, 20), (50, 100), (10, 20), (70, 150)]:
        assert light[row, column].max() < 40
    np.testing.assert_array_equal(dimmed(photo, np.full((4, 4), 1 / 16)), photo)


def test_words_are_shown_with_their_probability_and_their_sum_of_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[object] = []
    sheet = attention.contact_sheet

    def watched(images: object, texts: object, *rest: object, **more: object) -> None:
        drawn.append(texts)
        sheet(images, texts, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "contact_sheet", watched)
    weights = np.array([[0.25] * 4, [0.1] * 4])
    photo = np.zeros((30, 30, 3), np.uint8)
    attention_picture(photo, ["a", "dog"], [np.log(0.5), np.log(0.25)], weights, tmp_path / "a.png")
    assert drawn == [
        ["the photo; the number after each word is its probability", "a (50 %)", "dog (25 %, attention 40 %)"]
    ]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 3 * 256
    with pytest.raises(UserError, match="the model has 5 regions"):
        attention_picture(photo, ["a"], [0.0], np.ones((1, 5)), tmp_path / "b.png")
