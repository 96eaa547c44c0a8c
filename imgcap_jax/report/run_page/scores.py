"""The parts of the page about scores: a table of all evaluations, means over seeds, and decoding sweeps."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from imgcap_jax.report.html import Cell, number, section, table, text
from imgcap_jax.report.run_page.charts import Line, line_chart
from imgcap_jax.report.run_page.records import Group, Record
from imgcap_jax.report.run_page.splits import RANKING, SplitResult, decoding_title, stored_scores


def score_tables(found: Sequence[Group], results: Mapping[str, SplitResult], split: str) -> str:
    """The section of the scores; "" if there are none.

    Args:
        found: the runs.
        results: name of the run -> its captions of the split.
        split: the name of the split.
    """
    rows = [row for group in found for record in group.records for row in _rows(record, results, split)]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    signatures = list(dict.fromkeys(row["signature"] for row in rows))
    with_truth = any(row["truth"] is not None for row in rows)
    head = ["run", "evaluation", "decoding", *names, *(["true %"] if with_truth else []), "step", "signature"]
    cells = [
        [
            Cell(row["run"]),
            Cell(row["split"]),
            Cell(row["decoding"]),
            *(number(_times_100(row["scores"].get(name))) for name in names),
            *([number(_times_100(row["truth"]))] if with_truth else []),
            number(row["step"], 0),
            number(float(signatures.index(row["signature"]) + 1), 0),
        ]
        for row in rows
    ]
    listed = "".join(f"<li><code>{text(signature)}</code></li>" for signature in signatures)
    parts = [
        "<p>Scores are times 100; higher is better. Scores with different signatures cannot be compared.</p>",
        table(head, cells, "scores of all evaluations", left=3),
        _over_seeds(found, results, names, split),
        f'<ol class="signatures">{listed}</ol>',
    ]
    return section("scores", "Scores", "".join(parts))


def _rows(record: Record, results: Mapping[str, SplitResult], split: str) -> list[dict[str, Any]]:
    """The evaluations of a run: of the captions on this page, and the others in its folder."""
    rows = []
    ours = results.get(record.name)
    if ours is not None:
        rows.append(
            {
                "split": split,
                "decoding": ours.decoding,
                "scores": ours.scores,
                "truth": None if ours.truth is None else ours.truth.true,
                "step": float(ours.step),
                "signature": ours.signature,
            }
        )
    for one in stored_scores(record.run.folder):
        step, decoding = one.get("step"), decoding_title(one["decoding"])
        if ours is not None and (one["name"], decoding, step) == (split, ours.decoding, ours.step):
            continue
        truth = one.get("truth")
        rows.append(
            {
                "split": one["name"],
                "decoding": decoding,
                "scores": one["scores"],
                "truth": truth.get("true") if isinstance(truth, dict) else None,
                "step": float(step) if isinstance(step, int) else None,
                "signature": str(one.get("signature", "not stored")),
            }
        )
    return [{"run": record.name, **row} for row in rows]


def _over_seeds(found: Sequence[Group], results: Mapping[str, SplitResult], names: Sequence[str], split: str) -> str:
    rows = []
    for group in found:
        own = [one for record in group.records if (one := _own_scores(record, results, split)) is not None]
        of_runs = [scores for signature, scores in own if signature == own[0][0]]
        if len(of_runs) < 2:
            continue
        cells = [Cell(group.name), number(float(len(of_runs)), 0)]
        for name in names:
            values = [100 * scores[name] for scores in of_runs if name in scores]
            if len(values) < 2:
                cells.append(number(None))
                continue
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            cells.append(Cell(f"{mean:.1f} ± {deviation:.1f}", mean))
        rows.append(cells)
    if not rows:
        return ""
    return table(["runs", "seeds", *names], rows, f"mean and standard deviation over seeds, split {split}")


def _own_scores(
    record: Record, results: Mapping[str, SplitResult], split: str
) -> tuple[str, Mapping[str, float]] | None:
    """The signature and the scores of a run's best parameters with its own decoding; None: they are not known."""
    if (ours := results.get(record.name)) is not None:
        return ours.signature, ours.scores
    title = record.experiment.decoding.title
    for one in stored_scores(record.run.folder):
        current = record.best in (None, one.get("step")) and decoding_title(one["decoding"]) == title
        if one["name"] == split and current:
            return str(one.get("signature")), one["scores"]
    return None


def sweeps(found: Sequence[Group]) -> str:
    """The section of decoding sweeps; "" if no run has one."""
    parts = []
    for group in found:
        for record in group.records:
            for name, results in record.sweeps:
                parts.append(_sweep(record, name, results))
    content = "".join(parts)
    return section("sweeps", "Decoding sweeps", content) if content else ""


def _sweep(record: Record, split: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The results of the best parameters, or of the newest of those that were swept."""
    steps = [one.get("step") for one in results if isinstance(one.get("step"), int)]
    step = record.best if record.best in steps else max(filter(None, steps), default=None)
    kept = [one for one in results if one.get("step", step) == step]
    fields = list(dict.fromkeys(name for one in kept for name in one["decoding"]))
    swept = [name for name in fields if len({str(one["decoding"].get(name)) for one in kept}) > 1]
    if len(kept) < 2 or not swept:
        return ""
    names = list(dict.fromkeys(name for one in kept for name in one["scores"]))
    highest = {name: max(one["scores"].get(name, float("-inf")) for one in kept) for name in names}
    rows = [
        [
            *(_setting(one["decoding"].get(name)) for name in swept),
            *(_score(one["scores"].get(name), highest[name]) for name in names),
            number(one.get("mean_steps")),
        ]
        for one in kept
    ]
    title = f"{record.name}, {split}" + ("" if step is None else f", parameters of step {step:,}")
    omitted = len(results) - len(kept)
    note = f"<p>{omitted} results of other parameters are left out.</p>" if omitted else ""
    head = [*swept, *names, "decoder steps"]
    return (
        f"<h3>{text(title)}</h3>\n<p>Bold: the highest score of a column.</p>{note}"
        f'<div class="charts">{_sweep_chart(kept, swept, split)}</div>'
        f"{table(head, rows, f'decoding sweep of {title}', left=0)}"
    )


def _setting(value: Any) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:g}", float(value))
    return Cell(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _score(value: float | None, highest: float) -> Cell:
    cell = number(_times_100(value))
    return Cell(f"<strong>{cell.text}</strong>", cell.value, raw=True) if value == highest else cell


def _sweep_chart(results: Sequence[Mapping[str, Any]], swept: Sequence[str], split: str) -> str:
    """CIDEr-D over the numeric setting with the most values, one line per combination of the others."""

    def values(name: str) -> set[float]:
        found = [one["decoding"].get(name) for one in results]
        return {float(value) for value in found if isinstance(value, int | float) and not isinstance(value, bool)}

    numeric = [name for name in swept if len(values(name)) > 1]
    if not numeric:
        return ""
    axis = max(numeric, key=lambda name: len(values(name)))
    lines: dict[str, dict[float, float]] = {}
    for one in results:
        score, place = one["scores"].get(RANKING), one["decoding"].get(axis)
        if isinstance(score, int | float) and isinstance(place, int | float):
            others = ", ".join(f"{name} {_setting(one['decoding'].get(name)).text}" for name in swept if name != axis)
            lines.setdefault(others or RANKING, {})[float(place)] = 100 * score
    drawn = [Line(name, order, tuple(sorted(points.items()))) for order, (name, points) in enumerate(lines.items())]
    return line_chart(f"{RANKING} (×100), {split}", drawn, axis) if drawn else ""


def _times_100(value: float | None) -> float | None:
    return 100 * value if isinstance(value, int | float) else None
