"""Folders in a bucket (``gs://bucket/runs/x``): each has a working copy on this machine.

Everything else reads and writes the working copy, a folder below the cache folder. ``run.mirror`` keeps that of a run
and its bucket alike. ``pull_tree`` and ``push_tree`` do so for datasets and feature stores, which never change once
complete. Transfers go through fsspec, on which ``etils.epath`` builds too.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from imgcap_jax.errors import UserError
from imgcap_jax.files import (
    cache_folder,
    disk_full,
    local_path,
    reason,
    replacing,
)
from imgcap_jax.terminal import working

_SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # the package that reads each
_TRANSFERS = 8  # at the same time
_MEGABYTE = 1_000_000


def place(text: str) -> Path:
    """The folder that a user named, or the working copy of one in a bucket. Raises UserError for other URLs."""
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", text)  # Path turns gs://x into gs:/x
    if found is None or found[1] not in _SCHEMES:
        return local_path(text, f"only local folders and {', '.join(f'{scheme}://' for scheme in _SCHEMES)} work")
    parts = [part for part in found[2].split("/") if part]
    if not parts or any(part in (".", "..") for part in parts):
        raise UserError(f"{text} is not a folder in a bucket; give {found[1]}://BUCKET/FOLDER")
    return _copies() / found[1] / "/".join(parts)


def url_of(folder: Path) -> str | None:
    """The URL of the folder that a folder is the working copy of; None if it is an ordinary folder."""
    if not folder.absolute().is_relative_to(_copies()):
        return None
    scheme, *parts = folder.absolute().relative_to(_copies()).parts or ("",)
    return f"{scheme}://{'/'.join(parts)}" if parts else None


def shown(folder: Path) -> str:
    """A folder as a user names it: a URL, or the local path."""
    return url_of(folder) or str(folder)


def _copies() -> Path:
    return cache_folder("remote").absolute()


class File(NamedTuple):
    """A file of a local folder, or one in a bucket, whose time is 0."""

    size: int
    time: int = 0


class Bucket:
    """A folder in a bucket. Every method raises UserError if the bucket cannot be reached."""

    def __init__(self, url: str) -> None:
        self.url = url
        with self._explaining("opened"):
            try:
                import fsspec

                self._fs, self._root = fsspec.url_to_fs(url)
            except ImportError as error:
                package = _SCHEMES[url.partition(":")[0]]
                raise UserError(f"{url} can't be opened without {package}; run: pip install {package}") from error

    @contextmanager
    def _explaining(self, doing: str, name: str = "") -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of many types, by the network, the credentials or the file system
            if isinstance(error, FileNotFoundError) and doing == "read":
                raise  # deleted since it was listed
            if disk_full(error):
                raise
            url = f"{self.url}/{name}" if name else self.url
            why = "the bucket does not exist" if isinstance(error, FileNotFoundError) else reason(error)
            raise UserError(
                f"{url} can't be {doing} ({why}); check the name, the network, and your credentials"
            ) from error

    def files(self) -> dict[str, File]:
        """All files below the folder, by relative path."""
        with self._explaining("listed"):
            try:
                self._fs.invalidate_cache()
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        prefix = self._root.rstrip("/") + "/"
        files = {path.removeprefix(prefix): info for path, info in found.items() if path.startswith(prefix)}
        # Other names could lead out of the working copy; a bucket can be that of somebody else.
        return {
            name: File(int(info["size"])) for name, info in files.items() if not {"", ".", ".."} & {*name.split("/")}
        }

    def read(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError if it was deleted."""
        with self._explaining("read", name):
            content: bytes = self._fs.cat_file(f"{self._root}/{name}")
            return content

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with self._explaining("written", name):
            self._fs.pipe_file(f"{self._root}/{name}", content)

    def get(self, name: str, path: Path) -> None:
        """Copies a file to this machine. Raises FileNotFoundError if it was deleted."""
        with replacing(path) as temporary, self._explaining("read", name):
            self._fs.get_file(f"{self._root}/{name}", str(temporary))

    def put(self, path: Path, name: str) -> None:
        """Copies a file of this machine. Raises FileNotFoundError if it was deleted."""
        with path.open("rb"), self._explaining("written", name):
            try:
                self._fs.put_file(str(path), f"{self._root}/{name}")
            except FileNotFoundError:
                if path.is_file():
                    raise
                deleted = True
            else:
                deleted = False
        if deleted:
            raise FileNotFoundError(str(path))

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there."""
        with self._explaining("deleted", name), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")


def each(function: Callable[[str], None], names: Sequence[str]) -> None:
    """Calls a function for each name, several at a time. The first error is raised."""
    if names:
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(function, names))


def files_in(folder: Path) -> dict[str, File]:
    """All files below a local folder, by relative path."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            with suppress(OSError):  # deleted meanwhile
                status = path.stat()
                found[path.relative_to(folder).as_posix()] = File(status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def pulling_alone(folder: Path) -> Iterator[None]:
    """Waits until no other process of this machine pulls the same run."""
    lock = folder.parent / f".{folder.name}.pull"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pull_tree(folder: Path, last: str) -> None:
    """Completes the working copy of a folder of files that never change. Does nothing for an ordinary folder.

    Args:
        folder: the working copy.
        last: the name of the file that is written last, at any depth. A folder without it is not complete.

    Raises:
        UserError: the bucket cannot be reached, or the disk is full.
    """
    url = url_of(folder)
    if url is None:
        return
    with pulling_alone(folder):
        bucket = Bucket(url)
        theirs = bucket.files()
        if not any(Path(name).name == last for name in theirs):
            return
        names = [name for name, file in theirs.items() if not _has(folder / name, file.size)]
        size = sum(theirs[name].size for name in names)
        with working(f"reading {url}", -(-size // _MEGABYTE), "MB") as work:
            done = 0

            def get(name: str) -> None:
                nonlocal done
                bucket.get(name, folder / name)
                done += theirs[name].size
                work.update(done // _MEGABYTE)

            each(get, [name for name in names if Path(name).name != last])
            each(get, [name for name in names if Path(name).name == last])


def push_tree(folder: Path, last: str) -> None:
    """Pushes a complete folder of files that never change, unless the bucket has it. See ``pull_tree``."""
    url = url_of(folder)
    if url is None:
        return
    bucket = Bucket(url)
    theirs, ours = bucket.files(), files_in(folder)
    names = [name for name, file in ours.items() if name not in theirs or theirs[name].size != file.size]
    with working(f"writing {url}", len(names), "files") as work:

        def put(name: str) -> None:
            bucket.put(folder / name, name)
            work.advance()

        each(put, [name for name in names if Path(name).name != last])
        each(put, [name for name in names if Path(name).name == last])


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
