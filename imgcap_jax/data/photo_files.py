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


def photo_files(paths: Sequence[Path], *, recursive: bool = False) -> list[Path]:
    """The files that are given, which can be missing, and the image files in the folders, each sorted by name.

    Args:
        paths: files and folders. A file that is found twice is returned once.
        recursive: whether subfolders are searched, except hidden ones and links.

    Raises:
        UserError: there are none, or all are missing.
    """
    files = list(dict.fromkeys(file for path in paths for file in _files(path, recursive)))
    if not files:
        raise UserError(
            f"no images in {', '.join(map(str, paths))}; give image files, or folders of them"
            + ("" if recursive else " (--recursive searches subfolders)")
        )
    if not any(file.exists() or file.is_symlink() for file in files):
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise UserError(f"{', '.join(map(str, files[:3]))}{more}: no such file or folder; check the path")
    return files


def _files(path: Path, recursive: bool) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    inside = sorted(path.iterdir())
    yield from (file for file in inside if file.suffix.lower() in _SUFFIXES and not file.is_dir())
    for folder in inside if recursive else ():
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith("."):
            yield from _files(folder, recursive)
