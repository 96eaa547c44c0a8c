"""Decoding options, ``--decode.FIELD VALUE``, and sweeps over several values of them."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import get_type_hints

from imgcap_jax.cli.options import option_names, override, unknown_option
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError

PREFIX = "decode"


def split_options(arguments: Sequence[str], *, sweep: bool) -> tuple[list[str], list[str]]:
    """Splits a command line into decoding options, as ``--decode.FIELD=VALUE``, and the other arguments.

    An option takes the next argument. In a sweep, an option other than a text also takes all further arguments that are
    values of its type; a text is swept by repeating its option.

    Returns:
        (other arguments, decoding options).
    """
    others: list[str] = []
    ours: list[str] = []
    option, taken = "", 0
    for argument in arguments:
        if argument.startswith("-") and not re.match(r"-\.?[0-9]", argument):
            option, taken = "", 0
            if not argument.startswith(f"--{PREFIX}."):
                others.append(argument)
            elif "=" in argument:
                ours.append(argument)
            else:
                option = argument
                ours.append(argument)
        elif option and (not taken or (sweep and _fits(option, argument))):
            if not taken:
                ours.pop()
            ours.append(f"{option}={argument}")
            taken += 1
        else:
            others.append(argument)
    return others, ours


def combinations(decoding: Decoding, options: Sequence[str]) -> tuple[list[Decoding], list[str]]:
    """All combinations of options such as ``--decode.beam=1 --decode.beam=3 --decode.prefix=``.

    Args:
        decoding: the values of fields that no option names.
        options: each with a value; several values of one option make a sweep. If no option sets ``beam``, it is raised
            to ``n_best``.

    Returns:
        The settings, and the names of the fields with several values, in the order in which they were given.

    Raises:
        UserError: an option that does not exist, a value of the wrong type or given twice, or settings that do not go
            together.
    """
    known = option_names(decoding, prefix=PREFIX)
    unchecked = _Unchecked(**{item.name: getattr(decoding, item.name) for item in fields(decoding)})
    values: dict[str, dict[Decoding, str]] = {}  # option -> the settings that it makes -> argument
    for argument in options:
        option, given, _ = argument.partition("=")
        option = option.replace("_", "-")
        if option not in known:
            raise unknown_option(option, known)
        if not given:
            raise UserError(f"{option} has no value; give one, or several for a sweep")
        made = override(unchecked, [argument], prefix=PREFIX)
        if made in values.setdefault(option, {}):
            raise UserError(f"{argument.replace('=', ' ', 1)} is given twice")
        values[option][made] = argument
    settings = []
    for combination in itertools.product(*(given.values() for given in values.values())):
        beams = [] if f"--{PREFIX}.beam" in values else _needed_beam(override(unchecked, combination, prefix=PREFIX))
        settings.append(override(decoding, [*combination, *beams], prefix=PREFIX))
    return settings, [option.removeprefix(f"--{PREFIX}.") for option, given in values.items() if len(given) > 1]


def _needed_beam(decoding: Decoding) -> list[str]:
    """The option that raises ``beam`` to ``n_best``; none if there are enough beams, or captions are sampled."""
    if decoding.samples or decoding.n_best <= decoding.beam:
        return []
    groups = max(1, decoding.groups)
    return [f"--{PREFIX}.beam={-(-decoding.n_best // groups) * groups}"]


class _Unchecked(Decoding):
    """Single values are read without the checks of whole settings."""

    def __post_init__(self) -> None:
        pass


def _fits(option: str, value: str) -> bool:
    """Whether an argument can be a value of an option."""
    if option.replace("_", "-") not in option_names(Decoding(), prefix=PREFIX):  # a field of a rule of the run
        return re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?|true|false", value, flags=re.IGNORECASE) is not None
    if get_type_hints(Decoding)[option.removeprefix(f"--{PREFIX}.").replace("-", "_")] in (str, tuple[str, ...]):
        return False
    try:
        override(_Unchecked(), [f"{option}={value}"], prefix=PREFIX)
    except UserError:
        return False
    return True
