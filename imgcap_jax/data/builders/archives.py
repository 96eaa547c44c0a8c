"""Files in folders and in zip archives, which are read without extracting them."""

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from imgcap_jax.data.builders.listed import WrongRows
from imgcap_jax.errors import UserError
from imgcap_jax.files import reading, reason, refuse_pipes

_TARS = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_LARGEST_TEXTS = 2 * 10**9  # bytes of annotation files that are extracted; those of COCO have 1 GB
_READ_AHEAD = 64

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ZipMember:
    """A file in a zip archive.

    Attributes:
        archive: the path of the archive.
        name: the path in the archive.
        size: the size in bytes.
        opened: the archive; several threads may read it.
    """

    archive: Path
    name: str
    size: int
    opened: zipfile.ZipFile = field(repr=False, compare=False)

    def read_bytes(self) -> bytes:
        """The contents of the file, whose checksum is compared.

        Raises:
            OSError: the archive cannot be read.
            ValueError: the file is damaged, encrypted or compressed by an unknown method.
        """
        try:
            return self.opened.read(self.name)
        except (OSError, ValueError):
            raise
        except Exception as error:  # zipfile raises BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError
            raise ValueError(f"damaged in the archive ({reason(error)})") from error

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


def is_zip(path: Path) -> bool:
    """Whether a path is a zip archive.

    Raises:
        UserError: it does not exist, is an archive of another kind, or is damaged.
    """
    if path.is_dir():
        return False
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.name.endswith(_TARS):
        raise UserError(f"{path} is an archive that is not read; extract it and pass the folder")
    with reading(path, "check the path"):
        refuse_pipes(path)
        found = zipfile.is_zipfile(path)
    if path.suffix == ".zip" and not found:
        raise UserError(f"{path} is not a zip archive, or the end of it is missing; download it again")
    return found


def members(archive: Path) -> list[ZipMember]:
    """The files in a zip archive, except those that macOS adds.

    Raises:
        UserError: the archive is damaged.
    """
    with reading(archive, "download it again"):
        opened = zipfile.ZipFile(archive)
        return [
            ZipMember(archive, info.filename, info.file_size, opened)
            for info in opened.infolist()
            if not info.is_dir() and not info.filename.startswith("__MACOSX/")
        ]


def files_by_name(places: Sequence[Path]) -> dict[str, list[Path | ZipMember]]:
    """All files in folders, including the folders below, and in zip archives, by their names without folders.

    Raises:
        UserError: a path does not exist, or is neither a folder nor a zip archive.
    """
    found: dict[str, list[Path | ZipMember]] = {}
    for place in places:
        if place.is_dir():
            for parent, _, names in os.walk(place):
                for name in names:
                    found.setdefault(name, []).append(Path(parent, name))
        elif is_zip(place):
            for member in members(place):
                found.setdefault(PurePosixPath(member.name).name, []).append(member)
        else:
            raise UserError(f"{place} is neither a folder nor a zip archive")
    return found


@contextlib.contextmanager
def texts(path: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Yields a path as it is, and of a zip archive a temporary folder with some of its files.

    Error messages name the archive instead of the temporary folder.

    Args:
        path: a file, a folder or a zip archive.
        wanted: whether a file of the archive is extracted, by its name without folders. It is extracted without them.

    Raises:
        UserError: the archive is damaged, or has none of the files.
    """
    if not is_zip(path):
        yield path
        return
    chosen = [member for member in members(path) if wanted(PurePosixPath(member.name).name)]
    if not chosen:
        raise UserError(f"{path} contains no file of the expected names")
    if sum(member.size for member in chosen) > _LARGEST_TEXTS:
        raise UserError(f"{path}: its files are too large ({_LARGEST_TEXTS / 1e9:.0f} GB); extract it and pass a file")
    with tempfile.TemporaryDirectory(prefix="imgcap_") as folder:
        try:
            for member in chosen:
                with (
                    reading(path, "download it again"),
                    member.opened.open(member.name) as source,
                    Path(folder, PurePosixPath(member.name).name).open("wb") as target,
                ):
                    shutil.copyfileobj(source, target)
            yield Path(folder)
        except UserError as error:
            error.args = (str(error).replace(folder, str(path)),)
            if isinstance(error, WrongRows):
                error.rows = tuple(row.replace(folder, str(path)) for row in error.rows)
            raise


def read_ahead(read: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Future[Result]]]:
    """Calls a function for all items in threads, and yields each item with its finished or pending result."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), _READ_AHEAD):
            chunk = items[start : start + _READ_AHEAD]
            yield from zip(chunk, [pool.submit(read, item) for item in chunk], strict=True)


def check_space(*needs: tuple[Path, int, str]) -> None:
    """Raises a UserError unless the disks have enough free space.

    Args:
        needs: folders, the bytes that will be written to them, and the options that choose other folders. Folders on
            the same disk share its space.
    """
    of_disk: dict[int, list[tuple[Path, int, str]]] = {}
    for folder, size, option in needs:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        of_disk.setdefault(there.stat().st_dev, []).append((there, size, option))
    for of_one in of_disk.values():
        needed, free = sum(size for _, size, _ in of_one), shutil.disk_usage(of_one[0][0]).free
        if needed > free:
            options = " or ".join(option for _, size, option in of_one if size)
            raise UserError(
                f"{of_one[0][0]}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; use another {options}"
            )
