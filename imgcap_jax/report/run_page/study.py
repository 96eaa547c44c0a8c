"""The part of the page about a study: the table that ``imgcap ablate`` has written, with its plot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.files import read_json, reading
from imgcap_jax.remote import shown
from imgcap_jax.report.html import Cell, number, section, table, text
from imgcap_jax.report.run_page.intervals import Interval, interval_chart
from imgcap_jax.study import folder_name

_TABLE = "table.json"
_ADVICE = "imgcap ablate writes it again"
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Score:
    """A score of a setting, times 100. None: there is no such number.

    Attributes:
        values: of each seed.
        mean, deviation: over seeds.
        difference: to the base; low, high: the bounds of its 95 % interval.
        p_value: of the difference, corrected for the number of comparisons.
    """

    values: tuple[float, ...]
    mean: float | None
    deviation: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None


@dataclass(frozen=True)
class Setting:
    """A row of the table. The first score is the one that is compared with the base."""

    name: str
    changes: tuple[str, ...]
    seeds: int
    scores: dict[str, Score]
    parameters: float | None
    minutes: float | None
    captions_per_second: float | None


@dataclass(frozen=True)
class StudyTable:
    """The table of the study in a folder. The base is its first setting."""

    folder: Path
    notes: tuple[str, ...]
    settings: tuple[Setting, ...]

    def setting_of(self, run: Path) -> str:
        """The name of the setting that the folder of a run belongs to; "" if the run is not one of the study."""
        if self.folder not in run.parents:
            return ""
        names = {folder_name(setting.name): setting.name for setting in self.settings}
        return names.get(run.relative_to(self.folder).parts[0], "")


def in_order(runs: Sequence[Path], tables: Sequence[StudyTable]) -> list[int]:
    """The positions of runs, with those of a study in the order of its settings: the base first."""

    def rank(position: int) -> tuple[int, int]:
        for place, of_study in enumerate(tables):
            names = [setting.name for setting in of_study.settings]
            if name := of_study.setting_of(runs[position]):
                return place, names.index(name)
        return len(tables), 0

    return sorted(range(len(runs)), key=rank)


def study_tables(found: Mapping[Path, Path]) -> tuple[list[StudyTable], list[str]]:
    """The tables of the studies whose folders were given, and a line for each file that is not such a table.

    Args:
        found: the folder of each run -> the folder that was given, which is the run or contains it.
    """
    folders = dict.fromkeys(
        parent
        for run, given in found.items()
        for parent in run.parents
        if (parent == given or given in parent.parents) and (parent / _TABLE).is_file()
    )
    tables, notes = [], []
    for folder in folders:
        try:
            tables.append(_read(folder))
        except UserError as error:
            notes.append(f"no table of the study, because {error}")
    return tables, notes


def _read(folder: Path) -> StudyTable:
    path = folder / _TABLE
    found = read_json(path, _ADVICE)
    with reading(path, _ADVICE):
        settings = tuple(_setting(row) for row in found["rows"])
        if not settings or not all(setting.scores.keys() == settings[0].scores.keys() != set() for setting in settings):
            raise ValueError("its rows must have the same scores")
        return StudyTable(folder, tuple(map(str, found["notes"])), settings)


def _setting(row: Mapping[str, Any]) -> Setting:
    return Setting(
        str(row["setting"]),
        tuple(map(str, row["changes"])),
        len(row["seeds"]),
        {str(name): _score(score) for name, score in row["scores"].items()},
        *(_float(row[name]) for name in ("parameters", "minutes", "captions_per_second")),
    )


def _score(score: Mapping[str, Any]) -> Score:
    found = score["difference"]
    difference = low = high = None
    if found is not None:
        difference = _float(found["ours"] - found["other"], 100)
        low, high = _float(found["low"], 100), _float(found["high"], 100)
    values = tuple(100 * float(value) for value in score["values"])
    mean, deviation, p_value = _float(score["mean"], 100), _float(score["deviation"], 100), _float(score["p_value"])
    return Score(values, mean, deviation, difference, low, high, p_value)


def _float(value: Any, factor: float = 1.0) -> float | None:
    return None if value is None else factor * float(value)


def studies(tables: Sequence[StudyTable]) -> str:
    """The section of the studies; "" if there are none."""
    content = "".join(_study(one, named=len(tables) > 1) for one in tables)
    return section("study", "Study" if len(tables) == 1 else "Studies", content) if content else ""


def _study(found: StudyTable, *, named: bool) -> str:
    base = found.settings[0]
    first = next(iter(base.scores))
    means = [
        Interval(one.name, score.mean, dots=score.values, tip=(f"mean {score.mean:.1f}", _listed(score.values)))
        for one in found.settings
        if (score := one.scores[first]).mean is not None
    ]
    charts = interval_chart(f"{first}: seeds and mean", means, f"{first} (×100)")
    charts += interval_chart(
        f"{first}: difference to {base.name}, with 95 % interval",
        list(_differences(found.settings, first)),
        "difference (×100); filled: p < 0.05",
        zero=True,
    )
    changes = [[one.name, "; ".join(one.changes)] for one in found.settings[1:]]
    notes = "".join(f"<li>{text(note)}</li>" for note in found.notes)
    return (
        (f"<h3>{text(shown(found.folder))}</h3>\n" if named else "")
        + _table(found, first)
        + (f'<div class="charts">{charts}</div>\n' if charts else "")
        + f'<ul class="signatures">{notes}</ul>\n'
        + "<details><summary>What the settings change</summary>"
        + f"{table(['setting', 'changes'], changes, f'changes to {base.name}', left=2)}</details>\n"
    )


def _differences(settings: Sequence[Setting], name: str) -> Iterable[Interval]:
    for one in settings:
        score = one.scores[name]
        if score.difference is None:
            continue
        bounds = None if score.low is None or score.high is None else (score.low, score.high)
        said = [f"{score.difference:+.1f}"]
        if bounds is not None:
            said.append(f"95 % interval {_interval(*bounds)}")
        if score.p_value is not None:
            said.append(f"p {_p_value(score.p_value)}")
        filled = score.p_value is not None and score.p_value < _SIGNIFICANT
        yield Interval(one.name, score.difference, bounds, filled=filled, tip=tuple(said))


def _table(found: StudyTable, first: str) -> str:
    others = [name for name in found.settings[0].scores if name != first]
    head = ["setting", "seeds", first, "difference", "95 % interval", "p", *others]
    head += ["parameters", "minutes", "captions/s"]
    rows = [
        [
            Cell(one.name),
            number(float(one.seeds), 0),
            _mean(one.scores[first]),
            *_compared(one.scores[first]),
            *(_mean(one.scores[name]) for name in others),
            number(one.parameters, 0),
            number(one.minutes),
            number(one.captions_per_second, 0),
        ]
        for one in found.settings
    ]
    return table(head, rows, f"settings of the study {found.folder.absolute().name}")


def _mean(score: Score) -> Cell:
    if score.mean is None or score.deviation is None:
        return number(score.mean)
    return Cell(f"{score.mean:.1f} ± {score.deviation:.1f}", score.mean)


def _compared(score: Score) -> list[Cell]:
    if score.difference is None:
        return [number(None)] * 3
    interval = number(None)
    if score.low is not None and score.high is not None:
        interval = Cell(_interval(score.low, score.high), score.low)
    p_value = number(None) if score.p_value is None else Cell(_p_value(score.p_value), score.p_value)
    return [Cell(f"{score.difference:+.1f}", score.difference), interval, p_value]


def _interval(low: float, high: float) -> str:
    return f"{low:+.1f} to {high:+.1f}"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _listed(values: Sequence[float]) -> str:
    return f"seeds {', '.join(f'{value:.1f}' for value in values)}"
