"""Opens images: which formats are read, up to which size, which way up and in which colours.

Every image of the package passes through `open_image`: photos to caption, images of datasets, pictures in reports. The
same image therefore has the same pixels everywhere.

Colours are those of sRGB without colour management. Transparent pixels appear on white. Grey images with more than
8 bits are scaled to 8 bits, see `_grey`. The orientation in EXIF or XMP data, or in a TIFF tag, is applied once. Of
animations and multi-page files, only the first picture is read.
"""

import contextlib
import io
import math
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

# Importing a plugin registers its format. Without these imports, PIL imports all plugins at the first image.
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.JpegImagePlugin import JpegImageFile

from imgcap_jax.files import reason

Pixels = npt.NDArray[np.uint8]
AnyImage = bytes | Pixels | Image.Image
"""An encoded image, RGB pixels uint8 [h,w,3], or a PIL image of any mode."""

MAX_MEGAPIXELS = 100.0
"""The largest image that is decoded, in millions of pixels. `imgcap` sets it with `--max-megapixels`; programs assign
to it: `image_files.MAX_MEGAPIXELS = 250`.

At 100 megapixels, decoding needs at most about 1 GB and 10 seconds. WebP and AVIF images may have half as many pixels,
because their decoders need twice the memory. JPEG files may have ten times as many, because they are decoded at a
reduced scale, unless they have several scans (progressive JPEG), which the decoder keeps in memory."""

# All formats that are read. PIL's readers of other formats are never called: some start other programs (EPS starts
# Ghostscript), and few of them are tested as well. JPEG is not in the list, because its reader is called directly.
_OPTIONAL = {"WEBP": WebPImagePlugin.SUPPORTED, "AVIF": AvifImagePlugin.SUPPORTED}  # by this installation of PIL
_FORMATS = ("PNG", "GIF", "BMP", "TIFF", "PPM", *(name for name, supported in _OPTIONAL.items() if supported))
READS = ", ".join(("JPEG", *_FORMATS))

# A picture above this number of pixels, which only a raised limit admits, is reduced by an integer factor. Datasets
# store the reduced picture, so that training needs no setting.
_LARGEST = 100_000_000
# PIL needs memory for each row, in addition to that for pixels.
_LONGEST_SIDE = 100_000
# "It is hard to imagine any real-world application needing more than 100" scans: CVE on progressive JPEG files with
# thousands of scans of few bytes, Red Hat bug 1344214. Encoders write up to 11.
_MAX_SCANS = 100
# Scans x pixels, relative to the limit on pixels. libjpeg-turbo needs 0.7 s per 10^9 (measured on empty scans).
_MAX_SCANNED = 50
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)  # start-of-frame markers: baseline, extended, arithmetic
_TWICE_THE_MEMORY = ("WEBP", "AVIF")
# PIL decodes these variants of PPM in Python: 0.5 s per million samples.
_SLOW, _MAX_SLOW = ("ppm", "ppm_plain"), 4_000_000
# Images with more pixels are decoded one at a time, so that the threads together do not exhaust the memory.
_LARGE = 32_000_000
_BAND = 1_000_000  # pixels that are converted at once, to save memory
_RAISE = "are read (--max-megapixels raises the limit)"
_HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

_turn = threading.RLock()


class ImageError(ValueError):
    """An image cannot be decoded. The message is the reason; callers add the file name."""


class OpenedImage(NamedTuple):
    """The size of an upright image in pixels, and a function that decodes it to RGB.

    The function takes the smallest width and height that the result may have. An image that is smaller is decoded at
    its full size.
    """

    width: int
    height: int
    load: Callable[[int, int], Image.Image]


def open_image(image: AnyImage) -> OpenedImage:
    """Reads the header of an image and checks its size.

    Raises:
        ImageError: the format is not read, the image is damaged or too large, or pixels are not uint8 [h,w,3]. The
            returned function raises it too.
    """
    if isinstance(image, np.ndarray):
        return _decoded(_from_pixels(image))
    if isinstance(image, Image.Image):
        return _decoded(_from_picture(image))
    if not image:
        raise ImageError("the file is empty")
    return _open_jpeg(image) if image.startswith(_JPEG) else _decoded(_upright(_read(image)))


def read_file(path: Path) -> bytes:
    """Reads an image file.

    Raises:
        ImageError: it is a device or a pipe, or larger than an image of the permitted size can be.
        OSError: it cannot be read.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is a device or a pipe, not a file")
    check_file_size(status.st_size)
    return path.read_bytes()


def check_file_size(size: int) -> None:
    """Raises an ImageError if a file of `size` bytes is larger than an image of the permitted size can be."""
    most = 8 * _limit()  # bytes: four channels of 16 bits
    if size > most:
        raise ImageError(f"the file has {size / 1e6:,.0f} MB; files of at most {most / 1e6:,.0f} MB {_RAISE}")


def storable(image: bytes) -> bytes:
    """Decodes an image completely and returns the file that a dataset stores.

    Every image reader gives the stored file the same pixels. JPEG and PNG files for which this is already true are
    returned unchanged. All other images become a PNG of the upright RGB image: other formats, CMYK, transparency,
    16 bits, a PNG with an orientation, and images above the default limit on size.

    Raises:
        ImageError: see `open_image`.
    """
    if not image:
        raise ImageError("the file is empty")
    if image.startswith(_JPEG):
        fast = _jpeg_header(image)
        if fast is not None:
            with _explained():
                try:
                    _check_jpeg(image, *fast, _LARGEST)  # as training does, which has no raised limit
                    _scaled_jpeg(image, *fast, 8)  # the smallest scale; it reads all data
                    return image
                except ValueError:
                    pass
        picture = _whole_jpeg(image)
    else:
        source = _read(image)
        plain = source.mode in ("RGB", "L", "P", "1") and not source.has_transparency_data
        picture = _upright(source)
        if image.startswith(_PNG) and plain and picture.size == source.size and _orientation(source) == 1:
            return image
    buffer = io.BytesIO()
    # Level 2 is six times as fast as the default, 6, for files that are 9 % larger (measured on a photo).
    picture.save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


def _limit() -> float:
    return MAX_MEGAPIXELS * 1e6


def _check_size(width: int, height: int, limit: float, kind: str = "images", hint: str = _RAISE) -> None:
    if max(width, height) > _LONGEST_SIDE:
        raise ImageError(f"the image has {width} x {height} pixels; a side may have at most {_LONGEST_SIDE} pixels")
    if width * height > limit:
        raise ImageError(
            f"the image has {width} x {height} pixels ({width * height / 1e6:,.0f} megapixels); "
            f"{kind} of at most {limit / 1e6:,g} megapixels {hint}"
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns every error of a decoder into an ImageError. Damaged files make them raise almost any type."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("there is not enough memory to decode it") from error
    except Exception as error:
        raise ImageError(f"cannot be decoded ({reason(error)})") from error


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Waits for other threads, and turns off PIL's own limit on pixels, which `_check_size` replaces."""
    with _turn:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decoded(picture: Image.Image) -> OpenedImage:
    return OpenedImage(picture.width, picture.height, lambda width, height: picture)


def _from_pixels(pixels: Pixels) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ImageError(f"pixels are {pixels.dtype} {list(pixels.shape)}; they must be uint8 RGB [h, w, 3]")
    return Image.fromarray(pixels)


def _from_picture(picture: Image.Image) -> Image.Image:
    if isinstance(picture, ImageFile.ImageFile) and picture.tile:  # opened, but not decoded
        if picture.format in ("JPEG", "MPO"):
            with _explained():
                _check_jpeg(_file_of(picture), *picture.size)
        elif picture.format not in _FORMATS:
            raise ImageError(f"its format {picture.format} is not read; {READS} are")
    return _upright(_load(picture))


def _file_of(picture: ImageFile.ImageFile) -> bytes:
    if picture.fp is None:
        return b""
    place = picture.fp.tell()
    picture.fp.seek(0)
    data = picture.fp.read()
    picture.fp.seek(place)
    return data


def _read(image: bytes) -> Image.Image:
    """Decodes a file other than JPEG: the picture as PIL gives it."""
    with _explained():
        try:
            with _one_at_a_time():
                picture = Image.open(io.BytesIO(image), formats=_FORMATS)
        except Image.UnidentifiedImageError as error:
            if image[4:12] in _HEIC:
                raise ImageError(f"a HEIC image; convert it to JPEG ({READS} are read)") from error
            raise ImageError(f"unknown image format, or the start of the file is damaged; {READS} are read") from error
        return _load(picture)


def _load(picture: Image.Image) -> Image.Image:
    halved = picture.format in _TWICE_THE_MEMORY
    _check_size(*picture.size, _limit() / (2 if halved else 1), f"{picture.format} images" if halved else "images")
    tile = (getattr(picture, "tile", None) or [None])[0]
    if tile and tile.codec_name in _SLOW:
        kind = "PPM images that are text, or have a maximum other than 255 and 65535,"
        _check_size(*picture.size, _MAX_SLOW, kind, "are read; convert it to PNG")
    with _explained():
        with _one_at_a_time() if picture.width * picture.height > _LARGE else contextlib.nullcontext():
            picture.load()
        # PIL gives the transparent colour of a PNG in the depth of the file, and the pixels in 8 bits.
        key, stored = picture.info.get("transparency"), tile.args if tile and picture.format == "PNG" else None
        if stored in ("L;2", "L;4") and isinstance(key, int):
            picture.info["transparency"] = key * (85 if stored == "L;2" else 17)
        if stored == "RGB;16B" and isinstance(key, tuple):
            picture.info["transparency"] = tuple(value >> 8 for value in key)
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    """The upright RGB picture. Decoding has already turned a TIFF image."""
    with _explained():
        upright = _turned(_rgb(picture), _orientation(picture))
        factor = math.ceil(math.sqrt(upright.width * upright.height / _LARGEST))
        return upright.reduce(factor) if factor > 1 else upright


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # An image with damaged EXIF data is still usable.
        return 1


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode[0] in "IF":
        return _grey(picture).convert("RGB")
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")  # converting RGB copies it
    result = Image.new("RGB", picture.size)
    for top, band in _bands(picture):
        # PIL has no direct conversion of La, grey with premultiplied alpha.
        layer = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), layer).convert("RGB"), (0, top))
    return result


def _grey(picture: Image.Image) -> Image.Image:
    """Scales an image of mode I;16, I or F to 8 bits.

    16-bit values are divided by 257 and rounded. 32-bit integers and floats have no standard range. The range used is
    the smallest of 0 to 1 (floats only), 0 to 255 and 0 to 65535 that contains all values. If none does, the range is
    from the smallest to the largest value. NaN becomes black.
    """
    tags = getattr(picture, "tag_v2", {})
    lowest, highest = 0.0, 65535.0
    if picture.mode.startswith("I;16"):
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        highest = float(2 ** (bits if 8 < bits < 16 else 16) - 1)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
            lowest, highest = highest, lowest
    elif picture.format != "PPM":  # which PIL scales to 65535
        lowest, highest = _range(picture)
    key = picture.info.get("transparency")
    result = Image.new("L", picture.size)
    for top, band in _bands(picture):
        values: npt.NDArray[np.float64] = np.asarray(band).astype(np.float64)
        scaled = np.nan_to_num((values - lowest) * (255 / (highest - lowest))).clip(0, 255)
        if isinstance(key, int):
            scaled[values == key] = 255
        result.paste(Image.fromarray((scaled + 0.5).astype(np.uint8)), (0, top))
    return result


def _range(picture: Image.Image) -> tuple[float, float]:
    lowest, highest = math.inf, -math.inf
    for _, band in _bands(picture):
        values: npt.NDArray[np.float64] = np.asarray(band).astype(np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
    if lowest > highest:
        return 0.0, 1.0  # not a single finite value
    if lowest >= 0:
        for top in (1.0, 255.0, 65535.0)[picture.mode == "I" :]:
            if highest <= top:
                return 0.0, top
    return lowest, max(highest, math.nextafter(lowest, math.inf))


def _bands(picture: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Parts of an image, from top to bottom, each with the number of its first row."""
    rows = max(1, _BAND // picture.width)
    for top in range(0, picture.height, rows):
        yield top, picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def _open_jpeg(image: bytes) -> OpenedImage:
    header = _jpeg_header(image)
    if header is None:
        return _decoded(_whole_jpeg(image))
    width, height = header
    orientation = _jpeg_orientation(image)

    def load(min_width: int, min_height: int) -> Image.Image:
        if orientation in _SIDEWAYS:
            min_width, min_height = min_height, min_width
        # Powers of two only: libjpeg-turbo's other scales (3/8, 5/8) are hardly any faster and blur visibly.
        scale = 1
        while scale < 8 and (
            (width >= 2 * scale * min_width and height >= 2 * scale * min_height)
            or width * height > _LARGEST * scale * scale
        ):
            scale *= 2
        with _explained():
            try:
                picture = Image.fromarray(_scaled_jpeg(image, width, height, scale))
            except ValueError:
                # libjpeg-turbo also rejects damage that PIL tolerates (a stray byte before a marker). PIL rejects the
                # rest.
                return _whole_jpeg(image)
            return _turned(picture, orientation)

    if orientation in _SIDEWAYS:
        return OpenedImage(height, width, load)
    return OpenedImage(width, height, load)


def _jpeg_header(image: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG file that libjpeg-turbo converts to RGB; None: PIL must decode it (CMYK)."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    _check_jpeg(image, width, height)
    return (width, height) if colours in ("YCbCr", "RGB", "Gray") else None


def _scaled_jpeg(image: bytes, width: int, height: int, scale: int) -> Pixels:
    """Decodes a JPEG file at 1/scale. Raises ValueError if it has the slightest damage."""
    size = {"min_width": -(-width // scale), "min_height": -(-height // scale)}
    with _turn if width * height > _LARGE and not _has_single_scan(image) else contextlib.nullcontext():
        return simplejpeg.decode_jpeg(image, **size)


def _whole_jpeg(image: bytes) -> Image.Image:
    """Decodes a JPEG file with PIL, at full size unless it is large."""
    with _explained():
        picture = JpegImageFile(io.BytesIO(image))
        width, height = picture.size
        _check_jpeg(image, width, height)
        # The decoder keeps a progressive image in memory, in addition to the picture.
        most = _LARGEST if _has_single_scan(image) else _LARGEST / 2
        scale = 1
        while width * height > most * scale * scale:
            scale *= 2
        if scale > 1:
            picture.draft(picture.mode, (width // scale, height // scale))
        with _turn if width * height > _LARGE else contextlib.nullcontext():
            picture.load()
        return _turned(_rgb(picture), _orientation(picture))


def _check_jpeg(image: bytes, width: int, height: int, limit: float | None = None) -> None:
    limit, pixels = _limit() if limit is None else limit, width * height
    if _has_single_scan(image):
        return _check_size(width, height, 10 * limit, "JPEG images")
    _check_size(width, height, limit, "progressive JPEG images")
    most = min(_MAX_SCANS, int(_MAX_SCANNED * limit / pixels))
    # Counting marker bytes is quick, and they cannot be fewer than the scans. Metadata can contain some, too.
    if image.count(b"\xff\xda") > most and sum(marker == 0xDA for marker, _ in _segments(image)) > most:
        raise ImageError(f"the JPEG file has more than {most} scans, which would take long to decode")


def _has_single_scan(image: bytes) -> bool:
    """Whether a JPEG file is decoded row by row. Otherwise the decoder keeps all coefficients in memory."""
    components = 0
    for marker, place in _segments(image):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            if marker not in _SEQUENTIAL:
                return False
            components = image[place + 9] if place + 9 < len(image) else 0
        elif marker == 0xDA:
            return image[place + 4 : place + 5] == bytes([components])
    return False


def _segments(image: bytes) -> Iterator[tuple[int, int]]:
    """The markers of the segments of a JPEG file up to the end of the image, and their places in the file."""
    place = 2
    while 0 <= place < len(image) - 3:
        marker = image[place + 1]
        if image[place] != 0xFF or marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            place = image.find(b"\xff", place + 1)  # data of a scan
        elif marker == 0xFF:  # padding
            place += 1
        elif marker == 0xD9:
            return
        else:
            yield marker, place
            place += 2 + int.from_bytes(image[place + 2 : place + 4], "big")


def _jpeg_orientation(image: bytes) -> int:
    # Searching the bytes takes microseconds; letting PIL parse every header takes ten times as long.
    header = image.find(b"\xff\xda")
    if image.find(b"Exif\0\0", 0, header) < 0 and image.find(b"tiff:Orientation", 0, header) < 0:
        return 1
    try:
        return _orientation(JpegImageFile(io.BytesIO(image)))
    except Exception:  # simplejpeg may still decode what PIL rejects.
        return 1
