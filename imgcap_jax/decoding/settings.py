"""Decoding: the settings of a search, and their options on the command line. Free of JAX, for --help comes at once."""

import difflib
import inspect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from imgcap_jax.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """How captions are searched for, or drawn."""

    beam: int = 3
    """Beams; 1 is greedy."""
    length_norm: float = 0.7
    """Captions are ranked by log-probability / penalty ** length_norm; 0: no penalty, 1: with power, the average."""
    length_penalty: Literal["power", "gnmt"] = "power"
    """power: the length; gnmt: (5 + length) / 6 (Wu et al. 2016)."""
    n_best: int = 1
    """Captions kept of a search, which ends sooner for fewer."""
    max_words: int = 20
    """A caption that isn't finished then is cut."""
    min_words: int = 0
    """A caption doesn't end before."""
    suppress_unk: bool = True
    """Never write <unk>."""
    no_repeat_ngram: int = 0
    """No n-gram of this size twice in a caption (3: trigram blocking); 0: off."""
    forbid_bad_endings: bool = False
    """No caption ends on "a", "of", "with" and the like."""
    prefix: str = ""
    """Every caption begins with these words."""
    must: tuple[str, ...] = ()
    """Words that have to occur, each with forms that will do as well, as in "dog|dogs" (constrained beam search)."""
    groups: int = 1
    """Groups of beams that avoid each other's words (diverse beam search); beam has to be divisible by them."""
    diversity: float = 0.5
    """By how much a word is lowered for each time that an earlier group has just taken it."""
    samples: int = 0
    """Captions drawn an image instead of searched for; 0: searched for."""
    temperature: float = 1.0
    """Of samples: below 1 likelier words, above 1 rarer ones."""
    top_k: int = 0
    """Of samples: only the k likeliest words; 0: all."""
    top_p: float = 1.0
    """Of samples: only the likeliest words that together reach p; 1: all."""
    seed: int = 0
    """Of samples; what is drawn for an image depends on this and the image's place."""

    def plain(self, beam: int) -> "Decoding":
        """The same lengths and rules, by plain beam search."""
        others = ("n_best", "groups", "diversity", "must", "samples", "temperature", "top_k", "top_p", "seed")
        return replace(self, beam=beam, **{name: _DEFAULTS[name] for name in others})

    def __post_init__(self) -> None:
        lowest = {
            "beam": 1,
            "max_words": 1,
            "length_norm": 0,
            "no_repeat_ngram": 0,
            "min_words": 0,
            "groups": 1,
            "n_best": 1,
        }
        for name, least in {**lowest, "diversity": 0, "samples": 0, "top_k": 0}.items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; give {least} or more")
        if self.length_penalty not in ("power", "gnmt"):
            raise UserError(f"length_penalty is {self.length_penalty!r}; give power or gnmt")
        if self.min_words > self.max_words:
            raise UserError(f"min_words is {self.min_words}, but max_words is {self.max_words}; give fewer")
        if self.n_best > self.beam and not self.samples:
            raise UserError(f"n_best is {self.n_best}, but beam is {self.beam}; give fewer, or more beams")
        if self.beam % self.groups:
            raise UserError(f"beam is {self.beam}; give a multiple of groups ({self.groups})")
        if not self.temperature >= 0.01 or not 0 < self.top_p <= 1:
            raise UserError("temperature is at least 0.01, top_p above 0 and at most 1")
        constrained, drawn = bool(self.must), self.samples > 0
        if constrained + drawn + (self.groups > 1) > 1:
            raise UserError("must, groups above 1 and samples are three kinds of decoding; give one of them")
        for name in ("temperature", "top_k", "top_p", "seed"):
            if not drawn and getattr(self, name) != _DEFAULTS[name]:
                raise UserError(f"{name} is for samples; give samples as well")
        if drawn and self.n_best > 1:
            raise UserError("n_best is for searches; all samples are kept")
        if self.groups == 1 and self.diversity != _DEFAULTS["diversity"]:
            raise UserError("diversity is for groups of beams; give groups as well")

    @property
    def title(self) -> str:
        """The search in a few words: its kind and length norm, and what else differs from the defaults."""
        kind = "greedy" if self.beam == 1 and not self.must else f"beam {self.beam}"
        if self.samples:
            kind = f"{self.samples} samples" if self.samples > 1 else "sampled"
        said = {"beam", "samples", "n_best", "length_norm"}
        if kind == "greedy" or self.samples:
            said |= {"length_penalty"}
        else:
            kind = f"{kind}, length_norm {self.length_norm}"
        more = [
            f"{item.name} {_said(getattr(self, item.name))}"
            for item in fields(self)
            if item.name not in said and getattr(self, item.name) != item.default
        ]
        return ", ".join([kind, *more])


_DEFAULTS: dict[str, Any] = {item.name: item.default for item in fields(Decoding)}


def _said(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def split_options(arguments: Sequence[str], *, sweep: bool) -> tuple[list[str], list[str]]:
    """Parts a command line in all that isn't of ``--decode.FIELD VALUE`` and what is, as ``--decode.FIELD=VALUE``.

    In a sweep, an option takes all values behind it that it can be given; otherwise the next word, whatever it is.
    """
    others: list[str] = []
    ours: list[str] = []
    option, taken = "", 0
    for argument in arguments:
        if argument.startswith("-") and not argument[1:2].isdigit():
            option, taken = "", 0
            if not argument.startswith("--decode."):
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


def _fits(option: str, value: str) -> bool:
    try:
        _converted(_field(option), value)
    except UserError:
        return False
    return True


def _field(option: str) -> str:
    """The field that an option names. Raises UserError, with the nearest one, where there is none."""
    name = option.removeprefix("--decode.").replace("-", "_")
    if name not in _DEFAULTS:
        known = [f"--decode.{field.replace('_', '-')}" for field in _DEFAULTS]
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "--help lists the fields"
        raise UserError(f"unknown option {option}; {hint}")
    return name


def combinations(decoding: Decoding, options: Sequence[str]) -> tuple[list[Decoding], list[str]]:
    """Settings for options such as ``--decode.beam=1 --decode.beam=3 --decode.prefix=``: every combination.

    Args:
        decoding: what holds where nothing is given.
        options: each with a value; several values of one make a sweep. Those of ``must`` separate words by commas.

    Returns:
        The settings, and the names of the fields that have several values, in the order in which they were given.

    Raises:
        UserError: an option that is no field, a value of another type or given twice, settings that don't go together.
    """
    values: dict[str, list[Any]] = {}
    for argument in options:
        option, given, value = argument.partition("=")
        name = _field(option)
        if not given:
            wanted = "true or false" if isinstance(_DEFAULTS[name], bool) else "one"
            raise UserError(f"{option} has no value; give {wanted}, or several for a sweep")
        converted = _converted(name, value)
        if converted in values.setdefault(name, []):
            raise UserError(f"{option} {value} is given twice")
        values[name].append(converted)
    settings = [
        replace(decoding, **dict(zip(values, combination, strict=True)))
        for combination in itertools.product(*values.values())
    ]
    return settings, [name.replace("_", "-") for name, given in values.items() if len(given) > 1]


def _converted(name: str, value: str) -> Any:
    """A field's value from the command line. Raises UserError where it is none of its type."""
    default = _DEFAULTS[name]
    option = f"--decode.{name.replace('_', '-')}"
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise UserError(f"{option} is {value!r}; give true or false")
        return value.lower() == "true"
    if isinstance(default, tuple):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    try:
        return type(default)(value)
    except ValueError:
        raise UserError(
            f"{option} is {value!r}; give {'a whole number' if type(default) is int else 'a number'}"
        ) from None


def options_help() -> str:
    """The fields as options, with their defaults and what they mean, for --help."""
    meanings = dict(re.findall(r'^    (\w+): .*\n    """(.*)"""$', inspect.getsource(Decoding), flags=re.MULTILINE))
    lines = ["decoding (default: what the run's experiment says; in brackets, what holds where it says nothing):"]
    for name, default in _DEFAULTS.items():
        said = _said(default) or "none"
        lines.append(f"  --decode.{name.replace('_', '-'):<20} [{said}] {meanings.get(name, '')}".rstrip())
    return "\n".join(lines)
