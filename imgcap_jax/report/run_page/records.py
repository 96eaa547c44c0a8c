"""What a run's folder says about its training: settings, metrics, sweeps."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, differences
from imgcap_jax.files import read_json
from imgcap_jax.remote import shown
from imgcap_jax.report.run_page.charts import Line
from imgcap_jax.run.folder import Run, is_run
from imgcap_jax.training.checkpoints import CHECKPOINTS, latest_step
from imgcap_jax.training.log import read_metrics

_MOST_POINTS = 200  # of a line; longer ones are averaged

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        name: a short name that no other run of the page has.
        run: the run.
        cache: the folder of its features.
        best: the step of its best parameters; None: there are none on this machine.
        train, validation: the lines of its metrics.
        sweeps: (split, the results of its decoding sweeps on it).
    """

    name: str
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


def run_folders(folder: Path) -> list[Path]:
    """The run in a folder, or the runs in its sub-folders and theirs, as populations and studies have them.

    Raises:
        UserError: there is none.
    """
    if is_run(folder):
        return [folder]
    found = [
        path
        for pattern in ("*", "*/*")
        for path in sorted(folder.glob(pattern), key=_natural)
        if _is_member(path, folder)
    ]
    if not found:
        raise UserError(f"{shown(folder)} is not a run, and has no runs in it; give a folder that training wrote")
    return found


def _natural(path: Path) -> list[str | float]:
    """Sorts numbers in names by their values."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(path))
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]


def _is_member(path: Path, folder: Path) -> bool:
    return is_run(path) and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_records(runs: Sequence[tuple[Run, Path]]) -> list[Record]:
    """Reads the folders of runs, each with the folder of its features.

    Raises:
        UserError: a file is damaged.
    """
    names = _names([run.folder for run, _ in runs])
    return [_record(name, run, cache) for name, (run, cache) in zip(names, runs, strict=True)]


def _record(name: str, run: Run, cache: Path) -> Record:
    lines = read_metrics(run.folder)
    return Record(
        name,
        run,
        cache,
        latest_step(run.folder / CHECKPOINTS / "best"),
        tuple(line for line in lines if line.get("kind") == "train"),
        tuple(line for line in lines if line.get("kind") == "validation"),
        tuple(_sweeps(run.folder)),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each folder; more parts, if that is not unique."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
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
    return [Group(_group_name(members), tuple(members), colour) for colour, members in enumerate(found)]


def _same(first: Experiment, second: Experiment) -> bool:
    """Whether two experiments differ at most in the seed."""
    seed = first.training.seed
    return not differences(first, replace(second, training=replace(second.training, seed=seed)))


def _group_name(members: Sequence[Record]) -> str:
    first = members[0].name
    if len(members) == 1:
        return first
    names = [member.name for member in members]
    same = 0
    while all(len(name) > same and name[same] == first[same] for name in names):
        same += 1
    stem = first[:same].rstrip("_-=/., ").removesuffix("seed").rstrip("_-=/., ")
    if not stem.strip("/"):
        stem = members[0].run.folder.absolute().parent.name
    return f"{stem} ({len(members)} seeds)"


def axis_of(found: Sequence[Group]) -> str:
    """What the x axes show: "epoch", or "step" if a run has metrics without epochs."""
    lines = (line for group in found for record in group.records for line in (*record.train, *record.validation))
    return "epoch" if all("epoch" in line for line in lines) else "step"


def curves(found: Sequence[Group], kind: str, key: str, factor: float = 1.0, *, axis: str = "epoch") -> list[Line]:
    """A metric over training: one line per group, the mean over its seeds with their standard deviation as a band.

    Args:
        found: the groups.
        kind: "train" or "validation".
        key: the metric.
        factor: of its values.
        axis: "epoch" or "step".
    """
    lines = []
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
