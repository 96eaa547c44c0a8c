"""Experiment files and the options that override their fields."""

import contextlib
import difflib
import importlib.resources
import io
import re
import runpy
from collections.abc import Sequence
from pathlib import Path

import tyro

from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment

_CONFIG = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)


def find(name: str) -> Experiment:
    """The ``experiment`` of a Python file, or of one of the experiments that come with the package.

    Raises:
        UserError: no such file, or it defines no experiment.
    """
    path = Path(name)
    if path.suffix != ".py" and not path.exists():
        shipped = importlib.resources.files("imgcap_jax.experiments")
        names = sorted(entry.name.removesuffix(".py") for entry in shipped.iterdir() if entry.name.endswith(".py"))
        names.remove("__init__")
        if name not in names:
            raise UserError(f"no experiment {name!r}; give a .py file or one of {', '.join(names)}")
        with importlib.resources.as_file(shipped / f"{name}.py") as file:
            return _read(file)
    if not path.is_file():
        raise UserError(f"{path}: no such experiment file")
    return _read(path)


def _read(path: Path) -> Experiment:
    try:
        experiment = runpy.run_path(str(path)).get("experiment")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}; mend the file") from error
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} defines no `experiment = Experiment(...)`")
    return experiment


def override(experiment: Experiment, arguments: Sequence[str]) -> Experiment:
    """Replaces fields by command-line options such as ``--decoder.hidden-size 768``.

    Raises:
        UserError: an option that is no field (with the nearest one), or a value of the wrong type.
    """
    known = _options(experiment)
    for argument in arguments:
        option = argument.split("=", 1)[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the fields"
            raise UserError(f"unknown option {argument.split('=', 1)[0]}{hint}")
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(messages):
            return tyro.cli(Experiment, default=experiment, args=list(arguments), config=_CONFIG)
    except SystemExit as error:
        # Tyro frames its message: title, rule, reason, rule, pointers to help.
        plain = re.sub("[─━│╭╮╰╯]+", "-", messages.getvalue())
        parts = [" ".join(part.split()) for part in re.split("-{5,}", plain)]
        reason = parts[1] if len(parts) > 1 else " ".join(parts)
        raise UserError(f"{reason}; --help lists the fields") from error


def overrides_help(experiment: Experiment) -> str:
    """The list of an experiment's fields with their present values."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(Experiment, default=experiment, args=["--help"], config=_CONFIG, prog="imgcap train EXPERIMENT")
    return text.getvalue()


def _options(experiment: Experiment) -> list[str]:
    names: list[str] = []

    def walk(value: object, prefix: str) -> None:
        for name in value.__dataclass_fields__:  # type: ignore[attr-defined]
            item = getattr(value, name)
            full = f"{prefix}{name.replace('_', '-')}"
            if hasattr(item, "__dataclass_fields__"):
                walk(item, full + ".")
            else:
                names.append(full)

    walk(experiment, "--")
    return names
