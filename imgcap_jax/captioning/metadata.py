"""The caption of a photo as its alternative text, in the photo's own metadata.

It is written where the IPTC Photo Metadata Standard has the alternative text (``Iptc4xmpCore:AltTextAccessibility`` in
XMP), and into ``ImageDescription`` in EXIF, which older programs show. Exiv2 changes these two only: the encoded
picture and all other metadata stay as they are.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imgcap_jax.captioner import Caption
from imgcap_jax.errors import UserError, printable
from imgcap_jax.files import replacing

_DESCRIPTION = "Exif.Image.ImageDescription"
_ALTERNATIVE = "Xmp.iptc.AltTextAccessibility"
# What cameras write instead of a description.
_OF_CAMERAS = ("OLYMPUS DIGITAL CAMERA", "SONY DSC", "DIGITAL CAMERA", "DCIM", "default", "MINOLTA DIGITAL CAMERA")


class Metadata:
    """Writes the best caption into JPEG, PNG, WebP and TIFF files."""

    missing = "nothing is written into it"

    def __init__(self, *, overwrite: bool) -> None:
        """Args:

        overwrite: whether a description that is already there is replaced.

        Raises:
            UserError: the library is not installed.
        """
        try:
            import pyexiv2
        except ImportError as error:
            raise UserError("--write-exif needs pyexiv2; run: pip install pyexiv2") from error
        pyexiv2.set_log_level(4)  # errors are raised
        self._library: Any = pyexiv2
        self._overwrite = overwrite

    def add(self, path: Path, captions: Sequence[Caption]) -> Iterator[str]:
        """See ``Output``. The file is replaced at once, and keeps its times and its permissions."""
        path = path.resolve()  # a link stays a link
        status = path.stat()
        with replacing(path) as temporary:
            shutil.copyfile(path, temporary)
            self._write(temporary, captions[0].text)
            shutil.copystat(path, temporary)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        return iter(())

    def _write(self, path: Path, text: str) -> None:
        try:
            image = self._library.Image(os.fspath(path))
        except UnicodeEncodeError as error:
            raise UserError("its path is not UTF-8; rename it") from error
        except RuntimeError as error:
            raise UserError(f"its metadata can't be read ({error})") from error
        try:
            # Old programs wrote other encodings than UTF-8; in Latin-1, all bytes are characters.
            exif, xmp = image.read_exif(encoding="latin-1"), image.read_xmp(encoding="latin-1")
            there = [exif.get(_DESCRIPTION, "").strip(), *_texts(xmp.get(_ALTERNATIVE))]
            for found in there:
                if found and found not in _OF_CAMERAS and not self._overwrite:
                    raise UserError(f"it has the description {printable(found)!r:.60} (--overwrite replaces it)")
            image.modify_exif({_DESCRIPTION: text})
            image.modify_xmp({_ALTERNATIVE: {'lang="x-default"': text}})
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{error}") from error
        finally:
            image.close()

    def close(self) -> None:
        """See ``Output``."""


def _texts(value: Any) -> list[str]:
    """The texts of an XMP value, which has one per language."""
    texts = value.values() if isinstance(value, dict) else [] if value is None else [value]
    return [str(text).strip() for text in texts]
