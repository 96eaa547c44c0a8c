"""Files in folders and in zip archives.

Photos and COCO's annotations are read from archives without extracting them. The annotation files of Flickr8k and
Flickr30k, which have several formats and names, are extracted to a temporary folder.
"""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from imgcap_jax.data.builders.listed import WrongRows
from imgcap_jax.errors import UserError
from imgcap_jax.files import check_creatable, explaining, reading, reason, refuse_pipes

_TARS = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_LARGEST_TEXTS = 2 * 10**9  # bytes of annotation files; the files of COCO that are read have about 0.6 GB
_DAMAGED = "download it again"
_CHUNK = 1 << 20
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
        checksum: the CRC-32 that the archive lists.
        opened: the archive; several threads may read it. It is closed when its last member is deleted.
    """

    archive: Path
    name: str
    size: int
    checksum: int
    opened: zipfile.ZipFile = field(repr=False, compare=False)

    @property
    def path(self) -> PurePosixPath:
        return PurePosixPath(self.name)

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
        raise UserError(f"{path} does not exist; check the path")
    if path.name.endswith(_TARS):
        raise UserError(f"{path} is an archive that is not read; extract it and pass the folder")
    with reading(path, "check the path"):
        refuse_pipes(path)
        found = zipfile.is_zipfile(path)
    if path.suffix == ".zip" and not found:
        raise UserError(f"{path} is not a zip archive, or the end of it is missing; {_DAMAGED}")
    return found


def members(archive: Path) -> list[ZipMember]:
    """The files in a zip archive, except those that macOS adds.

    Raises:
        UserError: the archive is damaged.
    """
    with reading(archive, _DAMAGED):
        opened = zipfile.ZipFile(archive)
        return [
            ZipMember(archive, info.filename, info.file_size, info.CRC, opened)
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
                found.setdefault(member.path.name, []).append(member)
        else:
            raise UserError(f"{place} is neither a folder nor a zip archive; pass one of them")
    return found


def without_copies(files: Iterable[Path | ZipMember]) -> list[Path | ZipMember]:
    """The files without those that are another one: the same path, or a member of equal size and checksum."""
    kept: dict[object, Path | ZipMember] = {}
    for file in files:
        same = (file.size, file.checksum) if isinstance(file, ZipMember) else file.resolve()
        kept.setdefault(same, file)
    return list(kept.values())


def read_photo(file: Path | ZipMember) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: it is a device or a pipe, is damaged in the archive, or is larger than an image of the permitted
            size can be.
        OSError: it cannot be read.
    """
    from imgcap_jax.data.image_files import ImageError, check_file_size, read_file  # imports the readers of all formats

    if isinstance(file, Path):
        return read_file(file)
    check_file_size(file.size)
    try:
        return file.read_bytes()
    except ValueError as error:
        raise ImageError(str(error)) from error


def read_annotation(file: Path | ZipMember, advice: str) -> bytes:
    """The bytes of an annotation file.

    Args:
        file: a file, which can be missing, or a member of an archive.
        advice: what the user can do if the file is missing or damaged.

    Raises:
        UserError: it cannot be read, or is too large.
    """
    if isinstance(file, Path):
        with reading(file, advice):
            return file.read_bytes()
    _check_sizes(file.archive, [file])
    with explaining(Path(str(file)), _DAMAGED):
        return file.read_bytes()


def annotations_by_name(path: Path, names: Collection[str]) -> dict[str, Path | ZipMember]:
    """The annotation files in a folder, in its subfolder `annotations`, or in any folder of a zip archive.

    Args:
        path: the folder or archive.
        names: the names of the files without folders.

    Returns:
        The files by their names. Missing ones are left out.

    Raises:
        UserError: the path is neither a folder nor a zip archive, the archive has none of the files, or has different
            files of one name.
    """
    if is_zip(path):
        return {member.path.name: member for member in _chosen(path, lambda there: there & set(names), names)}
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a zip archive; pass one of them")
    places = (path / "annotations", path)
    found = {name: next((place / name for place in places if (place / name).exists()), None) for name in names}
    return {name: file for name, file in found.items() if file is not None}


@contextlib.contextmanager
def texts(
    path: Path,
    choose: Callable[[set[str]], Collection[str]],
    expected: Collection[str],
    staging: Callable[[], AbstractContextManager[Path]],
) -> Iterator[Path]:
    """Yields a path as it is, and of a zip archive a temporary folder with some of its files.

    Error messages name the archive instead of the temporary folder.

    Args:
        path: a file, a folder or a zip archive.
        choose: the files of the archive to extract, of all names without folders. They are extracted without folders,
            unless different files have one name, as in train/metadata.csv and val/metadata.csv.
        expected: names or patterns of the files, for the error message of an archive without any.
        staging: makes the temporary folder, and removes it.

    Raises:
        UserError: the archive is damaged, or has none of the files.
    """
    if not is_zip(path):
        yield path
        return
    chosen = _chosen(path, choose, expected, same_names=True)
    flat = len({member.path.name for member in chosen}) == len(chosen)
    top = PurePosixPath(os.path.commonpath([member.path.parent for member in chosen]))
    with staging() as folder:
        check_space((folder, sum(member.size for member in chosen), "--data-dir"))
        try:
            for member in chosen:
                _extract(member, folder / (member.path.name if flat else member.path.relative_to(top)))
            yield folder
        except UserError as error:
            error.args = (str(error).replace(str(folder), str(path)),)
            if isinstance(error, WrongRows):
                error.rows = tuple(row.replace(str(folder), str(path)) for row in error.rows)
            raise


def _chosen(
    archive: Path,
    choose: Callable[[set[str]], Collection[str]],
    expected: Collection[str],
    *,
    same_names: bool = False,
) -> list[ZipMember]:
    by_name: dict[str, list[Path | ZipMember]] = {}
    for member in members(archive):
        if not member.path.is_absolute() and ".." not in member.path.parts:
            by_name.setdefault(member.path.name, []).append(member)
    chosen = []
    for name in choose(set(by_name)):
        different = [member for member in without_copies(by_name[name]) if isinstance(member, ZipMember)]
        if len(different) > 1 and not same_names:
            raise UserError(
                f"{archive} contains {len(different)} different files {name}; extract it and pass the folder to use"
            )
        chosen += different
    if not chosen:
        raise UserError(f"{archive} contains none of these files: {', '.join(expected)}; pass another archive")
    _check_sizes(archive, chosen)
    return chosen


def _check_sizes(archive: Path, chosen: Sequence[ZipMember]) -> None:
    if (size := sum(member.size for member in chosen)) > _LARGEST_TEXTS:
        raise UserError(
            f"{archive}: its annotation files have {size / 1e9:.1f} GB; the limit is {_LARGEST_TEXTS / 1e9:.0f} GB. "
            "Extract it and pass a file"
        )


def _extract(member: ZipMember, path: Path) -> None:
    """Writes a file. Errors of the archive name the archive; errors of the disk stay OSErrors."""
    damaged = Path(str(member))
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with explaining(damaged, _DAMAGED):
            source = stack.enter_context(member.opened.open(member.name))
        target = stack.enter_context(path.open("wb"))
        while True:
            with explaining(damaged, _DAMAGED):
                chunk = source.read(_CHUNK)
            if not chunk:
                return
            target.write(chunk)


def read_ahead(read: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Future[Result]]]:
    """Calls a function for all items in threads, and yields each item with its finished or pending result."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), _READ_AHEAD):
            chunk = items[start : start + _READ_AHEAD]
            yield from zip(chunk, [pool.submit(read, item) for item in chunk], strict=True)


def check_space(*needs: tuple[Path, int, str]) -> None:
    """Raises a UserError unless the folders can be created and the disks have enough free space.

    Args:
        needs: folders, the bytes that will be written to them, and the options that choose other folders. Folders on
            the same disk share its space.
    """
    of_disk: dict[int, list[tuple[Path, int, str]]] = {}
    for folder, size, option in needs:
        check_creatable(folder)
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        of_disk.setdefault(there.stat().st_dev, []).append((there, size, option))
    for of_one in of_disk.values():
        needed, free = sum(size for _, size, _ in of_one), shutil.disk_usage(of_one[0][0]).free
        if needed > free:
            options = " or ".join(option for _, size, option in of_one if size)
            raise UserError(
                f"{of_one[0][0]}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; use another {options}"
            )
