"""A study: a base experiment, the factors that are changed, and the seeds. One typed value, as an experiment is.

study = Study(
    base=experiment,
    factors=(
        Factor("attention", {"none": replace(experiment, decoder=ShowTell(hidden_size=256))}, base="soft"),
        Factor("label smoothing", {"0.1": {"objective.label_smoothing": 0.1}}),
        Factor("beam size", {"1": {"decoding.beam": 1}, "5": {"decoding.beam": 5}}),
    ),
    seeds=(0, 1, 2),
)
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from imgcap_jax.errors import UserError, did_you_mean
from imgcap_jax.experiment import SEED, Experiment, value_of

Change = Mapping[str, Any]
"""New values of fields, as {"decoder.hidden_size": 512}."""


@dataclass(frozen=True)
class Factor:
    """Something that a study changes.

    Attributes:
        name: the heading in tables.
        levels: the name of each level -> a changed experiment, or new values of fields, as
            {"decoder.hidden_size": 512}. A level that equals the base is the level of the base.
        base: the name of the base's level, if no level equals the base. None: the value of the field if the levels
            change a single one, otherwise "base".
    """

    name: str
    levels: Mapping[str, Experiment | Change]
    base: str | None = None


@dataclass(frozen=True)
class Setting:
    """One row of a study's table, trained once per seed.

    Attributes:
        name: as "attention=none"; "base" for the base.
        levels: the name of each factor -> the name of its level.
        experiment: what is computed, except for the seed.
    """

    name: str
    levels: dict[str, str]
    experiment: Experiment


@dataclass(frozen=True)
class Study:
    """An ablation: settings that are trained with the same seeds and compared with a base.

    Attributes:
        base: the experiment that all settings are compared with.
        factors: what is changed.
        seeds: the seeds of each setting. Intervals need at least two; three or more are advisable.
        design: "one at a time" changes one factor of the base per setting; "grid" takes all combinations of levels.
        split: the split that is captioned and scored.
        scores: the scores that are reported. The first one is compared with the base in the tables and in the plot.
        from_run: whether all runs start from the best parameters of another run, which ``--init-from`` then names.

    Raises:
        UserError: names occur twice, a field does not exist, levels do not change the base, or combinations overlap.
    """

    base: Experiment
    factors: tuple[Factor, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    design: Literal["one at a time", "grid"] = "one at a time"
    split: str = "val"
    scores: tuple[str, ...] = ("CIDEr-D", "BLEU-4", "METEOR", "ROUGE-L")
    from_run: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.base, Experiment):
            raise UserError(f"the base of a study is of type {type(self.base).__name__}; it must be an Experiment")
        if self.design not in ("one at a time", "grid"):
            raise UserError(f"design is {self.design!r}; it must be 'one at a time' or 'grid'")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds are {self.seeds}; give each seed once")
        if not self.scores:
            raise UserError("a study needs the name of at least one score, such as CIDEr-D")
        if not self.factors:
            raise UserError("a study needs at least one factor")
        _check_once("factor", [factor.name for factor in self.factors])
        self.settings()

    def settings(self) -> list[Setting]:
        """The settings, the base first."""
        factors = [_Levels.of(factor, self.base) for factor in self.factors]
        if self.design == "grid":
            _check_apart(factors)
            chosen: Iterable[tuple[str, ...]] = itertools.product(*([one.base, *one.changes] for one in factors))
        else:
            bases = [one.base for one in factors]
            alone = ((number, level) for number, one in enumerate(factors) for level in one.changes)
            changed = ((*bases[:number], level, *bases[number + 1 :]) for number, level in alone)
            chosen = itertools.chain([tuple(bases)], changed)
        found = [_combined(self.base, factors, names) for names in chosen]
        _check_once("setting", [setting.name for setting in found])
        _check_once("folder", [folder_name(setting.name) for setting in found])
        return found


@dataclass(frozen=True, eq=False)
class _Levels:
    """The changes of a factor's levels, except that of the base."""

    name: str
    base: str
    changes: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, factor: Factor, base: Experiment) -> "_Levels":
        changes: dict[str, dict[str, Any]] = {}
        own = None
        for level, value in factor.levels.items():
            where = f"{factor.name}={level}"
            if isinstance(value, Experiment):
                change = changed_fields(base, value)
            else:
                changed = _apply(base, dict(value), where)
                change = {} if changed == base else dict(value)
            if SEED in change:
                raise UserError(f"{where} changes {SEED}; the seeds of a study are its field seeds")
            if not change and own is not None:
                raise UserError(f"{factor.name}: {own} and {level} both equal the base; leave out one of them")
            if change:
                changes[level] = change
            else:
                own = level
        if not changes:
            raise UserError(f"factor {factor.name} has no level that differs from the base; add one")
        name = own if own is not None else factor.base or _base_level(base, changes)
        if name in changes:
            raise UserError(f"{factor.name}: {name!r} names a level and the base; give another base=... to the factor")
        return cls(factor.name, name, changes)


def folder_name(name: str) -> str:
    """A setting's name as that of a folder: "hidden size=128, beam=3" becomes "hidden_size=128,beam=3"."""
    return re.sub(r"[^\w.=,+-]", "_", name.replace(", ", ","))


def _combined(base: Experiment, factors: Sequence["_Levels"], levels: Sequence[str]) -> Setting:
    """The setting with these levels of the factors."""
    changed = {one: level for one, level in zip(factors, levels, strict=True) if level != one.base}
    name = ", ".join(f"{one.name}={level}" for one, level in changed.items()) or "base"
    for one, level in changed.items():
        base = _apply(base, one.changes[level], name)
    return Setting(name, {one.name: level for one, level in zip(factors, levels, strict=True)}, base)


def _base_level(base: Experiment, changes: Mapping[str, Change]) -> str:
    fields = {field for change in changes.values() for field in change}
    if len(fields) > 1:
        return "base"
    value = value_of(base, fields.pop())
    return "base" if dataclasses.is_dataclass(value) else str(value)


def changed_fields(old: Any, new: Any, name: str = "") -> dict[str, Any]:
    """The fields of settings that differ. A part of another class is one field."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(new):
        before, after = getattr(old, item.name), getattr(new, item.name)
        field = f"{name}.{item.name}" if name else item.name
        if before == after:
            continue
        if dataclasses.is_dataclass(after) and type(before) is type(after):
            found |= changed_fields(before, after, field)
        else:
            found[field] = after
    return found


def _apply(settings: Any, change: Mapping[str, Any], where: str) -> Any:
    """Settings with new values of fields, with all checks."""
    try:
        return _replaced(settings, change, "", where)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    except UserError as error:
        raise error if str(error).startswith(f"{where}:") else UserError(f"{where}: {error}") from error


def _replaced(settings: Any, change: Mapping[str, Any], prefix: str, where: str) -> Any:
    """Settings with new values. All fields of a part change at once, because its checks are about all of them."""
    names = [item.name for item in dataclasses.fields(settings)] if dataclasses.is_dataclass(settings) else []
    values: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for field, value in change.items():
        first, _, rest = field.partition(".")
        if first not in names:
            kind = type(settings).__name__
            advice = did_you_mean(first, names) or f"; {kind} has {', '.join(names) or 'no fields'}"
            raise UserError(f"{where}: there is no field {prefix}{field}{advice}")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            _check_kind(getattr(settings, first), value, f"{where}: {prefix}{field}")
            values[first] = value
    for name, of_part in inner.items():
        values[name] = _replaced(values.get(name, getattr(settings, name)), of_part, f"{prefix}{name}.", where)
    return replace(settings, **values)


_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int, float), "a number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


def _check_kind(before: Any, value: Any, field: str) -> None:
    """Raises UserError if a number, a text or a switch gets a value of another kind, which its checks do not expect."""
    if type(before) not in _KINDS or value is None:  # a field can allow None, which its class knows
        return
    wanted, words = _KINDS[type(before)]
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise UserError(f"{field} is {value!r}; it must be {words}")


def _check_once(kind: str, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"the study has two {kind}s named {twice!r}; rename one of them")


def _check_apart(factors: Sequence[_Levels]) -> None:
    """Raises UserError if two factors of a grid change the same field: their combination would undo one of them."""
    for one, other in itertools.combinations(factors, 2):
        fields = [{field for change in levels.changes.values() for field in change} for levels in (one, other)]
        for a, b in itertools.product(*fields):
            if a == b or a.startswith(f"{b}.") or b.startswith(f"{a}."):
                raise UserError(
                    f"factors {one.name} and {other.name} both change {min(a, b, key=len)}, so they cannot be combined "
                    f"in a grid; use design='one at a time', or make them one factor"
                )
