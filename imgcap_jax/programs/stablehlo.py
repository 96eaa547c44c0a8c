"""A run as one file with a compiled program (StableHLO), by ``jax.export``; ``loader.py`` reads it.

The file is a zip archive: an exported run (see ``run.exporting``), and

- program.stablehlo: (arrays, images uint8 [B,s,s,3]) -> (tokens int32 [B,K,T], log-probabilities float32 [B,K]) for
  any B, on CPUs, NVIDIA GPUs and TPUs, with the search in it;
- frozen.safetensors: the frozen arrays of the model;
- program.json: the order of the arrays, and how photos become images;
- loader.py.
"""

import fnmatch
import json
import shutil
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.files import check_writable, disk_errors, reading, replacing
from imgcap_jax.programs.common import LOADER, check_exportable, loaded
from imgcap_jax.run.exporting import export_run
from imgcap_jax.run.folder import Run
from imgcap_jax.run.generation import caption_function
from imgcap_jax.run.hub import FILES
from imgcap_jax.training.parameter_file import PARAMETERS, ParameterDtype, named, write_arrays

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".imgcap"
_PROGRAM, _FROZEN, _ABOUT = "program.stablehlo", "frozen.safetensors", "program.json"


def export_program(run: Run, path: Path, decoding: Decoding, *, dtype: ParameterDtype = "float16") -> None:
    """Writes the file.

    Args:
        run: a trained run, or an exported one.
        path: the file.
        decoding: the search settings, which are part of the program.
        dtype: the type of the trained parameters in the file. Frozen arrays are float32.

    Raises:
        UserError: jax.export cannot express the run, flatbuffers is not installed, or the file can't be written.
    """
    check_exportable(run, decoding)
    _check_library()
    check_writable(path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        # With the search of the program, so that it is also that of the folder, and of a program that is written again.
        export_run(replace(run, experiment=replace(run.experiment, decoding=decoding)), folder, dtype=dtype)
        exported = Run.load(folder)
        graph, params, frozen = loaded(exported, folder)
        arrays = {**named(params), **{f"frozen.{name}": leaf for name, leaf in named(frozen).items()}}
        structure = jax.tree.structure((params, frozen))
        captions = caption_function([graph], decoding, exported.vocabulary)

        def program(leaves: list[Any], images: Any) -> Any:
            own, rest = jax.tree.unflatten(structure, [_as_float32(leaf) for leaf in leaves])
            found = captions([own], [rest], [{"image": images}])
            return found.tokens, found.log_prob

        side = exported.experiment.data.image_size
        (count,) = jax.export.symbolic_shape("b")
        stored = [
            jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if not name.startswith("frozen.") else leaf.dtype)
            for name, leaf in arrays.items()
        ]
        images = jax.ShapeDtypeStruct((count, side, side, 3), np.uint8)
        made = jax.export.export(jax.jit(program), platforms=PLATFORMS)(stored, images)
        about = {
            "inputs": list(arrays),
            "image_size": side,
            "resize": exported.experiment.data.resize,
            "decoding": decoding.title,
            "returned": decoding.returned,
            "platforms": list(made.platforms),
            "calling_convention_version": made.calling_convention_version,
            "jax": jax.__version__,
        }
        (folder / _PROGRAM).write_bytes(made.serialize())
        write_arrays(folder / _FROZEN, {name: leaf for name, leaf in arrays.items() if name.startswith("frozen.")})
        (folder / _ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
        shutil.copyfile(LOADER, folder / LOADER.name)
        # Parameters hardly become smaller, and a file that is not compressed can be read in place.
        with disk_errors(f"writing {path}"), replacing(path) as archive, zipfile.ZipFile(archive, "w") as file:
            for one in sorted(folder.rglob("*")):
                if one.is_file():
                    file.write(one, one.relative_to(folder).as_posix())


def extract_run(path: Path, folder: Path) -> None:
    """Extracts the exported run of a program's file into an empty folder.

    Raises:
        UserError: the file is damaged, or it is not one of these.
    """
    with reading(path, "give a file that imgcap export wrote"), zipfile.ZipFile(path) as file:
        names = [name for name in file.namelist() if any(fnmatch.fnmatch(name, pattern) for pattern in FILES)]
        if PARAMETERS not in names:
            raise ValueError(f"it has no {PARAMETERS}")
        for name in names:
            parts = name.split("/")
            if len(parts) > 2 or any(part in ("", ".", "..") for part in parts) or "\\" in name:
                raise ValueError(f"it has the name {name!r:.80}")
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(file.read(name))


def _as_float32(leaf: Any) -> Any:
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _check_library() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError("jax.export needs flatbuffers; run: pip install flatbuffers") from error
