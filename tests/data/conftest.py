"""Fixtures for the tests of data."""

from collections.abc import Callable

import pytest
from PIL import Image

# How a camera in that orientation stores an upright scene: the inverse of what a reader does to display it.
_STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(scope="session")
def as_stored() -> Callable[[Image.Image, int], Image.Image]:
    """Turns an upright picture as a camera in an EXIF orientation (1 to 8) stores it."""

    def turn(upright: Image.Image, orientation: int) -> Image.Image:
        stored_as = _STORED_AS[orientation]
        return upright if stored_as is None else upright.transpose(stored_as)

    return turn
