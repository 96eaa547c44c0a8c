"""The files of a feature store, written so that a crash at any time loses little work.

`regions.npy` [I, views, N, D] has its full size from the beginning. Its rows are computed in blocks. A process locks
the block that it computes. An empty file marks each block whose rows have reached the disk. `digests.bin` contains the
first eight bytes of the SHA-256 of each row, so that a reader can check the rows that it reads: a digest of the whole
file would require reading all of it before training. If the number of regions varies, `counts.bin` contains that of
each row (int32), and the other regions are zeros. `manifest.json` describes the rows, records whether all of them are
computed, and has the digests of itself and of the `.bin` files. Stores of earlier versions have no digests.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from imgcap_jax.array_files import read_header
from imgcap_jax.errors import UserError
from imgcap_jax.files import appending, disk_full, file_digest, json_digest, read_json, reading, replacing
from imgcap_jax.remote import url_of

Dtype = Literal["float16", "bfloat16"]
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# .npy does not support bfloat16; its bits are stored as uint16.
_STORED = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}
REGIONS = "regions.npy"
MANIFEST, _LOCK, _BLOCKS = "manifest.json", "lock", "blocks"
WORKING_FILES = (_LOCK, _BLOCKS)  # are of no use elsewhere
_DIGEST_BYTES = 8
ENCODER = "the encoder's features", "its weights"
_BYTES_PER_ROW = {"digests": _DIGEST_BYTES, "counts": 4}  # of the file `<name>.bin`; the manifest has its digest


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
        source: tuple[str, str] = ENCODER,
        *,
        counted: bool = False,
    ) -> None:
        """Writes nothing yet.

        Args:
            folder: the folder of the store.
            identity: what the values depend on.
            fingerprint: the digest of `identity`.
            shape: (I, views, N, D).
            dtype: the type of the stored values.
            source: for errors: what the values are, and what the user can check if they are wrong.
            counted: whether the number of regions varies.
        """
        self.folder = folder
        self.shape = shape
        self.rows = shape[0] * shape[1]
        self._dtype = dtype
        self._source = source
        self._manifest = {"fingerprint": fingerprint, "dtype": dtype, "key": dict(identity), "shape": list(shape)}
        self._row_bytes = shape[2] * shape[3] * DTYPES[dtype].itemsize
        self._block_rows = 0
        self._file = -1
        self._counted = counted
        self._more: dict[str, int] = {}  # "digests" and "counts", open
        self._held: dict[int, TextIO] = {}
        self._missing: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Size of all regions in bytes."""
        return self.rows * self._row_bytes

    @contextlib.contextmanager
    def open(self, block_rows: int) -> Iterator[None]:
        """Creates the files, with blocks of `block_rows` rows, or continues with existing files.

        Raises:
            OSError: the disk has no space for the whole store, or the folder can't be written.
            UserError: the existing files are damaged.
        """
        blocks = self.folder / _BLOCKS
        self.folder.mkdir(parents=True, exist_ok=True)
        with appending(self.folder / _LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held briefly, so that only one process creates the files
            if (self.folder / MANIFEST).exists():
                self._check()
            else:
                if blocks.exists():  # left by an earlier store; it would mark missing rows as done
                    shutil.rmtree(blocks)
                self._allocate()
                more = dict.fromkeys(["digests", "counts"] if self._counted else ["digests"], "")
                started = {**self._manifest, **more, "block_rows": block_rows, "done": False}
                _write_manifest(self.folder, started)
            blocks.mkdir(exist_ok=True)
        manifest = read_manifest(self.folder)
        self._block_rows = manifest["block_rows"]
        self._file = os.open(self.folder / REGIONS, os.O_WRONLY | os.O_NOFOLLOW)
        for name in _BYTES_PER_ROW:
            if name in manifest:
                self._more[name] = os.open(_file_of(self.folder, name), os.O_WRONLY | os.O_NOFOLLOW)
        try:
            yield
        finally:
            for held in self._held.values():
                held.close()
            for file in (self._file, *self._more.values()):
                os.close(file)

    def _check(self) -> None:
        manifest = read_manifest(self.folder)
        check_is_of(self.folder, manifest, self._manifest)
        header = regions_offset(self.folder, manifest)
        if header != len(self._header()):
            raise damaged(self.folder / REGIONS, "its header does not match the manifest")
        for name in _BYTES_PER_ROW:
            if name in manifest:
                _check_size(self.folder, name, self.rows)

    def _allocate(self) -> None:
        for path in (self.folder / REGIONS, *(_file_of(self.folder, name) for name in _BYTES_PER_ROW)):
            path.unlink(missing_ok=True)  # left by a process that was killed at this point
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
        for name, size in _BYTES_PER_ROW.items():
            if name == "digests" or self._counted:
                with _file_of(self.folder, name).open("wb") as file:
                    file.truncate(self.rows * size)
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
        present = {path.name for path in (self.folder / _BLOCKS).glob("*.done")}
        return sum(len(self._rows_of(block)) for block in range(self._blocks) if f"{block}.done" in present)

    @property
    def _blocks(self) -> int:
        return -(-self.rows // self._block_rows)

    def _rows_of(self, block: int) -> range:
        return range(block * self._block_rows, min((block + 1) * self._block_rows, self.rows))

    def free_blocks(self) -> Iterator[range]:
        """Locks and yields the rows of each block that is neither done nor locked by another process."""
        for block in range(self._blocks):
            done = self.folder / _BLOCKS / f"{block}.done"
            if done.exists() or block in self._held:
                continue
            try:
                held = appending(self.folder / _BLOCKS / f"{block}.lock")
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

    def write(self, first: int, regions: npt.NDArray[np.float32], counts: Sequence[int] | None = None) -> None:
        """Writes consecutive rows of one block. Syncs the block to the disk once it is complete.

        Args:
            first: number of the first row.
            regions: [B, N, D].
            counts: [B], the number of regions of each row, for a store whose rows are counted.

        Raises:
            UserError: a value is NaN or infinite, or does not fit the dtype.
        """
        if regions.shape[1:] != self.shape[2:]:
            raise ValueError(f"regions have the shape {regions.shape[1:]}, expected {self.shape[2:]}")
        with np.errstate(over="ignore"):
            cast = regions.astype(DTYPES[self._dtype])
        if not np.isfinite(cast).all():
            what, cause = self._source
            if not np.isfinite(regions).all():
                raise UserError(f"{what} are NaN or infinite; check {cause}")
            raise UserError(
                f"{what} of up to {np.abs(regions).max():.3g} do not fit {self._dtype}; "
                + ("set data.feature_dtype to bfloat16" if self._dtype == "float16" else f"check {cause}")
            )
        rows = cast.view(_STORED[self._dtype])
        _write_at(self._file, rows.tobytes(), len(self._header()) + first * self._row_bytes)
        if "digests" in self._more:
            _write_at(self._more["digests"], b"".join(map(row_digest, rows)), first * _DIGEST_BYTES)
        if counts is not None:
            _write_at(self._more["counts"], np.array(counts, "<i4").tobytes(), first * _BYTES_PER_ROW["counts"])
        block = first // self._block_rows
        self._missing[block] -= len(regions)
        if not self._missing[block]:
            for file in (self._file, *self._more.values()):
                os.fsync(file)
            (self.folder / _BLOCKS / f"{block}.done").touch()
            self._held.pop(block).close()

    def finish(self) -> None:
        """Marks the store as finished, once all blocks are done."""
        with appending(self.folder / _LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may get here at the same time
            if not is_finished(self.folder):
                finished = {**self._manifest, "block_rows": self._block_rows, "done": True}
                finished |= {name: file_digest(_file_of(self.folder, name)) for name in self._more}
                _write_manifest(self.folder, finished)
            shutil.rmtree(self.folder / _BLOCKS, ignore_errors=True)


def _write_at(file: int, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def row_digest(row: npt.NDArray[Any]) -> bytes:
    """The digest of a row [N, D] of `regions.npy`, in the dtype of the file."""
    return hashlib.sha256(row.data).digest()[:_DIGEST_BYTES]


@contextlib.contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Turns an OSError of the folder into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise UserError(
                f"no disk space for features in {folder} ({error.strerror}): free some space and run the command again "
                "(it continues where it stopped), use fewer views, or use another folder"
            ) from error
        path = None if error.filename is None else Path(os.fsdecode(error.filename))
        elsewhere = path is not None and not path.is_relative_to(folder) and not folder.is_relative_to(path)
        if elsewhere or error.errno is None:
            raise
        what = f"{path} is a symbolic link; delete it" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise UserError(
            f"features can't be written to {folder} ({what}): check the disk and run the command again, or use "
            "another --cache"
        ) from error


def _advice(folder: Path) -> str:
    url = url_of(folder)
    both = f"{folder} and {url}" if url else folder  # or else the same features come back from the bucket
    return f"delete the folder {both} to compute the features again"


def damaged(path: Path, reason: str) -> UserError:
    """The error for a damaged file of a store."""
    return UserError(f"{path} is damaged ({reason}): {_advice(path.parent)}")


def is_finished(folder: Path) -> bool:
    """Whether the folder contains a store with all rows computed. Raises a UserError as `read_manifest` does."""
    if not (folder / MANIFEST).exists():
        return False
    return bool(read_manifest(folder)["done"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest.

    Returns:
        "shape", "dtype", "fingerprint" and "key" of the features; "block_rows"; "done", whether all rows are computed;
        and "digests" and "counts", the SHA-256 of their files if they are (no entry: the store has no such file).

    Raises:
        UserError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} contains no features; run the extraction")
    manifest = read_json(path, _advice(folder))
    with reading(path, _advice(folder)):
        shape, done, block, dtype = (manifest[name] for name in ("shape", "done", "block_rows", "dtype"))
        counts = [*shape, block]
        if len(counts) != 5 or any(type(n) is not int or n < 1 for n in counts):
            raise ValueError(f"shape {shape}, block_rows {block}")
        if not isinstance(done, bool) or dtype not in DTYPES:
            raise ValueError(f"done {done}, dtype {dtype}")
        digest = manifest.pop("digest", None)
        if digest not in (None, json_digest(manifest)):
            raise ValueError("its digest differs")
        if digest is not None or "digests" not in manifest:
            return dict(manifest)
        raise ValueError("it has no digest")


def check_is_of(folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError unless a folder's manifest describes the wanted features, which have this folder's name."""
    for name in ("shape", "dtype", "fingerprint"):
        if manifest.get(name) != wanted[name]:
            raise damaged(folder / MANIFEST, f"its {name} is {manifest.get(name)}, not {wanted[name]}")


def regions_offset(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Checks the size and header of `regions.npy`. Returns the position of the first row in bytes.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / REGIONS
    shape, stored = tuple(manifest["shape"]), _STORED[manifest["dtype"]]
    with reading(path, _advice(folder)), path.open("rb") as file:
        if read_header(file) != (shape, False, stored):
            raise ValueError("its header does not match the manifest")
        if os.fstat(file.fileno()).st_size != file.tell() + math.prod(shape) * stored.itemsize:
            raise ValueError("its size does not match the manifest")
        return file.tell()


def read_counts(folder: Path, manifest: Mapping[str, Any]) -> npt.NDArray[np.int32] | None:
    """The number of regions of each row of a finished store; None if all rows have N. Raises as `read_digests`."""
    counts = _read_more(folder, manifest, "counts")
    return None if counts is None else np.frombuffer(counts, "<i4")


def read_digests(folder: Path, manifest: Mapping[str, Any]) -> bytes | None:
    """The digests of all rows of a finished store, in their order; None if it has none.

    Raises:
        UserError: they are missing or damaged.
    """
    return _read_more(folder, manifest, "digests")


def _read_more(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes | None:
    if name not in manifest:
        return None
    path = _file_of(folder, name)
    _check_size(folder, name, manifest["shape"][0] * manifest["shape"][1])
    with reading(path, _advice(folder)):
        content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest[name]:
        raise damaged(path, "its digest differs")
    return content


def check_row(folder: Path, digests: bytes, row: int, stored: npt.NDArray[Any]) -> None:
    """Raises UserError unless a row [N, D] of the file has its digest."""
    if row_digest(stored) != digests[row * _DIGEST_BYTES : (row + 1) * _DIGEST_BYTES]:
        raise damaged(folder / REGIONS, f"row {row} has changed since it was written")


def map_regions(folder: Path, manifest: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Maps the rows [I, views, N, D] of a store into memory, in the dtype of the file. Raises as `regions_offset`."""
    offset = regions_offset(folder, manifest)
    with reading(folder / REGIONS, _advice(folder)):
        return np.memmap(
            folder / REGIONS, _STORED[manifest["dtype"]], mode="r", offset=offset, shape=tuple(manifest["shape"])
        )


def _check_size(folder: Path, name: str, rows: int) -> None:
    path = _file_of(folder, name)
    if not path.is_file() or path.stat().st_size != rows * _BYTES_PER_ROW[name]:
        raise damaged(path, "its size does not match the manifest")


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    with replacing(folder / MANIFEST) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump({**manifest, "digest": json_digest(manifest)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
