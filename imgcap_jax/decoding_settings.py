"""Decoding: the settings of a search, and their options on the command line. Free of JAX, for --help comes at once."""

import difflib
import inspect
import itertools
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

    def but(self, **given: Any) -> "Decoding":
        """The same settings but for those that are given (not None).

        Raises:
            UserError: a setting that no search can work with, or one that would do nothing.
        """
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def plain(self, beam: int) -> "Decoding":
        """The same lengths and rules, by plain beam search."""
        nothing = {"samples": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
        return replace(self, beam=beam, n_best=1, groups=1, must=(), **nothing)  # type: ignore[arg-type]

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
            if getattr(self, name) < least:
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

    @property
    def title(self) -> str:
        """The search in a few words, with what differs from the defaults where it changes captions."""
        kind = "greedy" if self.beam == 1 else f"beam {self.beam}"
        if self.samples:
            kind = f"{self.samples} samples" if self.samples > 1 else "sampled"
        said = {"beam", "samples", "n_best"}
        if self.beam == 1 or self.samples:
            said |= {"length_norm", "length_penalty"}
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
    """Parts a command line in all that isn't of ``--decode.FIELD VALUE`` and what is; ``sweep``: of any many values."""
    others: list[str] = []
    ours: list[str] = []
    wanted = 0  # values that the option before may still take
    for argument in arguments:
        if argument.startswith("--"):
            is_ours = argument.startswith("--decode.")
            wanted = 0 if not is_ours or ("=" in argument and not sweep) else len(arguments) if sweep else 1
            (ours if is_ours else others).append(argument)
        elif wanted:
            wanted -= 1
            ours.append(argument)
        else:
            others.append(argument)
    return others, ours


def combinations(decoding: Decoding, arguments: Sequence[str]) -> tuple[list[Decoding], list[str]]:
    """Settings for options such as ``--decode.beam 1 3 5 --decode.length-norm 0 0.7``: every combination.

    Args:
        decoding: what holds where nothing is given.
        arguments: the options with their values; those of ``must`` separate several words by commas.

    Returns:
        The settings, and the names of the fields that have several values, as they were given.

    Raises:
        UserError: an option that is no field, a value of another type, settings that don't go together.
    """
    values: dict[str, list[Any]] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            option, _, value = argument.partition("=")
            name = option.removeprefix("--decode.").replace("-", "_")
            if not option.startswith("--decode.") or name not in _DEFAULTS:
                known = [f"--decode.{field.replace('_', '-')}" for field in _DEFAULTS]
                near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else "--help lists the fields"
                raise UserError(f"unknown option {option}; {hint}")
            if name in values:
                raise UserError(f"{option} is given twice; give its values one behind the other")
            values[name] = [_converted(name, value)] if value else []
        elif not name:
            raise UserError(f"{argument!r} stands alone; give it as a value of an option")
        else:
            values[name].append(_converted(name, argument))
    for name, given in values.items():
        if not given:
            raise UserError(f"--decode.{name.replace('_', '-')} has no value; give one, or several for a sweep")
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
    lines = ["decoding (default: the run's own settings; in brackets those of an experiment that says nothing):"]
    for name, default in _DEFAULTS.items():
        said = _said(default) or "none"
        lines.append(f"  --decode.{name.replace('_', '-'):<20} [{said}] {meanings.get(name, '')}".rstrip())
    return "\n".join(lines)
