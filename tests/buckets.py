"""A stand-in for the file system of gs://: a folder on this machine. Files are replaced at once, as in a bucket."""

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

ROOT = "FAKE_BUCKETS"  # the environment variable with its folder


class Buckets(AbstractFileSystem):
    """Attributes (of the class): failures, the number of the next writes that fail; written, the names of all others.

    removed: the names of all files that were deleted. kill_after: the process is killed after this number of writes.
    latency: seconds before each read and write. vanishing: names of files that vanish after they are listed.
    """

    protocol = ("gs",)
    cachable = False
    failures = 0
    kill_after = int(os.environ.get("FAKE_BUCKETS_KILL", "-1"))
    latency = float(os.environ.get("FAKE_BUCKETS_LATENCY", "0"))
    written: list[str] = []
    removed: list[str] = []
    vanishing: set[str] = set()

    def _path(self, path: str) -> Path:
        return Path(os.environ[ROOT]) / self._strip_protocol(path)

    def _readable(self, path: str) -> Path:
        time.sleep(Buckets.latency)
        if not self._path(path).is_file() or self._path(path).name in Buckets.vanishing:
            raise missing(path)
        return self._path(path)

    def _write(self, path: str, content: bytes) -> None:
        time.sleep(Buckets.latency)
        if Buckets.failures:
            Buckets.failures -= 1
            raise ConnectionError("no route to host")
        if len(Buckets.written) == Buckets.kill_after:
            os.kill(os.getpid(), 9)
        target = self._path(path)
        if not (Path(os.environ[ROOT]) / self._strip_protocol(path).split("/")[0]).is_dir():
            raise missing(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(dir=os.environ[ROOT])
        with os.fdopen(number, "wb") as file:
            file.write(content)
        os.replace(temporary, target)
        Buckets.written.append(self._strip_protocol(path))

    def find(self, path: str, *_: Any, **__: Any) -> dict[str, dict[str, Any]]:
        top, root = self._path(path), Path(os.environ[ROOT])
        return {
            file.relative_to(root).as_posix(): {"size": file.stat().st_size, "type": "file"}
            for file in sorted(top.rglob("*"))
            if file.is_file()
        }

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        return self._readable(path).read_bytes()

    def pipe_file(self, path: str, value: bytes, *_: Any, **__: Any) -> None:
        self._write(path, value)

    def get_file(self, rpath: str, lpath: str, *_: Any, **__: Any) -> None:
        shutil.copyfile(self._readable(rpath), lpath)

    def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        self._write(rpath, Path(lpath).read_bytes())

    def rm_file(self, path: str) -> None:
        if not self._path(path).is_file():
            raise missing(path)
        self._path(path).unlink()
        Buckets.removed.append(self._strip_protocol(path))


def missing(path: str) -> FileNotFoundError:
    """The error for a missing file. Like those of some file systems it has a number, as if the disk had raised it."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def open_url(url: str) -> tuple[Buckets, str]:
    """Stands for ``fsspec.url_to_fs``."""
    system = Buckets()
    return system, system._strip_protocol(url)


def install() -> None:
    """Every URL leads to this file system from here on, in this process."""
    fsspec.url_to_fs = open_url
