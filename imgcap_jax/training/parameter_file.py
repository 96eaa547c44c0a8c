"""``model.safetensors``: the parameters of a run in one file, to share. Reading it executes no code.

A folder with this file in place of checkpoints can be evaluated, captioned with, and started from (``--init-from``).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from imgcap_jax.errors import UserError
from imgcap_jax.files import disk_errors, reading, replacing
from imgcap_jax.remote import shown

PARAMETERS = "model.safetensors"  # file in the folder of an exported run
_FORMAT = 1
_ABOUT = "imgcap_jax"  # one entry of the metadata: the library writes several in random order
_ADVICE = "export the run again, or download it again"

ParameterDtype = Literal["float16", "bfloat16", "float32"]


def write_parameters(path: Path, params: Any, step: int, dtype: ParameterDtype) -> None:
    """Writes a tree of parameters.

    Args:
        path: the file.
        params: the parameters, named by their places in the model, as in "decoder.embedding.kernel".
        step: the training step that they are from.
        dtype: the type that they are rounded to.

    Raises:
        UserError: a parameter is too large for the type, or the file can't be written.
    """
    arrays = {}
    for name, leaf in named(params).items():
        values = np.asarray(leaf, np.float32)
        with np.errstate(over="ignore"):
            rounded = values.astype(jnp.dtype(dtype))
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise UserError(f"{name} does not fit {dtype}; use --dtype float32")
        arrays[name] = rounded
    write_arrays(path, arrays, {_ABOUT: json.dumps({"format": _FORMAT, "step": step})})


def write_arrays(path: Path, arrays: Mapping[str, Any], about: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file. about: its metadata. Raises UserError if the file can't be written."""
    from safetensors.numpy import save_file

    held = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    with disk_errors(f"writing {path}"), replacing(path) as temporary:
        save_file(held, temporary, dict(about) if about else None)
        temporary.chmod(0o644)  # the library makes it private


def read_parameters(path: Path, template: Any, place: Callable[[np.ndarray, Any], Any]) -> tuple[Any, int]:
    """The parameters in a file, as float32, and the training step that they are from.

    Args:
        path: the file.
        template: arrays or ``jax.ShapeDtypeStruct``, of which the names and shapes must be those in the file.
        place: puts an array where a leaf of ``template`` is.

    Raises:
        UserError: the file is damaged, or it belongs to another model.
    """
    import safetensors

    wanted = named(template)
    with reading(path, _ADVICE), safetensors.safe_open(path, framework="np") as file:
        about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
        if about.get("format") != _FORMAT:
            raise ValueError(f"its format is {about.get('format', 'not given')!r:.40}, not {_FORMAT!r}")
        step = int(about["step"])
        names = set(file.keys())
        for name in [*wanted, *sorted(names)]:
            ours = list(wanted[name].shape) if name in wanted else "missing"
            theirs = file.get_slice(name).get_shape() if name in names else "missing"
            if ours != theirs:
                raise UserError(
                    f"{shown(path)}: {name} is {theirs} in the file and {ours} in the model of its folder; {_ADVICE}"
                )
        found = {name: np.asarray(file.get_tensor(name), np.float32) for name in wanted}
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise ValueError(f"{name} has values that are not finite")
    leaves = [place(found[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), step


def dtype_of(path: Path) -> ParameterDtype:
    """The type of the parameters in a file. Raises UserError if the file is damaged."""
    import safetensors

    types: dict[str, ParameterDtype] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    with reading(path, _ADVICE), safetensors.safe_open(path, framework="np") as file:
        return types[file.get_slice(next(iter(file.keys()))).get_dtype()]


def named(tree: Any) -> dict[str, Any]:
    """The leaves by their places in the model, in the order of the tree."""
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in paths}
