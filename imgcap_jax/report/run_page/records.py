"""The settings, metrics and sweeps in the folders of runs."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imgcap_jax.experiment import Experiment, differences
from imgcap_jax.files import read_json
from imgcap_jax.remote import shown
from imgcap_jax.report.run_page.charts import Line
from imgcap_jax.run.folder import Run
from imgcap_jax.training.checkpoints import CHECKPOINTS, latest_step
from imgcap_jax.training.metrics_file import read_metrics

_MOST_POINTS = 200  # of a line; longer ones are averaged
_SEED = re.compile(r"[_\-=/., ]*(seed)?[_\-= ]*\d+$")  # at the end of a name

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        name: a short name that no other run of the page has.
        setting: the setting of its study; "": it is in none.
        run: the run.
        cache: the folder of its features.
        best: the step of its best parameters; None: there are none on this machine.
        train, validation: the lines of its metrics.
        sweeps: (split, the results of its decoding sweeps on it).
    """

    name: str
    setting: str
    run: Run
    cache: Path
    best: int | None
    train: tuple[Metrics, ...]
    validation: tuple[Metrics, ...]
    sweeps: tuple[tuple[str, tuple[Metrics, ...]], ...]

    @property
    def experiment(self) -> Experiment:
        """The experiment of the run."""
        return self.run.experiment


@dataclass(frozen=True)
class Group:
    """Runs that differ only in ``training.seed``. Often it is one run. colour: the number of its colour in charts."""

    name: str
    records: tuple[Record, ...]
    colour: int


def read_records(runs: Sequence[tuple[Run, Path]], settings: Sequence[str] = ()) -> list[Record]:
    """Reads the folders of runs.

    Args:
        runs: each with the folder of its features.
        settings: the setting of each run in its study; "" for a run that is in none.

    Raises:
        UserError: a file is damaged.
    """
    settings = settings or [""] * len(runs)
    names = _names([run.folder for run, _ in runs], settings)
    return [
        _record(name, setting, run, cache) for name, setting, (run, cache) in zip(names, settings, runs, strict=True)
    ]


def _record(name: str, setting: str, run: Run, cache: Path) -> Record:
    lines = _with_epochs(read_metrics(run.folder))
    return Record(
        name,
        setting,
        run,
        cache,
        latest_step(run.folder / CHECKPOINTS / "best"),
        tuple(line for line in lines if line.get("kind") == "train"),
        tuple(line for line in lines if line.get("kind") == "validation"),
        tuple(_sweeps(run.folder)),
    )


def _with_epochs(lines: Sequence[Metrics]) -> list[Metrics]:
    """The lines. The epoch of a line without one is computed from those of other lines of the run."""
    pairs = ((line.get("step"), line.get("epoch")) for line in reversed(lines))
    rate = next((epoch / step for step, epoch in pairs if step and epoch), None)
    if rate is None:
        return list(lines)
    return [line if "epoch" in line or "step" not in line else {**line, "epoch": line["step"] * rate} for line in lines]


def _names(folders: Sequence[Path], settings: Sequence[str]) -> list[str]:
    """The setting and the last part of each folder, or only the last part; more parts, if that is not unique."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = [
            f"{setting}/{one[-1]}" if setting and count <= 2 else "/".join(one[-count:])
            for one, setting in zip(parts, settings, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    return [shown(folder) for folder in folders]


def _sweeps(folder: Path) -> Iterable[tuple[str, tuple[Metrics, ...]]]:
    for path in sorted(folder.glob("sweep_*.json")):
        found = read_json(path, "it has the results of sweeps; move it away")
        if isinstance(found, list):
            results = [one for one in found if isinstance(one, dict) and _is_result(one)]
            yield path.stem.removeprefix("sweep_"), tuple(results)


def _is_result(value: Metrics) -> bool:
    return isinstance(value.get("scores"), dict) and isinstance(value.get("decoding"), dict)


def groups(records: Sequence[Record]) -> list[Group]:
    """The runs, grouped by everything except ``training.seed``."""
    found: list[list[Record]] = []
    for record in records:
        for members in found:
            if _same(members[0].experiment, record.experiment) and members[0].run.init_from == record.run.init_from:
                members.append(record)
                break
        else:
            found.append([record])
    names = [_group_name(members) for members in found]
    for place, members in enumerate(found):  # settings of two studies can have the same name
        if names.count(names[place]) > 1:
            name = members[0].name
            names[place] = _seeds(name if len(members) == 1 else _SEED.sub("", name), len(members))
    return [Group(names[colour], tuple(members), colour) for colour, members in enumerate(found)]


def _same(first: Experiment, second: Experiment) -> bool:
    """Whether two experiments differ at most in the seed."""
    seed = first.training.seed
    return not differences(first, replace(second, training=replace(second.training, seed=seed)))


def _group_name(members: Sequence[Record]) -> str:
    settings = {member.setting for member in members}
    if len(settings) == 1 and (setting := settings.pop()):
        return _seeds(setting, len(members))
    if len(members) == 1:
        return members[0].name
    stem, *others = {_SEED.sub("", member.name) for member in members}
    return _seeds(stem if stem and not others else members[0].run.folder.absolute().parent.name, len(members))


def _seeds(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ({count} seeds)"


def axis_of(found: Sequence[Group], kind: str, key: str) -> str:
    """What the x axis of a metric shows: "epoch", or "step" if a run has it without epochs."""
    lines = (line for group in found for record in group.records for line in getattr(record, kind) if key in line)
    return "epoch" if all("epoch" in line for line in lines) else "step"


def curves(found: Sequence[Group], kind: str, key: str, factor: float = 1.0) -> list[Line]:
    """A metric over training: one line per group, the mean over its seeds with their standard deviation as a band.

    Args:
        found: the groups.
        kind: "train" or "validation".
        key: the metric.
        factor: of its values.
    """
    lines = []
    axis = axis_of(found, kind, key)
    for group in found:
        of_runs = [_points(getattr(record, kind), key, factor, axis) for record in group.records]
        of_runs = [points for points in of_runs if points]
        if not of_runs:
            continue
        if len(of_runs) == 1:
            lines.append(Line(group.name, group.colour, _thinned(of_runs[0])))
            continue
        common = sorted(set.intersection(*map(set, of_runs)))
        if not common:
            continue
        mean = {x: statistics.fmean(points[x] for points in of_runs) for x in common}
        deviation = {x: statistics.stdev(points[x] for points in of_runs) for x in common}
        lines.append(Line(group.name, group.colour, _thinned(mean), tuple(value for _, value in _thinned(deviation))))
    return lines


def _points(lines: Iterable[Metrics], key: str, factor: float, axis: str) -> dict[float, float]:
    """Epoch or step -> value. Those without a finite value are left out."""
    points = {}
    for line in lines:
        value, place = line.get(key), line.get(axis)
        if isinstance(value, int | float) and isinstance(place, int | float) and math.isfinite(value):
            points[float(place)] = factor * value
    return points


def _thinned(points: dict[float, float]) -> tuple[tuple[float, float], ...]:
    """The points in order, or the means of equally many neighbours if there are too many."""
    ordered = sorted(points.items())
    size = math.ceil(len(ordered) / _MOST_POINTS)
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return tuple((statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part)) for part in parts)
