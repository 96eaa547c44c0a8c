"""A run as a folder to share: no pickles, no code to execute, no paths of this machine."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, to_json
from imgcap_jax.files import new_folder, read_json, reading, write_text
from imgcap_jax.models.model import split_trained
from imgcap_jax.models.neighbours import NEIGHBOURS
from imgcap_jax.remote import shown, url_of
from imgcap_jax.run.confidence import Confidence
from imgcap_jax.run.extraction import uses_store
from imgcap_jax.run.folder import Run
from imgcap_jax.training.checkpoints import restore_best
from imgcap_jax.training.parameter_file import PARAMETERS, ParameterDtype, write_parameters
from imgcap_jax.training.self_critical import FREQUENCIES

CARD = "README.md"  # the model card
SCORES = "scores_*.json"


def export_run(
    run: Run, folder: Path, *, dtype: ParameterDtype = "float16", card: Callable[[Run], str] = lambda run: ""
) -> int:
    """Writes the best parameters of a run, and what is needed to use them, into a new folder.

    The folder can be used as a run: it can be evaluated, captioned with, and started from. It has no checkpoints, so
    its training cannot be resumed. It contains the experiment, the vocabulary, ``model.safetensors``, the scores of
    evaluations, and copies of the code of users, which are never executed. The frozen weights of a pretrained encoder
    are not in it: they are read from where the experiment says. If the model or its search compares photos, the folder
    contains the index of the training photos with their captions.

    Args:
        run: a trained run.
        folder: must not exist, or must be empty.
        dtype: the type of the parameters in the file.
        card: makes the model card of the exported run.

    Returns:
        The training step of the parameters.

    Raises:
        UserError: the run has no best parameters, its settings have a path of this machine, a file of it is a link, or
            the folder can't be written.
    """
    run.check_weights()
    model = run.model(with_encoder=not uses_store(run.experiment), restored=True)
    params, step = restore_best(run.folder, split_trained(model)[1])
    decoding = run.experiment.decoding
    needed = [FREQUENCIES] if decoding.rerank != "none" else []
    needed += [NEIGHBOURS] if run.experiment.retrieval is not None or decoding.mbr_neighbours else []
    for name in needed:
        if not (run.folder / name).is_file():
            raise UserError(f"{shown(run.folder / name)} is missing; evaluate the run, which writes it")
    if url_of(folder) is not None:
        raise UserError(f"{shown(folder)}: runs are exported on this machine; give a local folder")
    with new_folder(folder) as made:
        replace(run, folder=made, experiment=_without_paths(run), init_from=None).save()
        write_parameters(made / PARAMETERS, params, step, dtype)
        if FREQUENCIES in needed:
            shutil.copyfile(regular(run.folder / FREQUENCIES), made / FREQUENCIES)
        if NEIGHBOURS in needed:
            shutil.copyfile(regular(run.folder / NEIGHBOURS), made / NEIGHBOURS)
        confidence = Confidence.load(run.folder)
        if confidence is not None:
            confidence.save(made)
        for path in sorted(run.folder.glob(SCORES)):
            write_text(made / path.name, json.dumps(_shared_scores(regular(path)), indent=2) + "\n")
        write_text(made / CARD, card(replace(run, folder=made)))
    return step


def regular(path: Path) -> Path:
    """The path of a file of a run. Raises UserError for a link, which a stranger can point at a private file."""
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is a link or not a file; it is not exported: delete it")
    return path


def _without_paths(run: Run) -> Experiment:
    """The experiment without paths of this machine that do not change captions. Raises UserError if others remain."""
    experiment = run.experiment
    changed: dict[str, Any] = {"data": replace(experiment.data, data_dir=None)}
    teachers = getattr(experiment.objective, "teachers", ())
    if teachers:
        changed["objective"] = replace(experiment.objective, teachers=tuple(Path(name).name for name in teachers))  # type: ignore[type-var]
    if isinstance(experiment.encoder, RegionFiles):
        changed["encoder"] = replace(experiment.encoder, folder=None)
    experiment = replace(experiment, **changed)
    for name, text in _texts(json.loads(to_json(experiment)), ""):
        if Path(text).expanduser().is_absolute() or (name.endswith("weights") and Path(text).is_file()):
            raise UserError(
                f"{shown(run.folder)} has the path {text} in {name}, which others do not have; use weights that have a "
                f"published name"
            )
    return experiment


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """All texts of an experiment, each with its name."""
    if isinstance(value, str):
        yield name, value
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _texts(item, f"{name}.{key}" if name else str(key))


def _shared_scores(path: Path) -> dict[str, Any]:
    """The scores of an evaluation, without the folder of the run that training started from."""
    advice = "evaluate the run again"
    found = read_json(path, advice)
    with reading(path, advice):
        scores = {name: float(value) for name, value in found["scores"].items()}
        start = found.get("init_from")
        kept = {name: found[name] for name in found if name not in ("scores", "runs")}
        return {**kept, "init_from": None if start is None else Path(start).name, "scores": scores}
