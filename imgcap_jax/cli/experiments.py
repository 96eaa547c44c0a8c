"""Experiments by name: a Python file, or one of those that come with the package."""

import importlib
import importlib.resources
from pathlib import Path

from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.user_code import load_code


def shipped_names() -> list[str]:
    """The names of the experiments that come with the package."""
    shipped = importlib.resources.files("imgcap_jax.experiments")
    names = (entry.name.removesuffix(".py") for entry in shipped.iterdir() if entry.name.endswith(".py"))
    return sorted(name for name in names if name != "__init__")


def find(name: str) -> Experiment:
    """The value ``experiment`` of a Python file, or of an experiment that comes with the package.

    Raises:
        UserError: there is no such file, running it fails, or it defines no experiment.
    """
    path = Path(name)
    if path.suffix == ".py" or path.exists():
        if not path.is_file():
            raise UserError(f"{path}: no such experiment file")
        module = load_code(path, with_folder=True)
    else:
        names = shipped_names()
        if name not in names:
            raise UserError(f"no experiment {name!r}; give a .py file or one of {', '.join(names)}")
        module = importlib.import_module(f"imgcap_jax.experiments.{name}")
    experiment = getattr(module, "experiment", None)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} defines no `experiment = Experiment(...)`")
    return experiment
