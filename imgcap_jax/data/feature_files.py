"""The files of a feature store, and how they are written so that a crash at any moment loses little.

`regions.npy` [I, views, N, D] is written row after row; `manifest.json` says how many rows are valid, and is
advanced only after they have reached the disk.
"""

import contextlib
import errno
import fcntl
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from imgcap_jax.errors import UserError
from imgcap_jax.files import disk_full

Dtype = Literal["float16", "bfloat16"]
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# .npy knows no bfloat16; its bits are stored.
_STORED = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}
REGIONS = "regions.npy"
_MANIFEST, _LOCK = "manifest.json", "lock"
# A crash loses at most so much work, and a disk is not made to sync for every batch.
_FLUSH_SECONDS = 5.0

_log = logging.getLogger(__name__)


class FeatureWriter:
    """Appends rows to a store.

    Attributes:
        done: rows that are on the disk and in the manifest.
        done_unsaved: rows appended, of which the last may not be on the disk yet.
        shape: (I, views, N, D), or None as long as the encoder's output is unknown.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        fingerprint: str,
        images: int,
        views: int,
        dtype: Dtype,
    ) -> None:
        self.folder = folder
        self.rows = images * views
        self.done = 0
        self.done_unsaved = 0
        self.shape: tuple[int, int, int, int] | None = None
        self._manifest: dict[str, Any] = {"fingerprint": fingerprint, "dtype": dtype, "key": dict(identity)}
        self._images, self._views, self._dtype = images, views, dtype
        self._file: BinaryIO | None = None
        self._flushed = 0.0

    @property
    def nbytes(self) -> int:
        """Size of the finished store."""
        return self.rows * self._row_bytes()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Holds the folder for this process, and finds out what is done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("%s: another process is computing these features; waiting for it", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if (self.folder / _MANIFEST).exists():
                    self._resume()
                yield
            finally:
                if self._file is not None:
                    self._file.close()

    def _resume(self) -> None:
        manifest = read_manifest(self.folder)
        self.shape = tuple(manifest["shape"])
        self.done = self.done_unsaved = manifest["done"]
        path = self.folder / REGIONS
        if self.shape[:2] != (self._images, self._views) or manifest["dtype"] != self._dtype:
            raise damaged(self.folder / _MANIFEST, "it is not of these images")
        end = len(self._header()) + self.done * self._row_bytes()
        if not path.exists() or path.stat().st_size < end:
            raise damaged(path, f"it is shorter than the {self.done} rows that the manifest tells of")
        if self.done < self.rows:
            self._file = path.open("r+b")
            # Rows beyond those in the manifest may be half written.
            self._file.truncate(end)
            self._file.seek(end)
            self._check_room()

    def start(self, regions: int, size: int) -> None:
        """Begins the file, once the encoder's output [N, D] is known."""
        self.shape = (self._images, self._views, regions, size)
        self._check_room()
        self._file = (self.folder / REGIONS).open("wb")
        self._file.write(self._header())
        self.flush()

    def append(self, regions: npt.NDArray[np.float32]) -> None:
        """Writes [B, N, D]; now and then makes sure that all is on the disk."""
        assert self.shape is not None
        assert self._file is not None
        if regions.shape[1:] != self.shape[2:]:
            raise damaged(self.folder / _MANIFEST, f"regions are {self.shape[2:]}, the encoder's {regions.shape[1:]}")
        with np.errstate(over="ignore"):
            cast = regions.astype(DTYPES[self._dtype])
        if not np.isfinite(cast).all():
            if not np.isfinite(regions).all():
                raise UserError("the encoder's features are NaN or infinite; check its weights")
            raise UserError(
                f"features up to {np.abs(regions).max():.3g} are beyond {self._dtype}; store them as bfloat16"
            )
        self._file.write(cast.view(_STORED[self._dtype]).tobytes())
        self.done_unsaved += len(regions)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Rows first, then the manifest that vouches for them."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done = self.done_unsaved
        _write_manifest(self.folder, {**self._manifest, "shape": self.shape, "done": self.done})
        self._flushed = time.monotonic()

    def _row_bytes(self) -> int:
        assert self.shape is not None
        return self.shape[2] * self.shape[3] * DTYPES[self._dtype].itemsize

    def _header(self) -> bytes:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {"descr": _STORED[self._dtype].str, "fortran_order": False, "shape": self.shape},
        )
        return header.getvalue()

    def _check_room(self) -> None:
        missing = self._row_bytes() * (self.rows - self.done)
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise OSError(errno.ENOSPC, f"{missing / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


@contextlib.contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Turns a full disk into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        raise UserError(
            f"no room for features in {folder} ({error.strerror}): free some and run it again, it goes on "
            "where it stopped; or use fewer views, or another folder"
        ) from error


def damaged(path: Path, reason: str) -> UserError:
    """The error for a file of a store that is not as it was written."""
    return UserError(f"{path} is damaged ({reason}): delete the folder {path.parent} to compute the features again")


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a store whose rows are all there. Raises UserError as `read_manifest`."""
    if not (folder / _MANIFEST).exists():
        return False
    manifest = read_manifest(folder)
    return bool(manifest["done"] == math.prod(manifest["shape"][:2]))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest: "shape", "done" (rows), "dtype", "fingerprint", "key".

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shape, done = manifest["shape"], manifest["done"]
        if len(shape) != 4 or not 0 <= done <= math.prod(shape[:2]) or manifest["dtype"] not in DTYPES:
            raise ValueError(f"shape {shape}, done {done}, dtype {manifest['dtype']}")
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no features; run the extraction") from error
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error)) from error
    return dict(manifest)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    new = folder / f"{_MANIFEST}.new"
    with new.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / _MANIFEST)
