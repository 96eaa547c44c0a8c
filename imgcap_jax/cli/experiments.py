"""Experiments and studies by name: a Python file, or one of those that come with the package."""

import importlib
import importlib.resources
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.user_code import load_code

_EXPERIMENTS, _STUDIES = "imgcap_jax.experiments", "imgcap_jax.experiments.studies"


def shipped_names() -> list[str]:
    """The names of the experiments that come with the package."""
    return _names(_EXPERIMENTS)


def find(name: str) -> Experiment:
    """The value ``experiment`` of a Python file, or of an experiment that comes with the package.

    Raises:
        UserError: there is no such file, running it fails, or it defines no experiment.
    """
    module = _module(name, _EXPERIMENTS, "experiment", "study")
    experiment = getattr(module, "experiment", None)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{name} defines no `experiment = Experiment(...)`")
    return experiment


def find_study(name: str) -> Any:
    """The value ``study``, a ``Study``, of a Python file, or of a study that comes with the package.

    Raises:
        UserError: there is no such file, running it fails, or it defines no study.
    """
    from imgcap_jax.study import Study

    study = getattr(_module(name, _STUDIES, "study", "experiment"), "study", None)
    if not isinstance(study, Study):
        raise UserError(f"{name} defines no `study = Study(...)`")
    return study


def _module(name: str, package: str, kind: str, other: str) -> Any:
    path = Path(name)
    if path.suffix == ".py" or path.exists():
        if not path.is_file():
            raise UserError(f"{path}: no such {kind} file")
        return load_code(path, with_folder=True)
    names = _names(package)
    if name in names:
        return importlib.import_module(f"{package}.{name}")
    if name in _names(_STUDIES if package == _EXPERIMENTS else _EXPERIMENTS):
        command = "ablate" if other == "study" else "train"
        raise UserError(
            f"{name} is no {kind} but {'a study' if other == 'study' else 'an experiment'}: imgcap {command} {name}"
        )
    raise UserError(f"no {kind} {name!r}; give a .py file or one of {', '.join(names)}")


def _names(package: str) -> list[str]:
    names = (entry.name for entry in importlib.resources.files(package).iterdir())
    return sorted(name.removesuffix(".py") for name in names if name.endswith(".py") and name != "__init__.py")
