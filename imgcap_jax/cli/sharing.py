"""Runs for others: ``imgcap calibrate``, ``imgcap export``, ``imgcap push`` and ``imgcap pull``."""

import argparse
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.remote import shown


def calibrate(run: Any, decoding: Any, cache: Path, options: argparse.Namespace) -> int:
    """Fits the confidence and prints how good it is on captions that it was not fitted to.

    Raises:
        UserError: see ``run.confidence.calibrate`` and ``run.evaluation.sweep``.
    """
    from imgcap_jax.run.confidence import CONFIDENCE, FOLDS
    from imgcap_jax.run.confidence import calibrate as fit
    from imgcap_jax.run.evaluation import sweep
    from imgcap_jax.run.mirror import push as mirror

    if decoding.samples or decoding.rerank != "none":
        raise UserError("confidence is that of the captions of a search; leave out samples and rerank")
    if options.split == "train":
        raise UserError("confidence that is fitted to training captions is too high; choose another --split")
    evaluations = [
        next(sweep([run], options.split, cache=cache, dataset=dataset, decodings=[decoding], write=False))
        for dataset in options.dataset or [None]
    ]
    found = fit(evaluations)
    found.save(run.folder)
    mirror(run.folder, [CONFIDENCE])
    print(f"right: CIDEr-D of at least {100 * found.threshold:.0f}; measured by {FOLDS}-fold cross-validation")
    for one in found.quality:
        print(
            f"{one.dataset} {one.split}: {one.images:,} captions, {one.right:.0%} right, AUROC {one.auroc:.3f}, "
            f"calibration error {one.calibration_error:.3f}"
        )
        for mean, share in one.bins:
            print(f"  confidence {mean:.2f}: {share:.0%} right")
    print(f"written: {shown(run.folder / CONFIDENCE)}")
    return 0


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder of a run, or that of the run in a program's file."""
    from imgcap_jax.programs.stablehlo import SUFFIX, extract_run

    if path.suffix != SUFFIX or not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / path.stem
        folder.mkdir()
        extract_run(path, folder)
        yield folder


def export(run: Any, decoding: Any, options: argparse.Namespace) -> int:
    """Writes the folder with a model card, or the file with the program.

    Raises:
        UserError: see ``export_run``, ``export_program`` and ``export_onnx``.
    """
    from imgcap_jax.programs.common import LOADER
    from imgcap_jax.programs.onnx import SUFFIX as ONNX
    from imgcap_jax.programs.onnx import export_onnx
    from imgcap_jax.programs.stablehlo import SUFFIX, export_program

    output: Path = options.output
    if output.suffix in (SUFFIX, ONNX) and os.path.lexists(output):
        raise UserError(f"{output} exists; give a new file")
    if output.suffix == SUFFIX:
        export_program(run, output, decoding, dtype=_dtype(run, options))
        print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {decoding.title}")
        print(
            f"next: unzip {shlex.quote(str(output))} loader.py; python loader.py {shlex.quote(str(output))} photo.jpg"
        )
        return 0
    if output.suffix == ONNX:
        if options.dtype is not None:
            raise UserError("an ONNX file contains float32; leave out --dtype")
        export_onnx(run, output, decoding)
        print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {decoding.title}")
        print(f"next: {shlex.join(['python', str(LOADER), str(output), 'photo.jpg'])}")
        return 0
    if decoding != run.experiment.decoding:
        raise UserError(
            f"decoding options are for a program; give a file that ends in {SUFFIX} or {ONNX}, or leave them out"
        )
    _write(run, output, _dtype(run, options))
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:.1f} MB; edit README.md, its model card, before you share it")
    print(f"next: {shlex.join(['imgcap', 'push', str(output), 'USER/NAME'])}")
    return 0


def push(run: Any, options: argparse.Namespace) -> int:
    """Exports the run and puts it on the Hub. The card of an exported run is kept.

    Raises:
        UserError: see ``export_run`` and ``hub.upload``.
    """
    from imgcap_jax.run.exporting import CARD, regular
    from imgcap_jax.run.hub import split_name, upload
    from imgcap_jax.training.parameter_file import PARAMETERS

    name, revision = split_name(options.name)
    if revision is not None:
        raise UserError(f"{options.name}: a revision is made by the push; leave out @{revision}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name.rpartition("/")[2]
        _write(run, folder, _dtype(run, options))
        if (run.folder / PARAMETERS).is_file() and (run.folder / CARD).is_file():
            shutil.copyfile(regular(run.folder / CARD), folder / CARD)
        where = upload(folder, name, private=options.private, message=options.message)
    print(f"{where}")
    print(f"next: {shlex.join(['imgcap', 'caption', 'photo.jpg', '--run', f'hf://{name}'])}")
    return 0


def pull(options: argparse.Namespace) -> int:
    """Copies a run from the Hub into a new folder.

    Raises:
        UserError: the folder exists; see also ``hub.download``.
    """
    from imgcap_jax.run.folder import RUNS, Run
    from imgcap_jax.run.hub import download, split_name

    name, revision = split_name(options.name)
    folder = options.folder or RUNS / name.rpartition("/")[2]
    download(name, revision, folder)
    Run.load(folder)
    print(f"{folder}: hf://{options.name.removeprefix('hf://')}")
    print(f"next: {shlex.join(['imgcap', 'caption', 'photo.jpg', '--run', str(folder)])}")
    return 0


def _dtype(run: Any, options: argparse.Namespace) -> Any:
    """The type that the user chose, or that of the parameters of an exported run, or float16."""
    from imgcap_jax.training.parameter_file import PARAMETERS, dtype_of

    exported = run.folder / PARAMETERS
    return options.dtype or (dtype_of(exported) if exported.is_file() else "float16")


def _write(run: Any, folder: Path, dtype: Any) -> None:
    from imgcap_jax.report.model_card import model_card
    from imgcap_jax.run.exporting import export_run

    export_run(run, folder, dtype=dtype, card=lambda exported: model_card(exported, folder.resolve().name))
