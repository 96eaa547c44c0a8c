"""Folders in a bucket (``gs://bucket/runs/x``): each has a working copy on this machine.

Everything else reads and writes the working copy, a folder below the cache folder. ``run.mirror`` synchronises that of
a run with its bucket, and says why paths in buckets are not used everywhere. ``pull_tree`` and ``push_tree``
synchronise datasets and feature stores, which never change once complete. Transfers go through fsspec.
"""

import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from imgcap_jax.errors import UserError
from imgcap_jax.files import (
    DIGESTS,
    cache_folder,
    disk_full,
    file_digest,
    local_path,
    read_digests,
    reason,
    replacing,
)
from imgcap_jax.terminal import working

_SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # the package that reads each
_TRANSFERS = 8  # at the same time
_ATTEMPTS = 3  # to read a folder that changes meanwhile
_MEGABYTE = 1_000_000
_Result = TypeVar("_Result")


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


def removal(folder: Path) -> str:
    """How a user removes a run that is in the way, for a message."""
    return "move the folder away" if url_of(folder) is None else "delete it in the bucket"


def _copies() -> Path:
    return cache_folder("remote").absolute()


class File(NamedTuple):
    """A file of a local folder, or one in a bucket, whose time is 0."""

    size: int
    time: int = 0


class Vanished(Exception):
    """A file of a bucket that was deleted after it was listed. (A FileNotFoundError would be one of this machine.)"""


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
                raise Vanished(name) from error
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
        """The content of a file. Raises Vanished if it was deleted."""
        with self._explaining("read", name):
            content: bytes = self._fs.cat_file(f"{self._root}/{name}")
            return content

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with self._explaining("written", name):
            self._fs.pipe_file(f"{self._root}/{name}", content)

    def get(self, name: str, path: Path) -> None:
        """Copies a file to this machine. Raises Vanished if it was deleted."""
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
    """Calls a function for each name, several at a time. The first error is raised.

    Its threads do not keep the process alive, as those of ``concurrent.futures`` do.
    """
    waiting, taking = list(reversed(names)), threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        while True:
            with taking:
                if not waiting:
                    return
                name = waiting.pop()
            try:
                function(name)
            except BaseException as error:
                errors.append(error)
                waiting.clear()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_TRANSFERS, len(names)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C
        waiting.clear()
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]


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


def until_settled(url: str, read: Callable[[], _Result]) -> _Result:
    """Reads a folder of a bucket, and again if a file vanishes meanwhile. Raises UserError if that happens often."""
    for _ in range(_ATTEMPTS):
        try:
            return read()
        except Vanished:
            continue
    raise UserError(f"{url} changes while it is read; try again")


def pull_tree(folder: Path, last: str) -> None:
    """Completes the working copy of a folder of files that never change. Does nothing for an ordinary folder.

    Args:
        folder: the working copy.
        last: the name of the file that is written last, at any depth. A folder without it is not complete.

    Raises:
        UserError: the bucket cannot be reached, or the disk is full.
    """
    url = url_of(folder)
    if url is not None:
        with pulling_alone(folder):
            until_settled(url, lambda: _pull_tree(Bucket(url), folder, last))


def _pull_tree(bucket: Bucket, folder: Path, last: str) -> None:
    theirs = bucket.files()
    marks = [name for name in theirs if Path(name).name == last]
    if not marks:
        return
    digests = [name for name in theirs if Path(name).name == DIGESTS]
    if _are_same(bucket, folder, [*marks, *digests]):
        names = [name for name, file in theirs.items() if not _has(folder / name, file.size)]
    else:
        # The files here can be parts of an interrupted copy, an unfinished feature store or another dataset.
        for name in marks:
            (folder / name).unlink(missing_ok=True)
        each(lambda name: bucket.get(name, folder / name), digests)
        of_files = {
            f"{parent}/{name}".removeprefix("./"): digest
            for parent in {str(Path(name).parent) for name in digests}
            for name, digest in (read_digests(folder / parent) or {}).items()
        }

        def is_intact(name: str) -> bool:
            path = folder / name
            return name in of_files and _has(path, theirs[name].size) and file_digest(path) == of_files[name]

        names = [name for name in theirs if name not in digests and not is_intact(name)]
    size = sum(theirs[name].size for name in names)
    with working(f"reading {bucket.url}", -(-size // _MEGABYTE), "MB") as work:
        done = 0

        def get(name: str) -> None:
            nonlocal done
            bucket.get(name, folder / name)
            done += theirs[name].size
            work.update(done // _MEGABYTE)

        each(get, [name for name in names if name not in marks])
        each(get, [name for name in names if name in marks])


def push_tree(folder: Path, last: str, without: Sequence[str] = ()) -> None:
    """Pushes a complete folder of files that never change, unless the bucket has it. See ``pull_tree``.

    Files of the same size are taken to be the same only if the bucket has the same ``last`` and the same digests.

    Args:
        folder: the working copy.
        last: the name of the file that is written last.
        without: names in the folder that are not pushed.

    Raises:
        UserError: the bucket cannot be reached.
    """
    url = url_of(folder)
    if url is None:
        return
    bucket = Bucket(url)
    theirs = bucket.files()
    ours = {name: file for name, file in files_in(folder).items() if Path(name).parts[0] not in without}
    marks = [name for name in ours if Path(name).name == last]
    if _are_same(bucket, folder, [name for name in ours if Path(name).name in (last, DIGESTS)]):
        names = [name for name, file in ours.items() if name not in theirs or theirs[name].size != file.size]
    else:
        names = list(ours)
        for name in marks:
            bucket.remove(name)  # nobody reads a mixture of two folders
    with working(f"writing {url}", len(names), "files") as work:

        def put(name: str) -> None:
            bucket.put(folder / name, name)
            work.advance()

        each(put, [name for name in names if name not in marks])
        each(put, [name for name in names if name in marks])


def _are_same(bucket: Bucket, folder: Path, names: Sequence[str]) -> bool:
    """Whether these files have the same content in the bucket and here."""

    def is_same(name: str) -> bool:
        with suppress(Vanished, OSError):
            return (folder / name).read_bytes() == bucket.read(name)
        return False

    return all(is_same(name) for name in names)


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
