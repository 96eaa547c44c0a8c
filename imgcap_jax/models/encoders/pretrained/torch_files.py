"""Reads the files of torch.save without torch, and without running any code from them.

A torch file is a pickle, and a pickle is a program. `_Machine` interprets the few instructions that a file of tensors
needs. It calls nothing that the file names. It does not recurse, and it hashes and compares nothing but text and
numbers. Time and memory are therefore proportional to the size of the file. `MAX_INSTRUCTIONS` and `MAX_PICKLE` limit
the pickle; the tensors take the memory that they take in the file.
"""

import io
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from imgcap_jax.errors import UserError
from imgcap_jax.files import reading

ADVICE = (
    "download it again, or give the path of a .pth or .safetensors file: --encoder.weights PATH in training, --weights "
    "PATH in evaluate and caption"
)
"""What to do about a weights file that cannot be read."""

MAX_INSTRUCTIONS = 1_000_000
"""Instructions of one pickle. ResNet-152's file has 29,000."""
MAX_PICKLE = 16 << 20
"""Bytes of one pickle, which does not include the numbers of the tensors. ResNet-152's has 100 kB."""

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
# `_rebuild_tensor` is in files written before torch 0.4, such as torchvision's VGG weights.
_REBUILD_TENSOR = {("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2")}
_REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = ("collections", "OrderedDict")

# The old format begins with these two pickled integers, followed by the sizes of the writer's types.
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_PROTOCOL = 1001


class _Unreadable(Exception):
    """The reason why a file is refused, and what to do; `read_torch` adds the name of the file."""

    def __init__(self, why: str, advice: str = "use a state dict written by torch.save") -> None:
        super().__init__(f"{why}; {advice}")


class _Dict(dict[str, Any]):
    """A dict of the pickle. Entries whose key is not text are left out, such as those of an optimizer's state.

    `wrong` is the type of the first such key, or None.
    """

    wrong: type | None = None


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
        values = self.storage.values
        if type(self.shape) is not tuple or type(self.strides) is not tuple or len(self.shape) != len(self.strides):
            raise _Unreadable("a tensor has a malformed shape")
        if not all(type(n) is int and n >= 0 for n in (self.offset, *self.shape, *self.strides)):
            raise _Unreadable("a tensor has a malformed shape")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if values is None or (0 not in self.shape and last >= values.size):
            raise _Unreadable("a tensor reaches beyond its stored numbers")
        if 0 in self.shape:
            return np.empty(self.shape, values.dtype)
        strides = tuple(s * values.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False)


@dataclass(frozen=True)
class _Name:
    """A name of torch or of Python that the pickle refers to."""

    module: str
    name: str


class _Machine:
    """Runs one pickle. Builds only numbers, strings, None, tuples, lists, dicts with text as keys, and `_Tensor`s.

    Attributes:
        stack: the values since the last mark.
        marked: the stacks below the marks.
        memo: the values that the pickle has numbered.
    """

    def __init__(self, storage: Callable[[np.dtype, str, int], _Storage]) -> None:
        self._storage = storage
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: list[Any] = []

    def run(self, data: BinaryIO) -> Any:
        """Runs the pickle at the current position of `data`, which is afterwards at the end of the pickle."""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number >= MAX_INSTRUCTIONS:
                raise _Unreadable(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
            self._step(opcode.name, argument)
        return self.stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "BININT" | "BININT1" | "BININT2" | "INT" | "LONG" | "LONG1" | "LONG4" | "BINFLOAT" | "FLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE":
                stack.append(argument)
            case "SHORT_BINSTRING" | "BINSTRING" | "STRING":  # of Python 2; pickletools decodes it as latin-1
                stack.append(argument.encode("latin-1").decode("utf-8"))
            case "BINPUT" | "LONG_BINPUT" | "PUT" | "MEMOIZE":
                self._memoize(argument)
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                if len(stack) < count:
                    raise IndexError("pop from an empty stack")
                stack[-count:] = [tuple(stack[-count:])]
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append(_Dict())
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "TUPLE" | "LIST" | "DICT":
                items = self._items()
                made = tuple(items) if opcode == "TUPLE" else items if opcode == "LIST" else _dict(_pairs(items))
                self.stack.append(made)
            case "APPEND":
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS":
                items = self._items()
                _expect(self.stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _add(_expect(stack[-1], _Dict), [(key, value)])
            case "SETITEMS":
                items = self._items()
                _add(_expect(self.stack[-1], _Dict), _pairs(items))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(_expect(module, str), _expect(name, str)))
            case "BINPERSID":
                stack.append(self._stored(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(_expect(function, _Name), _expect(arguments, tuple)))
            case "BUILD":  # attributes of a dict, such as the versions of a module's layers
                stack.pop()
                _expect(stack[-1], _Dict)
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise _Unreadable(f"its pickle has the instruction {opcode}, which a file of tensors does not need")

    def _items(self) -> list[Any]:
        """The values since the last mark, which is removed."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _memoize(self, index: int | None) -> None:
        value = self.stack[-1]
        if index is None or index == len(self.memo):
            self.memo.append(value)
        elif index == len(self.memo) + 1:  # a pickler that counts from 1
            self.memo += [None, value]
        elif 0 <= index < len(self.memo):
            self.memo[index] = value
        else:
            raise _Unreadable("its pickle has a memo index out of sequence")

    def _stored(self, pid: Any) -> _Storage:
        # The old format adds a view of the storage, which is None except in very old files.
        if type(pid) is tuple and len(pid) in (5, 6):
            tag, kind, key, _, size = pid[:5]
            if (
                type(tag) is str
                and tag == "storage"
                and type(kind) is _Name
                and kind.name in _STORAGE_DTYPES
                and type(key) is str
                and type(size) is int
                and size >= 0
                and (len(pid) == 5 or pid[5] is None)
            ):
                dtype = _STORAGE_DTYPES[kind.name]
                held = self._storage(dtype, key, size)
                if held.dtype != dtype or held.size != size:
                    raise _Unreadable("two tensors describe their storage differently")
                return held
        raise _Unreadable("it contains an object that is not a tensor")


def _name(module: str, name: str) -> _Name:
    known = module == "torch" and name in _STORAGE_DTYPES
    if not known and (module, name) not in {*_REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT}:
        raise _Unreadable(
            f"it refers to {module[:40]}.{name[:40]}, which a file of tensors does not need",
            "use a state dict written by torch.save, without the rest of a training checkpoint",
        )
    return _Name(module, name)


def _call(function: _Name, arguments: tuple[Any, ...]) -> Any:
    name = (function.module, function.name)
    if name in _REBUILD_TENSOR:
        storage, offset, shape, strides = arguments[:4]
        if type(storage) is not _Storage:
            raise _Unreadable("a tensor has no storage")
        return _Tensor(storage, offset, shape, strides)
    if name == _REBUILD_PARAMETER:
        return _expect(arguments[0], _Tensor)
    if name == _ORDERED_DICT:  # Python 2 gives it a list of pairs
        pairs = _expect(arguments[0], list) if arguments else []
        return _dict((pair[0], pair[1]) for pair in pairs)
    raise _Unreadable("it contains an object that is not a tensor")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _Unreadable("it contains an object that is not a tensor")
    return value


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _dict(pairs: Iterable[tuple[Any, Any]]) -> _Dict:
    made = _Dict()
    _add(made, pairs)
    return made


def _add(to: _Dict, pairs: Iterable[tuple[Any, Any]]) -> None:
    for key, value in pairs:
        if type(key) is not str:
            to.wrong = to.wrong or type(key)
            continue
        if key in to:
            raise _Unreadable(f"it has two entries {key[:40]!r}")
        to[key] = value


_TOO_LARGE = f"its pickle is larger than {MAX_PICKLE >> 20} MB"


def _no_storage(dtype: np.dtype, key: str, size: int) -> _Storage:
    raise _Unreadable("it does not have the header of a torch file")


def _load(file: BinaryIO, storage: Callable[[np.dtype, str, int], _Storage]) -> Any:
    """Reads one pickle from the current position of a file, which is afterwards at the end of the pickle."""
    start = file.tell()
    data = io.BytesIO(file.read(MAX_PICKLE))
    try:
        loaded = _Machine(storage).run(data)
    except Exception:
        if data.tell() == MAX_PICKLE:  # the end of what was read
            raise _Unreadable(_TOO_LARGE) from None
        raise
    file.seek(start + data.tell())
    return loaded


def _read_old(file: BinaryIO) -> Any:
    """Reads the format before torch 1.6: pickles of magic, protocol, sizes, object and keys, then raw numbers."""
    header = [_load(file, _no_storage) for _ in range(3)]
    if header[:2] != [_OLD_MAGIC, _OLD_PROTOCOL]:
        raise _Unreadable("it does not have the header of a torch file")
    if _expect(header[2], _Dict).get("little_endian", True) is not True:
        raise _Unreadable("it was written on a big-endian machine")
    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, size: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, size))

    loaded = _load(file, storage)
    size = os.fstat(file.fileno()).st_size
    for key in _expect(_load(file, _no_storage), list):
        held = storages[_expect(key, str)]
        if held.values is not None or int.from_bytes(file.read(8), "little") != held.size:
            raise _Unreadable("the size of a storage does not match its tensors")
        if held.size * held.dtype.itemsize > size - file.tell():
            raise _Unreadable("it is truncated")
        held.values = _numbers(file.read(held.size * held.dtype.itemsize), held)
    return loaded


def _read_zip(file: BinaryIO) -> Any:
    """Reads the format since torch 1.6: an uncompressed archive of `data.pkl` and one member per storage."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = {member.filename: member for member in members}
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Unreadable("it is a zip archive without torch's data.pkl")
        # A compressed member could fill the memory, because it can be much larger than the file. So could members that
        # share their bytes.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _Unreadable("it is compressed, which files of torch.save never are")
        if len(names) < len(members):
            raise _Unreadable("it has two members of the same name")
        if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise _Unreadable("its members are larger than the file")
        if names[pickles[0]].file_size > MAX_PICKLE:
            raise _Unreadable(_TOO_LARGE)
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
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

        return _load(io.BytesIO(archive.read(pickles[0])), storage)


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
        UserError: the file is missing, damaged or not a torch file, contains anything except tensors, refers to
            code, or exceeds the limits of this module.
    """
    with reading(path, ADVICE), path.open("rb") as file:
        try:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            loaded = _read_zip(file) if zipped else _read_old(file)
            _check_tensors(loaded)
            return {name: tensor.array() for name, tensor in loaded.items()}
        except _Unreadable as why:
            raise UserError(f"Weights file {path} is refused: {why}.") from None


def _check_tensors(loaded: Any) -> None:
    """Raises `_Unreadable` unless a value is a dict of tensors only."""
    if type(loaded) is not _Dict:
        raise _Unreadable("it does not contain a dict of tensors")
    inner = [name for name, value in loaded.items() if type(value) is _Dict and value and _has_tensors_only(value)]
    if inner:
        keys = " or ".join(f"checkpoint[{name[:40]!r}]" for name in inner[:3])
        raise _Unreadable("it is a training checkpoint, not a state dict", f"save {keys} with torch.save")
    if loaded.wrong is not None:
        raise _Unreadable(f"a name in it is not text but of type {loaded.wrong.__name__}")
    wrong = next((name for name, tensor in loaded.items() if type(tensor) is not _Tensor), None)
    if wrong is not None:
        raise _Unreadable(f"its entry {wrong[:40]!r} is not a tensor")


def _has_tensors_only(value: _Dict) -> bool:
    return value.wrong is None and all(type(tensor) is _Tensor for tensor in value.values())
