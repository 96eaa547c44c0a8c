"""The parts of the page about training: curves, rewards, settings."""

import json
from collections.abc import Sequence
from typing import Any

from imgcap_jax.experiment import SEED, differences, to_json
from imgcap_jax.report.html import Cell, section, table, text
from imgcap_jax.report.run_page.charts import line_chart
from imgcap_jax.report.run_page.records import Group, Record, axis_of, curves

# (kind, key, title, factor, digits). Only those with values are drawn.
_Chart = tuple[str, str, str, float, int]
_LOSSES: tuple[_Chart, ...] = (
    ("train", "loss", "training loss", 1.0, 3),
    ("validation", "teacher_forced_loss", "validation loss under teacher forcing", 1.0, 3),
)
_COURSE: tuple[_Chart, ...] = (
    ("train", "learning_rate", "learning rate", 1.0, 6),
    ("train", "gradient_norm", "gradient norm", 1.0, 2),
    ("validation", "length", "words per caption (validation)", 1.0, 1),
    ("validation", "repetitions", "captions with a repeated phrase (validation, %)", 100.0, 1),
    ("validation", "bad_endings", "captions with a bad ending (validation, %)", 100.0, 1),
    ("train", "captions_per_second", "training speed (captions/s)", 1.0, 0),
)
_REWARDS: tuple[_Chart, ...] = (
    ("train", "reward", "mean reward of the sampled captions", 1.0, 3),
    ("train", "baseline", "baseline", 1.0, 3),
    ("train", "reward_deviation", "standard deviation of the reward", 1.0, 3),
    ("train", "surprisal", "surprisal of the sampled captions (nats)", 1.0, 2),
    ("train", "kl", "KL divergence from the start (nats)", 1.0, 3),
    ("train", "length", "words per sampled caption", 1.0, 1),
    ("train", "ended", "sampled captions that ended (%)", 100.0, 1),
    ("train", "repeated_words", "sampled captions with a repeated word (%)", 100.0, 1),
)
_SHOWN_BEFORE = {key for kind, key, *_ in (*_LOSSES, *_COURSE) if kind == "validation"} | {
    "kind", "step", "epoch", "seconds", "teacher_forced_perplexity", "captions", "repeated_words", "unfinished",
    "images_per_second",
}  # fmt: skip


def learning_curves(found: Sequence[Group]) -> str:
    """The section of the curves; "" if no run has metrics."""
    rewarded = [group for group in found if _is_rewarded(group)]
    losses = [group for group in found if group not in rewarded]
    charts = _draw(found, [("validation", "CIDEr-D", "CIDEr-D on validation images (×100)", 100.0, 1)], wide=True)
    legend = not charts
    charts += _draw(losses, _LOSSES[:1], legend=legend)
    charts += _draw(found, [*_LOSSES[1:], *_other_scores(found)], legend=legend)
    course = _draw(found, _COURSE, legend=legend)
    more = f"<details><summary>{len(course)} more curves</summary>{_grid(course)}</details>\n" if course else ""
    return section("curves", "Learning curves", f"{_bands(found)}{_grid(charts)}{more}") if charts or more else ""


def rewards(found: Sequence[Group]) -> str:
    """The section of self-critical training; "" if no run has rewards."""
    charts = _draw([group for group in found if _is_rewarded(group)], _REWARDS)
    if not charts:
        return ""
    said = (
        "<p>Self-critical training samples captions, and raises the probability of those with a higher reward than the "
        "baseline. A falling surprisal means that the samples become more alike.</p>"
    )
    return section("rewards", "Rewards", said + _grid(charts))


def settings(found: Sequence[Group]) -> str:
    """The section of the settings: those in which the runs differ, and all of the first run."""
    parts = [_differing(found)] if sum(len(group.records) for group in found) > 1 else []
    first = found[0].records[0]
    rows = [[Cell(name), Cell(_shown(value))] for name, value in _flat(first).items()]
    parts.append(
        f"<details><summary>All settings of {text(first.name)}</summary>"
        f"{table(['setting', 'value'], rows, f'settings of {first.name}', left=2)}</details>"
    )
    return section("settings", "Settings", "".join(parts))


def _differing(found: Sequence[Group]) -> str:
    """A table of the settings in which the groups differ; with many groups, one row per group."""
    first = found[0].records[0]
    names: dict[str, None] = {}
    for group in found[1:]:
        changes = differences(first.experiment, group.records[0].experiment)
        names.update(dict.fromkeys(change.partition(": ")[0] for change in changes))
    names.pop(SEED, None)
    of_groups = [_flat(group.records[0]) for group in found]
    columns = {name: [_shown(values.get(name, "")) for values in of_groups] for name in names}
    columns["start"] = [_start(group.records[0]) for group in found]
    if len(set(columns["start"])) == 1:
        del columns["start"]
    columns[SEED] = [", ".join(str(record.experiment.training.seed) for record in group.records) for group in found]
    if len(set(columns[SEED])) == 1 and len(found[0].records) == 1:
        del columns[SEED]
    if not columns:
        return "<p>The runs have the same settings.</p>"
    head = ["setting", *(group.name for group in found)]
    rows = [[name, *values] for name, values in columns.items()]
    if len(found) > max(4, len(columns)):
        head, *rows = [list(row) for row in zip(head, *rows, strict=True)]
        head[0] = "runs"
    return table(head, rows, "settings in which the runs differ", left=len(head))


def _start(record: Record) -> str:
    return "random parameters" if record.run.init_from is None else f"best parameters of {record.run.init_from.name}"


def _flat(record: Record) -> dict[str, Any]:
    """The fields of an experiment, as "data.batch_size"."""
    values: dict[str, Any] = {}

    def add(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(item, f"{name}.{key}" if name else key)
        else:
            values[name] = value

    add(json.loads(to_json(record.experiment)), "")
    values.pop("type")
    return values


def _shown(value: Any) -> str:
    """A value in a table: "ShowAttendTell" for "module:ShowAttendTell"."""
    if isinstance(value, str):
        return value.rpartition(":")[2]
    return json.dumps(value, ensure_ascii=False)


def _is_rewarded(group: Group) -> bool:
    return any("reward" in line for record in group.records for line in record.train[:5])


def _other_scores(found: Sequence[Group]) -> list[_Chart]:
    """The other scores of validations, also those of custom metrics."""
    first = next((record.validation[-1] for group in found for record in group.records if record.validation), {})
    names = [name for name, value in first.items() if name not in _SHOWN_BEFORE and isinstance(value, int | float)]
    kept = [name for name in names if name not in ("CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3")]
    return [("validation", name, f"{name} (validation, ×100)", 100.0, 1) for name in kept]


def _draw(found: Sequence[Group], charts: Sequence[_Chart], *, wide: bool = False, legend: bool = True) -> list[str]:
    drawn: list[str] = []
    for kind, key, title, factor, digits in charts:
        lines = curves(found, kind, key, factor)
        points = [point for line in lines for point in line.points]
        if len({x for x, _ in points}) > 1 and any(y for _, y in points):
            axis = axis_of(found, kind, key)
            drawn.append(line_chart(title, lines, axis, digits=digits, wide=wide, legend=legend and not drawn))
    return drawn


def _bands(found: Sequence[Group]) -> str:
    if all(len(group.records) == 1 for group in found):
        return ""
    return (
        "<p>Runs that differ only in <code>training.seed</code> are one line: their mean at the points that all of "
        "them have. The band is their standard deviation.</p>"
    )


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="charts">\n{"".join(charts)}</div>\n'
