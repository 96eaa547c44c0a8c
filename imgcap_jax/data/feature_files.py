"""The files of a feature store, written so that a crash at any time loses little work.

`regions.npy` [I, views, N, D] has its full size from the beginning. Its rows are computed in blocks. A process locks
the block that it computes. An empty file marks each block whose rows have reached the disk. `manifest.json` describes
the rows and records whether all of them are computed.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
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
# .npy does not support bfloat16; its bits are stored as uint16.
_STORED = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}
REGIONS = "regions.npy"
_MANIFEST, _LOCK, _BLOCKS = "manifest.json", "lock", "blocks"


class FeatureWriter:
    """Writes the rows of a store block by block. Any number of processes may do so at the same time.

    Attributes:
        shape: (I, views, N, D).
        rows: I * views.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        fingerprint: str,
        shape: tuple[int, int, int, int],
        dtype: Dtype,
    ) -> None:
        self.folder = folder
        self.shape = shape
        self.rows = shape[0] * shape[1]
        self._dtype = dtype
        self._manifest = {"fingerprint": fingerprint, "dtype": dtype, "key": dict(identity), "shape": shape}
        self._row_bytes = shape[2] * shape[3] * DTYPES[dtype].itemsize
        self._block_rows = 0
        self._file = -1
        self._held: dict[int, BinaryIO] = {}
        self._missing: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Size of all regions in bytes."""
        return self.rows * self._row_bytes

    @contextlib.contextmanager
    def open(self, block_rows: int) -> Iterator[None]:
        """Creates the files, with blocks of `block_rows` rows, or continues with existing files.

        Raises:
            OSError: the disk has no space for the whole store.
            UserError: the existing files are damaged.
        """
        blocks = self.folder / _BLOCKS
        blocks.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held briefly, so that only one process creates the files
            if (self.folder / _MANIFEST).exists():
                self._check()
            else:
                shutil.rmtree(blocks)  # left by an earlier store; it would mark missing rows as done
                blocks.mkdir()
                self._allocate()
                _write_manifest(self.folder, {**self._manifest, "block_rows": block_rows, "done": False})
        self._block_rows = read_manifest(self.folder)["block_rows"]
        self._file = os.open(self.folder / REGIONS, os.O_WRONLY)
        try:
            yield
        finally:
            for held in self._held.values():
                held.close()
            os.close(self._file)

    def _check(self) -> None:
        manifest = read_manifest(self.folder)
        if tuple(manifest["shape"]) != self.shape or manifest["dtype"] != self._dtype:
            raise damaged(
                self.folder / _MANIFEST,
                f"it says {manifest['shape']} {manifest['dtype']}, the features are {self.shape} {self._dtype}",
            )
        path = self.folder / REGIONS
        if not path.exists() or path.stat().st_size != len(self._header()) + self.nbytes:
            raise damaged(path, "its size does not match the manifest")
        with path.open("rb") as file:
            if file.read(len(self._header())) != self._header():
                raise damaged(path, "its header does not match the manifest")

    def _allocate(self) -> None:
        (self.folder / REGIONS).unlink(missing_ok=True)  # left by a process that was killed at this point
        free = shutil.disk_usage(self.folder).free
        if self.nbytes > free:
            raise OSError(errno.ENOSPC, f"{self.nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
        with (self.folder / REGIONS).open("wb") as file:
            file.write(self._header())
            size = len(self._header()) + self.nbytes
            if hasattr(os, "posix_fallocate"):  # not on macOS
                # Reserves the space, so that the disk cannot run full halfway through the work.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            file.flush()
            os.fsync(file.fileno())

    def _header(self) -> bytes:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {"descr": _STORED[self._dtype].str, "fortran_order": False, "shape": self.shape},
        )
        return header.getvalue()

    @property
    def done(self) -> int:
        """The number of rows on the disk, computed by any process."""
        if read_manifest(self.folder)["done"]:
            return self.rows
        return sum(len(self._rows_of(int(path.stem))) for path in (self.folder / _BLOCKS).glob("*.done"))

    def _rows_of(self, block: int) -> range:
        return range(block * self._block_rows, min((block + 1) * self._block_rows, self.rows))

    def free_blocks(self) -> Iterator[range]:
        """Locks and yields the rows of each block that is neither done nor locked by another process."""
        for block in range(-(-self.rows // self._block_rows)):
            done = self.folder / _BLOCKS / f"{block}.done"
            if done.exists() or block in self._held:
                continue
            try:
                held = (self.folder / _BLOCKS / f"{block}.lock").open("wb")
            except FileNotFoundError:
                return  # another process has just finished the store
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
            except BlockingIOError:
                held.close()
                continue
            if done.exists() or is_finished(self.folder):  # finished between the check and the lock
                held.close()
                continue
            self._held[block] = held
            self._missing[block] = len(self._rows_of(block))
            yield self._rows_of(block)

    def write(self, first: int, regions: npt.NDArray[np.float32]) -> None:
        """Writes consecutive rows of one block. Syncs the block to the disk once it is complete.

        Args:
            first: number of the first row.
            regions: [B, N, D].

        Raises:
            UserError: a value is NaN or infinite, or does not fit the dtype.
        """
        if regions.shape[1:] != self.shape[2:]:
            raise ValueError(f"regions have the shape {regions.shape[1:]}, expected {self.shape[2:]}")
        with np.errstate(over="ignore"):
            cast = regions.astype(DTYPES[self._dtype])
        if not np.isfinite(cast).all():
            if not np.isfinite(regions).all():
                raise UserError("the encoder's features are NaN or infinite; check its weights")
            raise UserError(
                f"features of up to {np.abs(regions).max():.3g} do not fit {self._dtype}; store them as bfloat16"
            )
        data = cast.view(_STORED[self._dtype]).tobytes()
        place = len(self._header()) + first * self._row_bytes
        while data:
            written = os.pwrite(self._file, data, place)
            data, place = data[written:], place + written
        block = first // self._block_rows
        self._missing[block] -= len(regions)
        if not self._missing[block]:
            os.fsync(self._file)
            (self.folder / _BLOCKS / f"{block}.done").touch()
            self._held.pop(block).close()

    def finish(self) -> None:
        """Marks the store as finished, once all blocks are done."""
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may get here at the same time
            if not is_finished(self.folder):
                _write_manifest(self.folder, {**self._manifest, "block_rows": self._block_rows, "done": True})
            shutil.rmtree(self.folder / _BLOCKS, ignore_errors=True)


@contextlib.contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Turns the OSError of a full disk into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        raise UserError(
            f"no disk space for features in {folder} ({error.strerror}): free some space and run the command again "
            "(it continues where it stopped), use fewer views, or use another folder"
        ) from error


def damaged(path: Path, reason: str) -> UserError:
    """The error for a damaged file of a store."""
    return UserError(f"{path} is damaged ({reason}): delete the folder {path.parent} to compute the features again")


def is_finished(folder: Path) -> bool:
    """Whether the folder contains a store with all rows computed. Raises a UserError as `read_manifest` does."""
    if not (folder / _MANIFEST).exists():
        return False
    return bool(read_manifest(folder)["done"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest: "shape", "done" (whether all rows are computed), "dtype", "fingerprint", "key", "block_rows".

    Raises:
        UserError: the manifest is missing or damaged.
    """
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shape, done, block = manifest["shape"], manifest["done"], manifest["block_rows"]
        if len(shape) != 4 or not isinstance(done, bool) or block < 1 or manifest["dtype"] not in DTYPES:
            raise ValueError(f"shape {shape}, done {done}, dtype {manifest['dtype']}")
    except FileNotFoundError as error:
        raise UserError(f"{folder} contains no features; run the extraction") from error
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error)) from error
    return dict(manifest)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    new = folder / f"{_MANIFEST}.{os.getpid()}"
    with new.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / _MANIFEST)
