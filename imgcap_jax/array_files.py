"""Reads `.npy` and `.npz` files of any origin: no code in them is run, and damage costs neither memory nor time.

An array is read only after its size has been checked. NumPy's own reader allocates what a header asks for.
"""

import io
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

MAX_BYTES = 256 << 20
"""The arrays of a file may have this size, or that of the file. A compressed file could otherwise fill the memory."""


def read_arrays(
    path: Path, choose: Callable[[Sequence[str]], Sequence[str]] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Reads the arrays of an `.npz` file by name, or the array of an `.npy` file under the name "".

    Args:
        path: the file. Its content decides the format.
        choose: given the names of all arrays of an `.npz` file, returns those to read; None: all.

    Returns:
        Numbers, booleans or text, read-only.

    Raises:
        Exception: the file can't be read or is damaged. Use it within `files.reading`.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        if not zipped:
            return {"": _array(file.read(size))}
        with zipfile.ZipFile(file) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise ValueError("two arrays have the same name")
            chosen = [members[name] for name in (choose(list(members)) if choose else members)]
            total = sum(member.file_size for member in chosen)
            if total > max(size, MAX_BYTES):
                raise ValueError(f"{total / 1e6:,.0f} MB of arrays in {size / 1e6:,.1f} MB")
            arrays = {}
            for member in chosen:
                with archive.open(member) as stream:
                    # Without the size, zipfile decompresses everything before it cuts the result.
                    arrays[member.filename.removesuffix(".npy")] = _array(stream.read(member.file_size))
            return arrays


def _array(data: bytes) -> npt.NDArray[Any]:
    stream = io.BytesIO(data)
    shape, columns_first, dtype = read_header(stream)
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError("its size does not match its header")
    values = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return values.reshape(shape, order="F" if columns_first else "C")


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the header of an `.npy` file: the shape, whether the first axis varies fastest, and the dtype.

    Raises:
        ValueError: the header is damaged, or the dtype is not of numbers, booleans or text.
    """
    try:
        match np.lib.format.read_magic(file):
            case (1, 0):
                shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
            case (2, 0):
                shape, columns_first, dtype = np.lib.format.read_array_header_2_0(file)
            case version:
                raise ValueError(f"version {version} of the .npy format")
    except (MemoryError, RecursionError, SyntaxError, TypeError, OverflowError) as error:
        raise ValueError("its header is damaged") from error
    if dtype.kind not in "biufcU" or not dtype.itemsize or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("its header is damaged, or it does not contain numbers")
    return shape, columns_first, dtype
