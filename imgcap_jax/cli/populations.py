"""The option ``--population``: the members of a population, from lists and ranges of values."""

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from imgcap_jax.cli.options import option_names, override, unknown_option
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import SEED, Experiment, value_of
from imgcap_jax.population import Variant
from imgcap_jax.train import Outcome

_MOST = 1000  # members


def variants(experiment: Experiment, text: str, given: Sequence[str] = ()) -> list[Variant]:
    """The members that a text such as "training.seed=0..7" stands for.

    Several fields, separated by blanks, make all combinations.

    Args:
        experiment: what all members have in common.
        text: the value of ``--population``.
        given: the options that have set fields of ``experiment``.

    Raises:
        UserError: the text is malformed, a field does not exist or is set by an option too, or a value is wrong.
    """
    set_by_options = {argument.partition("=")[0].replace("_", "-") for argument in given}
    values: dict[str, list[str]] = {}
    for assignment in text.split():
        field, given, listed = assignment.partition("=")
        option = f"--{field.replace('_', '-')}"
        if not given or not listed:
            raise UserError(
                f"--population {assignment!r} is malformed; use FIELD=FIRST..LAST or FIELD=VALUE,VALUE,..., as "
                f"training.seed=0..7"
            )
        if option not in option_names(experiment):
            raise unknown_option(option, option_names(experiment))
        if option in set_by_options:
            raise UserError(
                f"--population gives the values of {field}, so {option} has no effect; leave out one of them"
            )
        if option in values:
            raise UserError(f"--population: {field} is given twice")
        values[option] = list(_listed(assignment, listed))
    if not values or max(map(len, values.values())) < 2:
        raise UserError(f"--population {text!r} has one member; give several values, as training.seed=0..7")
    if math.prod(map(len, values.values())) > _MOST:
        raise UserError(f"--population {text!r} has more than {_MOST} members; give fewer values")
    found = [_variant(experiment, dict(zip(values, of, strict=True))) for of in itertools.product(*values.values())]
    twice = [name for name, count in Counter(variant.name for variant in found).items() if count > 1]
    if twice:
        raise UserError(f"--population: {twice[0]} is given twice")
    return found


def _listed(assignment: str, listed: str) -> Iterator[str]:
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", listed):
        first, last = int(found[1]), int(found[2])
        if first > last:
            raise UserError(f"--population {assignment}: the first value is larger than the last")
        if last - first >= _MOST:
            raise UserError(f"--population {assignment} has more than {_MOST} members; give fewer values")
        yield from map(str, range(first, last + 1))
    elif ".." in listed:
        raise UserError(f"--population {assignment}: {listed!r} is no range of whole numbers; use FIRST..LAST, as 0..7")
    else:
        yield from listed.split(",")


def _variant(experiment: Experiment, values: dict[str, str]) -> Variant:
    arguments = [f"{option}={value}" for option, value in values.items()]
    changed = override(experiment, arguments)
    fields = (option.removeprefix("--").replace("-", "_") for option in values)
    found = {field: value_of(changed, field) for field in fields}
    name = ",".join(f"{field.split('.')[-1]}={value}" for field, value in found.items())
    return Variant(name, changed, found)  # other types than numbers are refused later


def results(members: Sequence[Variant], outcomes: Mapping[str, Outcome]) -> list[str]:
    """One line per member, and the mean of their scores if only their seeds differ. outcomes: by name of the member."""
    best = {member.name: outcomes[member.name].best for member in members}
    known = [100 * score for score in best.values() if score is not None]
    width = max(map(len, best))
    highest = max(known) if known and known.count(max(known)) == 1 else None
    lines = []
    for name, score in best.items():
        line = f"{name:{width}}  {outcomes[name].step} steps, best validation CIDEr-D {100 * (score or 0):.1f}"
        lines.append(f"{line}  (highest)" if score is not None and 100 * score == highest else line)
    if len(known) == len(members) and all({*member.values} == {SEED} for member in members):
        mean, deviation = statistics.mean(known), statistics.stdev(known)
        lines.append(f"mean {mean:.1f}, standard deviation {deviation:.1f} over {len(known)} seeds")
    return lines
