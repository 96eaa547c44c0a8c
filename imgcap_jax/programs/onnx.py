"""A run as an ONNX file, encoder and search in one graph, by jax2onnx. ``loader.py`` reads it with onnxruntime."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.files import check_writable, disk_errors, reason, replacing
from imgcap_jax.programs.common import check_exportable, loaded
from imgcap_jax.run.folder import Run
from imgcap_jax.run.generation import caption_function

SUFFIX = ".onnx"
_INSTALL = "pip install --no-deps jax2onnx && pip install onnx onnx-ir"


def export_onnx(run: Run, path: Path, decoding: Decoding) -> None:
    """Writes the file: images uint8 [1,s,s,3] -> tokens int32 [1,K,T], log-probabilities float32 [1,K].

    Nothing else in the process may trace JAX functions meanwhile: those that depend on the platform would be wrong.

    The words and the size of the images are in its metadata, under ``imgcap_jax``.

    Args:
        run: a trained run, or an exported one.
        path: the file.
        decoding: the search settings, which are part of the graph.

    Raises:
        UserError: jax2onnx is not installed or cannot express the run, or the file can't be written.
    """
    check_exportable(run, decoding)
    if decoding.samples:
        raise UserError("samples need random numbers, which the ONNX file does not have; leave --decode.samples out")
    try:
        with _quiet():
            import jax2onnx
    except ImportError as error:
        raise UserError(
            f"ONNX needs jax2onnx, which asks for an older Orbax than imgcap_jax but does not need it; run: {_INSTALL}"
        ) from error
    check_writable(path)
    graph, params, frozen = loaded(run, run.folder)
    data = run.experiment.data
    about = {
        "words": list(run.vocabulary.words),
        "image_size": data.image_size,
        "resize": data.resize,
        "decoding": decoding.title,
        "returned": decoding.returned,
    }
    with _one_platform():
        captions = caption_function([graph], decoding, run.vocabulary)

        def program(images: Any) -> Any:
            found = captions([params], [frozen], [{"image": images}])
            return found.tokens, found.log_prob

        image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), np.uint8)
        try:
            with _quiet():
                model = jax2onnx.to_onnx(program, [image], model_name="imgcap_jax")
        except Exception as error:  # of many types
            raise UserError(
                f"jax2onnx cannot express this run ({reason(error)}); export it to {path.stem}.imgcap"
            ) from error
    entry = model.metadata_props.add()
    entry.key, entry.value = "imgcap_jax", json.dumps(about)
    with disk_errors(f"writing {path}"), replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses what jax2onnx says about libraries that are not installed and about deprecated calls of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _one_platform() -> Iterator[None]:
    """Traces the default branch only of code that depends on the platform, which ONNX does not have."""
    original = jax.lax.platform_dependent

    def default_branch(
        *operands: Any, default: Callable[..., Any] | None = None, **branches: Callable[..., Any]
    ) -> Any:
        return (default or branches["cpu"])(*operands)

    jax.clear_caches()  # functions that were traced before
    jax.lax.platform_dependent = default_branch
    try:
        yield
    finally:
        jax.lax.platform_dependent = original
        jax.clear_caches()
