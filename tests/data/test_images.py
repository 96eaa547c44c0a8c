"""Decoding, resizing and augmenting generated images."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from imgcap_jax.data.image_files import ImageError
from imgcap_jax.data.images import Augmentation, augment, decode, names_side
from imgcap_jax.errors import UserError

AsStored = Callable[[Image.Image, int], Image.Image]
RED, GREEN, BLUE, WHITE = (250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 250)


def quadrants(width: int = 96, height: int = 64) -> Image.Image:
    """Red, green / blue, white. All flips and rotations of the image differ."""
    picture = Image.new("RGB", (width, height))
    for colour, x, y in ((RED, 0, 0), (GREEN, 1, 0), (BLUE, 0, 1), (WHITE, 1, 1)):
        picture.paste(colour, (x * width // 2, y * height // 2, (x + 1) * width // 2, (y + 1) * height // 2))
    return picture


def encode(picture: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def corners(pixels: np.ndarray) -> np.ndarray:
    size = len(pixels)
    near, far = size // 4, 3 * size // 4
    return pixels[[near, near, far, far], [near, far, near, far]].astype(int)


def assert_quadrants(pixels: np.ndarray, tolerance: int = 12) -> None:
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(corners(pixels), [RED, GREEN, BLUE, WHITE], atol=tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_is_upright_for_every_exif_orientation(orientation: int, kind: str, as_stored: AsStored) -> None:
    picture = as_stored(quadrants(), orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, kind, exif=exif)
    assert_quadrants(decode(data, 32))
    cropped = decode(data, 32, "crop")
    # 96 x 64 upright: the centre crop is 64 wide, so all four colours remain, each half as wide as the crop.
    assert_quadrants(cropped)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpeg_of_other_colour_spaces(mode: str) -> None:
    pixels = decode(encode(quadrants().convert(mode)), 32)
    if mode == "CMYK":
        assert_quadrants(pixels, tolerance=20)
    else:
        grey = np.asarray(quadrants().convert("L").convert("RGB").resize((32, 32)))
        np.testing.assert_allclose(corners(pixels), corners(grey), atol=6)


def test_png_palette_alpha_grey_and_16_bits() -> None:
    assert_quadrants(decode(encode(quadrants().quantize(8), "PNG"), 32))
    transparent = quadrants().convert("RGBA")
    transparent.paste((0, 0, 0, 0), (48, 32, 96, 64))
    # The transparent quarter has black pixels and must appear white.
    assert_quadrants(decode(encode(transparent, "PNG"), 32))
    grey = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(64, 0)
    deep = decode(encode(Image.fromarray(grey), "PNG"), 64)
    np.testing.assert_allclose(deep[0, :, 0], np.linspace(0, 255, 64), atol=1)


def test_squash_keeps_everything_and_crop_keeps_the_ratio() -> None:
    picture = Image.new("RGB", (300, 100), GREEN)
    picture.paste(RED, (0, 0, 100, 100))
    data = encode(picture)
    np.testing.assert_allclose(decode(data, 30)[15, 4], RED, atol=12)
    np.testing.assert_allclose(decode(data, 30, "crop")[15, 4], GREEN, atol=12)


def test_pixels_in_place_of_an_encoded_image() -> None:
    pixels = np.asarray(quadrants())
    assert_quadrants(decode(pixels, 32))
    same = np.asarray(quadrants(32, 32))
    np.testing.assert_array_equal(decode(same, 32), same)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "unknown image format"),
        (encode(quadrants(400, 400))[:900], "cannot be decoded"),
        (encode(quadrants(400, 400), "PNG")[:300], "cannot be decoded"),
        (b"\xff\xd8\xff" + bytes(200), "damaged|cannot be decoded"),
    ],
)
def test_a_damaged_image_raises_an_image_error_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data, 32)
    with pytest.raises(ImageError, match=reason):
        augment(data, [], 32, np.random.default_rng(0), Augmentation(0.5, True, 0.2))


def test_a_stray_byte_before_the_end_marker_is_tolerated() -> None:
    data = encode(quadrants())
    assert data.endswith(b"\xff\xd9")
    assert_quadrants(decode(data[:-2] + b"\x00" + data[-2:], 32))


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("A man on the left.", True),
        ("a left-handed pitcher", True),
        ("The rightmost dog", True),
        ("a sign in the top-right corner", True),
        ("Right: a cat", True),
        ("an upright bass in bright light", False),
        ("a cleft rock, a copyright sign", False),
        ("a dog runs", False),
    ],
)
def test_which_captions_name_a_side(caption: str, named: bool) -> None:
    assert names_side([caption]) is named
    assert names_side(["a dog", caption]) is named


@pytest.mark.parametrize(
    ("words", "caption", "named"),
    [
        (("links", "rechts"), "Ein Hund läuft nach LINKS.", True),
        (("links", "rechts"), "der hund ist left", False),
        (("link",), "ein Blinker", False),
        (("左", "右"), "一只狗在左边跑", True),
        (("左", "右"), "一只狗在跑", False),
        (("ซ้าย",), "สุนัขทางซ้าย", True),
        (("a.b",), "axb", False),
        ((), "left", False),
    ],
)
def test_side_words_of_other_languages(words: tuple[str, ...], caption: str, named: bool) -> None:
    assert names_side([caption], words) is named
    flip = Augmentation(flip=True, side_words=words)
    data = encode(quadrants())
    plain = decode(data, 32)
    rng = np.random.default_rng(0)
    kept = [np.array_equal(augment(data, [caption], 32, rng, flip), plain) for _ in range(30)]
    assert all(kept) is named


def test_side_words_do_not_change_images_by_themselves() -> None:
    assert not Augmentation(side_words=("links",)).changes_images
    assert Augmentation(jitter=0.1).changes_images
    # Feature stores of English captions are found by this text.
    assert repr(Augmentation(flip=True)) == "Augmentation(crop_scale_min=1.0, flip=True, jitter=0.0)"
    assert "side_words=('links',)" in repr(Augmentation(side_words=("links",)))
    with pytest.raises(UserError, match="must be a list of words"):
        Augmentation(side_words=("",))


def test_images_whose_captions_name_a_side_are_never_mirrored() -> None:
    data = encode(quadrants())
    flip = Augmentation(flip=True)
    rng = np.random.default_rng(0)
    plain = decode(data, 32)
    for _ in range(40):
        np.testing.assert_array_equal(augment(data, ["x", "two dogs at left"], 32, rng, flip), plain)
    mirrored = [np.array_equal(augment(data, ["x"], 32, rng, flip), plain[:, ::-1]) for _ in range(200)]
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_a_crop_has_the_right_position_in_a_jpeg_decoded_at_reduced_scale(resize: str) -> None:
    # Colour encodes the place: red grows to the right, green downwards.
    x, y = np.meshgrid(np.linspace(0, 255, 640), np.linspace(0, 255, 480))
    ramp = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    data = encode(Image.fromarray(ramp), quality=95)
    for seed in range(20):
        crop = Augmentation(crop_scale_min=0.1)
        scaled = augment(data, [], 24, np.random.default_rng(seed), crop, resize)
        exact = augment(ramp, [], 24, np.random.default_rng(seed), crop, resize)
        # `exact` is the same box of the image at full size.
        np.testing.assert_allclose(scaled.astype(int), exact.astype(int), atol=7)
        assert np.abs(scaled.astype(int) - exact).mean() < 1.5
        red, green = exact[..., 0].astype(int), exact[..., 1].astype(int)
        area = (red.max() - red.min()) * (green.max() - green.min()) / 255**2
        assert 0.05 < area <= 1
        across, down = (red.max() - red.min()) * 640 / 255, (green.max() - green.min()) * 480 / 255
        ratio = across / down * (480 / 640 if resize == "squash" else 1)
        assert 0.7 < ratio < 1.42


def test_a_small_crop_of_a_large_photo_is_as_sharp_as_the_photo() -> None:
    # Stripes ten pixels apart. A small crop must still show them. It would not if the whole image were decoded at the
    # output size of the crop.
    stripes = 127 + 100 * np.sin(np.arange(640) * 2 * np.pi / 10)
    pixels = stripes[None, :, None].repeat(480, 0).repeat(3, 2).astype(np.uint8)
    data = encode(Image.fromarray(pixels), quality=95)
    sharp = 0
    for seed in range(20):
        crop = Augmentation(crop_scale_min=0.05)
        scaled = augment(data, [], 96, np.random.default_rng(seed), crop).astype(int)
        exact = augment(pixels, [], 96, np.random.default_rng(seed), crop).astype(int)
        if exact.std() > 60:
            sharp += 1
            assert scaled.std() > 0.85 * exact.std()
    assert sharp >= 2


def test_no_augmentation_is_plain_decoding_and_randomness_comes_from_the_rng() -> None:
    data = encode(quadrants())
    np.testing.assert_array_equal(augment(data, [], 32, np.random.default_rng(0), Augmentation()), decode(data, 32))
    full = Augmentation(0.3, True, 0.4)
    first = augment(data, [], 32, np.random.default_rng(1), full)
    np.testing.assert_array_equal(first, augment(data, [], 32, np.random.default_rng(1), full))
    assert (first != augment(data, [], 32, np.random.default_rng(2), full)).any()


def test_jitter_changes_colours_within_its_bounds_and_nothing_else() -> None:
    pixels = np.full((32, 32, 3), (120, 100, 80), np.uint8)
    values = np.stack(
        [augment(pixels, [], 32, np.random.default_rng(seed), Augmentation(jitter=0.2))[5, 5] for seed in range(200)]
    ).astype(int)
    # Brightness alone spans 80 to 120 %; contrast does not change a flat image.
    assert values[:, 1].min() < 84
    assert values[:, 1].max() > 116
    assert values[:, 1].min() >= 76
    assert values[:, 1].max() <= 124
    # Saturation increases or decreases the differences between the channels.
    spread = (values[:, 0] - values[:, 2]) / values.mean(1) * 2.5
    assert spread.min() < 0.85
    assert spread.max() > 1.15


def test_jitter_is_brightness_contrast_and_saturation_as_pil_defines_them() -> None:
    y, x = np.mgrid[0:32, 0:32]
    # Mid-range colours, so that no intermediate result is clipped.
    pixels = np.stack([90 + 2 * x, 150 - y, 100 + x], -1).astype(np.uint8)
    for seed in range(5):
        expected = Image.fromarray(pixels)
        factors = 1 + 0.2 * np.random.default_rng(seed).uniform(-1, 1, 3)
        for kind, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
        ):
            expected = kind(expected).enhance(factor)
        changed = augment(pixels, [], 32, np.random.default_rng(seed), Augmentation(jitter=0.2))
        np.testing.assert_allclose(changed.astype(int), np.asarray(expected).astype(int), atol=3)


# Forms of "left" and "right" that captions use, and words that name no side.
SIDES = {
    "German": ("links rechts linke linken linker linkes rechte rechten rechter rechtes linksseitig", "recht flink"),
    "French": ("gauche gauches droite droites droit droits", "adroit endroit"),
    "Spanish": ("izquierda izquierdo izquierdas derecha derecho derechos", "derrumbe"),
    "Portuguese": ("esquerda esquerdo direita direito direitas", "diretor"),
    "Italian": ("sinistra sinistro destra destro", "destino maldestro"),
    "Dutch": ("links rechts linker rechter linkerkant rechterhand linkse rechtse", "recht flink"),
    "Chinese, Japanese": ("左边 右侧 左手 右の犬 在左", "上 下"),
}


@pytest.mark.parametrize("language", SIDES)
def test_side_words_of_the_documentation(language: str) -> None:
    table = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (listed,) = re.findall(rf"^\| {language} \| `(.+)` \|$", table, re.MULTILINE)
    words = tuple(listed.split(","))
    sides, others = SIDES[language]
    assert [form for form in sides.split() if not names_side([f"xx {form} xx"], words)] == []
    assert [form for form in others.split() if names_side([f"xx {form} xx"], words)] == []


def test_side_words_can_be_separated_by_commas() -> None:
    """As in docs/training.md and on the command line."""
    augmentation = Augmentation(side_words=("links,rechts", "oben"))
    assert augmentation.side_words == ("links", "rechts", "oben")
    assert names_side(["ein Hund links im Bild"], augmentation.side_words)
    with pytest.raises(UserError, match="must be a list of words"):
        Augmentation(side_words=("links,,rechts",))
