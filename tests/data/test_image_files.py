"""Images have the right pixels however they are given, and no file needs much memory or time or runs a program."""

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, features

from imgcap_jax.captioner import Captioner
from imgcap_jax.data import image_files
from imgcap_jax.data.builders.folder import read_image
from imgcap_jax.data.image_files import ImageError, read_file, storable
from imgcap_jax.data.images import decode
from imgcap_jax.data.sources import CaptionExample
from imgcap_jax.programs import loader
from imgcap_jax.report.contact_sheet import example_picture

AsStored = Callable[[Image.Image, int], Image.Image]
SIDE = 32
WHITE = 255
# Only `pixels` and `view` of a captioner are needed, and no model.
CAPTIONER: Any = SimpleNamespace(
    runs=[SimpleNamespace(experiment=SimpleNamespace(data=SimpleNamespace(image_size=SIDE, resize="squash")))]
)
AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="PIL has no AVIF"))


def by_another_reader(path: Path) -> np.ndarray:
    """What a program without any of our rules sees in a prepared dataset."""
    with Image.open(io.BytesIO(read_image(path))) as picture:
        assert picture.getexif().get(0x0112, 1) == 1 or picture.format == "JPEG"
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


WAYS: dict[str, Callable[[Path], np.ndarray]] = {
    "path": lambda path: Captioner.pixels(CAPTIONER, path)[0],
    "bytes": lambda path: Captioner.pixels(CAPTIONER, path.read_bytes())[0],
    "prepared": lambda path: decode(read_image(path), SIDE),
    "prepared, read by others": by_another_reader,
    "PIL image": lambda path: Captioner.pixels(CAPTIONER, Image.open(path))[0],
    "view": lambda path: Captioner.view(CAPTIONER, path),
    "report": lambda path: example_picture(CaptionExample(read_image(path), "", 0, ()), SIDE),
}


def assert_same(path: Path, expected: np.ndarray, tolerance: int = 0) -> None:
    """All ways give the expected pixels, [h,w] or [h,w,3]."""
    if expected.ndim == 2:
        expected = expected[..., None].repeat(3, -1)
    for way, pixels in WAYS.items():
        found = pixels(path)
        assert found.dtype == np.uint8
        np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=tolerance, err_msg=way)


def ramp(count: int) -> np.ndarray:
    """0 to count - 1, evenly spaced over the image: float [SIDE,SIDE]."""
    return np.linspace(0, count - 1, SIDE * SIDE).reshape(SIDE, SIDE)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG file of rows that each begin with the byte of their filter."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def with_filter(rows: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in rows)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bit_grey_is_scaled_to_8_bits(tmp_path: Path, name: str) -> None:
    values = ramp(65536).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert_same(tmp_path / name, np.round(values / 257))


def test_a_dark_16_bit_image_stays_dark(tmp_path: Path) -> None:
    values = ramp(256).astype(np.uint16)
    for name in ("x.png", "x.tif", "x.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        assert_same(tmp_path / name, np.round(values / 257))


def test_white_is_zero_and_12_bits(tmp_path: Path) -> None:
    values = ramp(65536).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert_same(tmp_path / "x.tif", np.round(255 - values / 257))
    values = ramp(4096).astype(np.uint16)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1)
    data = packed.astype(np.uint8).tobytes()
    tags = [(256, SIDE), (257, SIDE), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, SIDE), (279, len(data))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    (tmp_path / "y.tif").write_bytes(struct.pack("<4sI", b"II*\0", 8 + len(data)) + data + directory + bytes(4))
    assert_same(tmp_path / "y.tif", np.round(values * (255 / 4095)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (ramp(65536).astype(np.int32), np.round(ramp(65536).astype(int) / 257)),
        (ramp(256).astype(np.int32), ramp(256).astype(int)),
        (ramp(2**31).astype(np.int32), np.round(ramp(256))),
        (ramp(201).astype(np.int32) - 100, np.round(ramp(201).astype(int) * 255 / 200)),
        (np.full((SIDE, SIDE), -5, np.int32), np.zeros((SIDE, SIDE))),
        ((ramp(256) / 255).astype(np.float32), np.round(ramp(256))),
        (ramp(256).astype(np.float32), np.round(ramp(256))),
        (ramp(65536).astype(np.float32), np.round(ramp(65536) / 257)),
        ((ramp(3) - 1).astype(np.float32), np.round(ramp(256))),
    ],
)
def test_32_bit_grey_takes_the_smallest_usual_range_that_contains_its_values(
    tmp_path: Path, values: np.ndarray, expected: np.ndarray
) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert_same(tmp_path / "x.tif", expected, tolerance=1)  # ties of rounding


def test_infinite_values_and_nan_do_not_hide_the_others(tmp_path: Path) -> None:
    values = (ramp(256) / 255).astype(np.float32)
    expected = np.round(ramp(256))
    values[0, :3] = np.nan, np.inf, -np.inf
    expected[0, :3] = 0, 255, 0
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert_same(tmp_path / "x.tif", expected, tolerance=1)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours [h,w] or [h,w,3] composed on white with alpha [h,w] from 0 to 255."""
    share = (alpha / 255)[..., None]
    return np.round(colours.reshape(SIDE, SIDE, -1) * share + WHITE * (1 - share)).repeat(
        3 // (colours.ndim * 2 - 3), -1
    )


def test_transparent_pixels_appear_on_white(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    alpha = ramp(256).astype(np.uint8)
    expected = on_white(colours, alpha)
    rgba = Image.fromarray(np.dstack([colours, alpha]))
    kinds: dict[str, dict[str, Any]] = {"x.png": {}, "x.webp": {"lossless": True, "exact": True}, "x.tif": {}}
    for name, options in kinds.items():
        rgba.save(tmp_path / name, **options)
        assert_same(tmp_path / name, expected, tolerance=1)
    grey = colours[..., 0]
    Image.fromarray(np.dstack([grey, alpha])).save(tmp_path / "la.png")
    assert_same(tmp_path / "la.png", on_white(grey, alpha), tolerance=1)


def test_transparent_colours_appear_white(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 4, (SIDE, SIDE), dtype=np.uint8)
    palette = np.array([[0, 0, 0], [10, 20, 30], [200, 100, 50], [7, 7, 7]], np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette(palette.ravel().tolist())
    alphas = np.array([255, 0, 128, 255], np.uint8)
    picture.save(tmp_path / "several.png", transparency=alphas.tobytes())
    assert_same(tmp_path / "several.png", on_white(palette[index], alphas[index]), tolerance=1)
    white = palette.copy()
    white[2] = WHITE
    for name in ("one.png", "one.gif"):
        picture.save(tmp_path / name, transparency=2)
        assert_same(tmp_path / name, white[index])

    rgb = rng.integers(0, 2, (SIDE, SIDE, 3), dtype=np.uint8) * 100
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=(100, 0, 100))
    expected = rgb.copy()
    expected[(rgb == (100, 0, 100)).all(-1)] = WHITE
    assert_same(tmp_path / "rgb.png", expected)
    # The depth of the transparent colour is that of the file.
    for depth in (1, 2, 4, 8, 16):
        levels = rng.integers(0, 2**depth, (SIDE, SIDE))
        key = int(levels[0, 0])
        bits = (levels[..., None] >> np.arange(depth)[::-1] & 1).reshape(SIDE, -1).astype(np.uint8)
        data = png(SIDE, SIDE, depth, 0, with_filter(np.packbits(bits, axis=1)), chunk(b"tRNS", struct.pack(">H", key)))
        (tmp_path / "grey.png").write_bytes(data)
        assert_same(
            tmp_path / "grey.png",
            np.where(levels == key, WHITE, np.round(levels * (255 / (2**depth - 1)))),
            tolerance=0,
        )
    deep = (rng.integers(0, 2, (SIDE, SIDE, 3)) * 0x4567).astype(">u2")
    before = chunk(b"tRNS", struct.pack(">HHH", 0x4567, 0, 0))
    (tmp_path / "deep.png").write_bytes(png(SIDE, SIDE, 16, 2, with_filter(deep), before))
    transparent = (deep == (0x4567, 0, 0)).all(-1)[..., None]
    assert_same(tmp_path / "deep.png", np.where(transparent, WHITE, np.round(deep / 257)), tolerance=1)


def test_cmyk_and_other_colours(tmp_path: Path) -> None:
    steps = (np.arange(SIDE) // 8 * 60).astype(np.uint8)
    cyan, black = np.meshgrid(steps, steps)
    cmyk = np.dstack([cyan, np.full_like(cyan, 80), np.zeros_like(cyan), black])
    expected = (255 - cmyk[..., :3].astype(float)) * (255 - black.astype(float)[..., None]) / 255
    picture = Image.fromarray(cmyk, "CMYK")
    picture.save(tmp_path / "x.tif")
    assert_same(tmp_path / "x.tif", expected, tolerance=2)
    picture.save(tmp_path / "x.jpg", quality=100)
    assert_same(tmp_path / "x.jpg", expected, tolerance=6)
    picture.save(tmp_path / "progressive.jpg", quality=100, progressive=True)
    assert_same(tmp_path / "progressive.jpg", expected, tolerance=6)

    rgb = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    for name in ("x.png", "x.bmp", "x.ppm", "lzw.tif", "x.tif"):
        Image.fromarray(rgb).save(tmp_path / name, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {}))
        assert_same(tmp_path / name, rgb)
    bilevel = rgb[..., 0] > 127
    for name in ("1.png", "1.tif", "1.pbm"):
        Image.fromarray(bilevel).save(tmp_path / name)
        assert_same(tmp_path / name, bilevel * 255)
    Image.fromarray(rgb).save(tmp_path / "x.gif", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))])
    with Image.open(tmp_path / "x.gif") as first:
        expected = np.asarray(first.convert("RGB"))
    assert_same(tmp_path / "x.gif", expected)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_a_pil_image_of_any_mode(mode: str) -> None:
    picture = Image.new("L", (SIDE, SIDE), WHITE)
    picture.paste(0, (0, 0, SIDE // 2, SIDE))
    given = picture.convert("RGBA" if mode == "RGBa" else "LA" if mode == "La" else "RGB").convert(mode)
    np.testing.assert_array_equal(decode(given, SIDE), np.asarray(picture.convert("RGB")))


def scene() -> tuple[Image.Image, np.ndarray]:
    """An upright picture and its pixels. All its turns and flips differ."""
    upright = np.zeros((SIDE, SIDE, 3), np.uint8)
    upright[: SIDE // 2, SIDE // 2 :], upright[SIDE // 2 :, : SIDE // 2] = (0, 240, 0), (0, 0, 240)
    upright[SIDE // 2 :, SIDE // 2 :] = 240
    return Image.fromarray(upright), upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "TIFF LZW", "WEBP", AVIF])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_once(tmp_path: Path, orientation: int, kind: str, as_stored: AsStored) -> None:
    picture, upright = scene()
    picture = as_stored(picture, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, dict[str, Any]] = {
        "TIFF LZW": {"compression": "tiff_lzw"},
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 98, "subsampling": 0},
        "AVIF": {"quality": 98, "subsampling": "4:4:4"},
    }
    path = tmp_path / "x"
    picture.save(path, kind.split()[0], exif=exif, **options.get(kind, {}))
    tolerance = 9 if kind in ("JPEG", "AVIF") else 0
    assert_same(path, upright, tolerance=tolerance)
    copied = Captioner.pixels(CAPTIONER, ImageOps.exif_transpose(Image.open(path)))[0]
    np.testing.assert_allclose(copied.astype(int), upright.astype(int), atol=tolerance)


def test_the_orientation_of_xmp_data(tmp_path: Path, as_stored: AsStored) -> None:
    picture, upright = scene()
    picture = as_stored(picture, 6)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    picture.save(tmp_path / "x.jpg", quality=98, subsampling=0, xmp=xmp)
    assert_same(tmp_path / "x.jpg", upright, tolerance=9)


def test_images_that_any_reader_understands_are_stored_unchanged() -> None:
    picture = scene()[0]
    for kind in ("JPEG", "PNG"):
        for mode in ("RGB", "L"):
            file = io.BytesIO()
            picture.convert(mode).save(file, kind)
            assert storable(file.getvalue()) == file.getvalue()
    exif = Image.Exif()
    exif[0x010F] = "maker"
    file = io.BytesIO()
    picture.convert("CMYK").save(file, "JPEG", exif=exif)
    assert b"maker" not in storable(file.getvalue())


def test_other_formats_are_refused_and_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    (tmp_path / "gs").write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit 0\n')
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "dog.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n")
    with contextlib.suppress(Exception), Image.open(path) as picture:
        picture.load()
    assert log.exists()  # the trap works
    log.unlink()
    for way in ("path", "bytes", "prepared", "view"):
        with pytest.raises(ImageError, match=r"unknown image format, .*; JPEG, PNG, .* are read"):
            WAYS[way](path)
    with pytest.raises(ImageError, match="its format EPS is not read; JPEG, PNG"):
        WAYS["PIL image"](path)
    assert not log.exists()


def test_images_are_opened_in_one_module_only() -> None:
    package = Path(image_files.__file__).parent.parent
    opening = {path.name for path in package.rglob("*.py") if re.search(r"Image\.open\(", path.read_text())}
    # The loader of exported programs has nothing of the package, and opens the same formats.
    assert opening == {"image_files.py", "loader.py"}
    formats = {"JPEG", *image_files._FORMATS}
    assert formats <= set(loader.FORMATS)
    assert set(loader.FORMATS) <= {*formats, "WEBP", "AVIF"}


def jpeg(width: int = SIDE, height: int = SIDE, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, "JPEG", **options)
    return file.getvalue()


def claiming(image: bytes, width: int, height: int) -> bytes:
    """A JPEG file whose header claims another size."""
    place = 2
    while image[place + 1] not in (0xC0, 0xC2):
        place += 2 + int.from_bytes(image[place + 2 : place + 4], "big")
    return image[: place + 5] + struct.pack(">HH", height, width) + image[place + 9 :]


def with_scans(count: int, side: int) -> bytes:
    """A progressive JPEG file that repeats its last scan."""
    image = jpeg(side, side, progressive=True)
    last = image.rindex(b"\xff\xda")
    return image[:last] + image[last:-2] * (count - image.count(b"\xff\xda") + 1) + image[-2:]


def webp(width: int, height: int) -> bytes:
    body = b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14) + bytes(5)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def gif(screen: tuple[int, int] = (8, 8), frame: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "GIF")
    image = bytearray(file.getvalue())
    place = image.index(b",", 13)
    image[6:10], image[place + 5 : place + 9] = struct.pack("<HH", *screen), struct.pack("<HH", *frame)
    return bytes(image)


def tiff(*more: tuple[int, int, int, int]) -> bytes:
    tags = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1), *more]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)


BOMBS = {
    "progressive": (claiming(jpeg(progressive=True), 65500, 65500), "65500 x 65500 .* progressive JPEG"),
    "sequential": (claiming(jpeg(), 65500, 65500), "65500 x 65500 .* JPEG images of at most 1,000"),
    "scans": (with_scans(500, 2000), "more than 100 scans"),
    "webp": (webp(16383, 16383), "16383 x 16383 .* WEBP images of at most 50"),
    "tall": (png(1, 100_000_000, 8, 0, bytes(1000)), "a side may have at most 100000"),
    "wide": (png(100_000_000, 1, 8, 0, bytes(1000)), "a side may have at most 100000"),
    "square": (png(50_000, 50_000, 8, 6, bytes(1000)), "2,500 megapixels"),
    "screen": (gif(screen=(65535, 65535)), "65535 x 65535"),
    "frame": (gif(frame=(65535, 65535)), "65535 x 65535"),
    "profile": (png(4, 4, 8, 0, bytes(20), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))), "decoded"),
    "texts": (png(4, 4, 8, 0, bytes(20), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))) * 99), "decoded"),
    "tile": (tiff((322, 4, 1, 65520), (323, 4, 1, 65520), (324, 4, 1, 8), (325, 4, 1, 100)) + bytes(200), "decoded"),
    "tags": (tiff(*((1000 + i, 1, 60000, 8) for i in range(20000))), "decoded|unknown"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_small_file_that_needs_much_work_is_refused(tmp_path: Path, name: str) -> None:
    data, reason = BOMBS[name]
    (tmp_path / "x.jpg").write_bytes(data)
    for way in ("path", "prepared", "view"):
        with pytest.raises(ImageError, match=reason) as raised:
            WAYS[way](tmp_path / "x.jpg")
        assert "\n" not in str(raised.value)


def test_refusing_needs_little_memory_and_time(tmp_path: Path) -> None:
    for name, (data, _) in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    program = """
import pathlib, resource, sys, time
from imgcap_jax.data import image_files, images
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for path in pathlib.Path(sys.argv[1]).iterdir():
    for read in (lambda data: images.decode(data, 224), image_files.storable):
        try:
            read(path.read_bytes())
            print(path.name, "was read")
        except image_files.ImageError:
            pass
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
print(f"{used:.0f} {time.process_time() - began:.2f}")
"""
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr
    megabytes, seconds = map(float, done.stdout.split(maxsplit=1))
    assert megabytes < 300  # the text chunks may have 64 MB
    assert seconds < 10


def test_images_at_the_limits_are_read() -> None:
    decode(with_scans(100, 64), SIDE)
    # Bytes that look like the start of a scan, in metadata and after the end of the image (as in motion photos).
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200
    image = jpeg(64, 64, progressive=True)
    decode(image[:2] + comment + image[2:] + b"\xff\xda" * 200, SIDE)
    assert decode(png(1, 3000, 8, 0, bytes(6000)), SIDE).shape == (SIDE, SIDE, 3)


def test_the_limit_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded(side: int, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (side, side)).save(file, kind, **options)
        return file.getvalue()

    monkeypatch.setattr(image_files, "MAX_MEGAPIXELS", 0.01)  # 100 x 100
    for side, kind, options in (
        (100, "PNG", {}),
        (70, "WEBP", {}),
        (310, "JPEG", {}),
        (100, "JPEG", {"progressive": 1}),
    ):
        decode(encoded(side, kind, **options), SIDE)
        storable(encoded(side, kind, **options))
        for read in (lambda data: decode(data, SIDE), storable):
            with pytest.raises(ImageError, match=r"pixels .* are read \(--max-megapixels raises the limit\)"):
                read(encoded(side + 10, kind, **options))
    with pytest.raises(ImageError, match="110 x 110"):
        decode(Image.new("RGB", (110, 110)), SIDE)
    monkeypatch.setattr(image_files, "MAX_MEGAPIXELS", 100.0)
    with pytest.raises(ImageError, match="4 megapixels are read; convert it"):
        decode(b"P5 2001 2001 254\n" + bytes(2001**2), SIDE)


def test_an_image_above_the_standard_limit_has_the_same_pixels_in_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_LARGEST", 2000)
    pixels = np.random.default_rng(0).integers(0, 256, (128, 96, 3), dtype=np.uint8)
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        kept = storable(file.getvalue())
        with Image.open(io.BytesIO(kept)) as picture:
            assert picture.size == (32, 43)  # a third: at most 2000 pixels
        np.testing.assert_array_equal(decode(kept, 24), decode(file.getvalue(), 24))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_only_a_raised_limit_admits_is_stored_reduced(
    progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training has the standard limit, so it could not read the original."""
    pixels = np.full((128, 160 if progressive else 1600, 3), 77, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", progressive=progressive)
    monkeypatch.setattr(image_files, "_LARGEST", 20_000)  # the standard limit
    monkeypatch.setattr(image_files, "MAX_MEGAPIXELS", 0.1)
    kept = storable(file.getvalue())
    monkeypatch.setattr(image_files, "MAX_MEGAPIXELS", 0.02)
    with pytest.raises(ImageError, match="raises the limit"):
        decode(file.getvalue(), SIDE)
    np.testing.assert_allclose(decode(kept, SIDE), 77, atol=2)


def test_a_large_jpeg_is_decoded_at_a_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.meshgrid(np.linspace(0, 255, 640), np.linspace(0, 255, 320))
    pixels = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    sizes: list[tuple[int, ...]] = []
    scaled = image_files._scaled_jpeg

    def watched(*given: Any) -> np.ndarray:
        pixels = scaled(*given)
        sizes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(image_files, "_scaled_jpeg", watched)
    monkeypatch.setattr(image_files, "MAX_MEGAPIXELS", 0.03)
    monkeypatch.setattr(image_files, "_LARGEST", 30_000)
    found = decode(file.getvalue(), 300)
    assert sizes == [(80, 160, 3)]
    np.testing.assert_allclose(found.astype(int), decode(pixels, 300).astype(int), atol=9)


def test_the_limit_of_pil_does_not_matter_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("PNG", "GIF", "WEBP", "JPEG"):
            file = io.BytesIO()
            Image.new("CMYK" if kind == "JPEG" else "RGB", (SIDE, SIDE)).save(file, kind)
            decode(file.getvalue(), SIDE)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_missing_memory_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(image_files, "_rgb", full)
    with pytest.raises(ImageError, match="not enough memory"):
        decode(png(4, 4, 8, 0, bytes(20)), SIDE)


def test_only_files_of_sensible_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="a device or a pipe"):
        read_file(tmp_path / "pipe.jpg")  # opening it would wait for ever
    with pytest.raises(ImageError, match="a device or a pipe"):
        read_file(Path("/dev/zero"))
    with pytest.raises(ImageError, match="is a folder"):
        read_file(tmp_path)
    with (tmp_path / "large.bmp").open("wb") as file:
        file.truncate(900_000_000)  # a hole, which needs no space
    with pytest.raises(ImageError, match="the file has 900 MB; files of at most 800 MB are read"):
        read_file(tmp_path / "large.bmp")


def test_an_opened_pil_image_is_checked_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(with_scans(500, 2000))
    with Image.open(tmp_path / "x.jpg") as picture, pytest.raises(ImageError, match="more than 100 scans"):
        decode(picture, SIDE)


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_LARGE", 10)
    running, most = 0, 0
    load = Image.Image.load

    def watched(picture: Image.Image) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return load(picture)

    data = png(4, 4, 8, 0, bytes(20))
    monkeypatch.setattr(Image.Image, "load", watched)
    with ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(image_files, "_upright", lambda picture: picture)
        list(pool.map(lambda _: image_files.open_image(data), range(4)))
    assert most == 1
