"""Finds the photos that a user names."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from imgcap_jax.errors import UserError
from imgcap_jax.files import local_path

# The files of a folder that are taken for photos. The last four formats are not read, which is reported by name.
_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}
    | {".pbm", ".pgm", ".ppm", ".pnm", ".heic", ".heif", ".jp2", ".jxl"}
)


def photo_path(text: str) -> Path:
    """The path of a photo, or of a folder of photos. Raises UserError for a URL."""
    return local_path(text, "download the photo first")


def photo_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are given, which can be missing, and the image files in the folders, each sorted by name.

    Raises:
        UserError: there are none, or all are missing.
    """
    files = [file for path in paths for file in _files(path)]
    if not files:
        raise UserError(f"no images in {', '.join(map(str, paths))}; give image files, or folders of them")
    if not any(file.exists() or file.is_symlink() for file in files):
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise UserError(f"{', '.join(map(str, files[:3]))}{more}: no such file or folder; check the path")
    return files


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    yield from sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and not file.is_dir())
