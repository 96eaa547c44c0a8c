"""The services that ``imgcap train --log`` names."""

import importlib.util
from collections.abc import Callable, Iterable

from imgcap_jax.errors import UserError
from imgcap_jax.training.writers.contract import WriterSettings
from imgcap_jax.training.writers.mlflow import Mlflow
from imgcap_jax.training.writers.trackio import Trackio
from imgcap_jax.training.writers.wandb import Wandb
from imgcap_jax.user_code import make_settings

_SERVICES: dict[str, Callable[[], WriterSettings]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def find_writers(names: Iterable[str]) -> dict[str, WriterSettings]:
    """The services with these names: wandb, trackio, mlflow, or ``module:Class`` of a class of your own.

    Args:
        names: each can be several names, separated by commas.

    Raises:
        UserError: there is no such service, its package is not installed, or the module of the class is not imported.
    """
    found: dict[str, WriterSettings] = {}
    for name in (part.strip() for text in names for part in text.split(",")):
        found[name] = _find(name)
    return found


def _find(name: str) -> WriterSettings:
    if name in _SERVICES:
        if not _is_installed(name):
            raise UserError(f"--log {name}: the package is not installed; pip install {name}")
        return _SERVICES[name]()
    if ":" not in name:
        known = ", ".join(_SERVICES)
        raise UserError(f"--log {name!r}: there is no such service; use {known}, or MODULE:CLASS with --code")
    settings: WriterSettings = make_settings(name, f"--log {name}")
    if not hasattr(settings, "open"):
        raise UserError(f"--log {name}: {type(settings).__name__} has no 'open'; docs/adding_parts.md has an example")
    return settings


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
