"""A run as a folder to share: no pickles, no code to execute, no paths of this machine."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from imgcap_jax.data.regions import has_ready_regions
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import settings_of
from imgcap_jax.files import disk_errors, read_json, write_text
from imgcap_jax.models.model import split_trained
from imgcap_jax.models.neighbours import NEIGHBOURS
from imgcap_jax.remote import shown, url_of
from imgcap_jax.run.confidence import CONFIDENCE
from imgcap_jax.run.extraction import uses_store
from imgcap_jax.run.folder import Run
from imgcap_jax.training.checkpoints import restore_best
from imgcap_jax.training.parameter_file import PARAMETERS, ParameterDtype, write_parameters
from imgcap_jax.training.self_critical import FREQUENCIES

CARD = "README.md"  # the model card
SCORES = "scores_*.json"


def export_run(run: Run, folder: Path, *, dtype: ParameterDtype = "float16") -> int:
    """Writes the best parameters of a run, and what is needed to use them, into a new folder.

    The folder can be used as a run: it can be evaluated, captioned with, and started from. It has no checkpoints, so
    its training cannot be resumed. It contains the experiment, the vocabulary, ``model.safetensors``, the scores of
    evaluations, and copies of the code of users, which are never executed. The frozen weights of a pretrained encoder
    are not in it: they are read from where the experiment says. If the experiment has ``retrieval``, it contains the
    index of the training photos with their captions.

    Args:
        run: a trained run.
        folder: must not exist, or must be empty.
        dtype: the type of the parameters in the file.

    Returns:
        The training step of the parameters.

    Raises:
        UserError: the run has no best parameters, the encoder reads a file of this machine, or the folder can't be
            written.
    """
    _check_encoder(run)
    run.check_weights()
    model = run.model(with_encoder=not uses_store(run.experiment), restored=True)
    params, step = restore_best(run.folder, split_trained(model)[1])
    with _new_folder(folder) as made:
        data = replace(run.experiment.data, data_dir=None)
        replace(run, folder=made, experiment=replace(run.experiment, data=data), init_from=None).save()
        write_parameters(made / PARAMETERS, params, step, dtype)
        kept = [FREQUENCIES] if run.experiment.decoding.rerank != "none" else []
        kept += [CONFIDENCE]
        kept += [NEIGHBOURS] if run.experiment.retrieval is not None else []
        for name in kept:
            if (run.folder / name).is_file():
                shutil.copyfile(run.folder / name, made / name)
        for path in sorted(run.folder.glob(SCORES)):
            write_text(made / path.name, json.dumps(_without_paths(read_json(path, "evaluate again")), indent=2) + "\n")
    return step


def _check_encoder(run: Run) -> None:
    if has_ready_regions(run.experiment.encoder):
        return
    for name, value in settings_of(run.experiment).items():
        if name.startswith("encoder.") and name.endswith("weights") and Path(str(value)).expanduser().is_file():
            raise UserError(
                f"{shown(run.folder)} reads {name} from {value}, which others do not have; train with weights that "
                f"have a published name"
            )


def _without_paths(scores: Any) -> Any:
    """The scores without the folder of the run that training started from."""
    if isinstance(scores, dict) and isinstance(scores.get("init_from"), str):
        return {**scores, "init_from": Path(scores["init_from"]).name}
    return scores


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when everything in it is written."""
    if url_of(folder) is not None:
        raise UserError(f"{shown(folder)}: runs are exported on this machine; give a local folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; give a new folder")
    with disk_errors(f"writing {folder}"):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        try:
            made.chmod(0o755)
            yield made
            os.replace(made, folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
