"""The commands to give next, as they can be pasted into a shell."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from imgcap_jax.data.regions import has_ready_regions
from imgcap_jax.experiment import Experiment, classes
from imgcap_jax.remote import shown
from imgcap_jax.user_code import source_files


def after_smoke(given: Sequence[str]) -> str:
    """The training command that a smoke run stands for. given: the arguments of ``imgcap``."""
    return shlex.join(["imgcap", *(argument for argument in given if argument != "--smoke")])


def after_training(experiment: Experiment, folder: Path, *, code: Sequence[str], cache: Path | None) -> list[str]:
    """The commands that evaluate a run, caption photos with it, and write a page about it.

    Args:
        experiment: what was trained.
        folder: the run's folder.
        code: the files and modules that the user gave for training.
        cache: the folder of features that the user gave; None: the default one.
    """
    needed = [word for name in _code(experiment, code) for word in ("--code", name)]
    kept = [] if cache is None else ["--cache", shown(cache)]
    beam = str(experiment.decoding.beam if experiment.decoding.beam > 1 else 3)
    evaluate = ["imgcap", "evaluate", shown(folder), "--split", "val", "--beam", beam, *needed, *kept]
    caption = ["imgcap", "caption", "PHOTO", "--run", shown(folder), *needed]
    report = ["imgcap", "report", shown(folder), *needed, *kept]
    photos = [] if has_ready_regions(experiment.encoder) else [caption]
    return [shlex.join(command) for command in (evaluate, *photos, report)]


def _code(experiment: Experiment, given: Sequence[str]) -> list[str]:
    """What ``--code`` has to name: what the user gave, and other files that define a class of the experiment."""
    here = Path.cwd()
    named = {Path(name).resolve() for name in given if name.endswith(".py")}
    modules = {f"{name.rpartition('.')[2]}.py" for name in given if not name.endswith(".py")}
    others = [
        path
        for name, path in source_files(classes(experiment)).items()
        if path.resolve() not in named and name not in modules
    ]
    return [*map(str, given), *(os.path.relpath(path) if path.is_relative_to(here) else str(path) for path in others)]
