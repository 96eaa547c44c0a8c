"""The table of a study as lines for the terminal, Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imgcap_jax.ablation.scores import TRUE
from imgcap_jax.ablation.statistics import ScoreRow, StudyTable, TableRow
from imgcap_jax.errors import counted, printable
from imgcap_jax.experiment import differences
from imgcap_jax.files import without_nan, write_text
from imgcap_jax.report.columns import aligned


def write_tables(table: StudyTable, folder: Path) -> list[Path]:
    """Writes ``table.md``, ``table.tex``, ``table.csv`` and ``table.json`` into a folder; returns their paths."""
    texts = {"md": markdown(table), "tex": latex(table), "csv": comma_separated(table), "json": as_json(table)}
    paths = [folder / f"table.{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths


def lines(table: StudyTable) -> list[str]:
    """The table for the terminal, and its notes."""
    return [*aligned(_cells(table, plus_minus="+-"), left=(0,)), *(f"note: {note}" for note in notes(table))]


def markdown(table: StudyTable) -> str:
    """The table in GitHub's Markdown, with its notes and the settings that differ from the base."""
    head, *rows = [[_markdown_text(cell) for cell in row] for row in _cells(table, plus_minus="±")]
    marks = ["---", *["---:"] * (len(head) - 1)]
    found = ["| " + " | ".join(row) + " |" for row in (head, marks, *rows)]
    found += ["", *(f"- {_markdown_text(note)}" for note in notes(table))]
    found += ["", "Settings:", "", *(f"- {_markdown_text(line)}" for line in _changes(table))]
    return "\n".join(found) + "\n"


def latex(table: StudyTable) -> str:
    """The table in LaTeX, for the package booktabs."""
    head, *rows = _cells(table, plus_minus="±")
    body = "\n".join(_latex_row(row) for row in rows)
    comments = "\n".join(f"% {printable(note)}" for note in notes(table))
    return (
        f"% \\usepackage{{booktabs}}\n{comments}\n\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n"
        f"{_latex_row(head)}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
    )


_STATISTICS = ("mean", "deviation", "difference", "low", "high", "p", "p_holm")
_SPEEDS = ("minutes", "captions_per_second", "images_per_second")


def comma_separated(table: StudyTable) -> str:
    """One line per setting and score, with all numbers. Scores are times 100."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    factors = list(table.rows[0].setting.levels)
    writer.writerow(["setting", *factors, "score", "seeds", *_STATISTICS, "parameters", *_SPEEDS])
    for row in table.rows:
        speeds = [_csv_number(value) for value in (row.minutes, row.captions_per_second, row.images_per_second)]
        for name, score in row.scores.items():
            compared = [math.nan] * 4 if score.difference is None else _difference(score.difference)
            numbers = [100 * score.mean, 100 * score.deviation, *compared, score.p_value]
            named = [row.setting.name, *row.setting.levels.values(), name, len(score.values)]
            writer.writerow([*named, *map(_csv_number, numbers), row.parameters, *speeds])
    return text.getvalue()


def as_json(table: StudyTable) -> str:
    """All numbers, and the changes of each setting. Scores are from 0 to 1, CIDEr from 0 to 10."""
    rows = [
        {
            "setting": row.setting.name,
            "levels": row.setting.levels,
            "changes": differences(table.study.base, row.setting.experiment),
            "seeds": row.seeds,
            "scores": {name: asdict(score) for name, score in row.scores.items()},
            "parameters": row.parameters,
            "minutes": row.minutes,
            "captions_per_second": row.captions_per_second,
            "images_per_second": row.images_per_second,
            "together": row.together,
        }
        for row in table.rows
    ]
    document = {
        "dataset": table.dataset,
        "split": table.study.split,
        "images": table.images,
        "start": table.start,
        "runs": table.runs,
        "finished": table.finished,
        "failed": table.failed,
        "signature": table.signature,
        "notes": notes(table),
        "rows": rows,
    }
    return json.dumps(without_nan(document), indent=1, allow_nan=False) + "\n"


def notes(table: StudyTable) -> list[str]:
    """What a reader must know: what is compared and how, and what is missing."""
    study, first = table.study, table.scores[0]
    found = []
    if table.finished < table.runs:
        found.append(f"incomplete: {table.finished} of {counted(table.runs, 'run')} have results")
    found += [f"{name} failed: {reason}" for name, reason in table.failed.items()]
    found += [f"{name} is missing: {how}" for name, how in table.missing.items()]
    seeds = len(study.seeds)
    found.append(
        f"{table.dataset}, split {study.split}, {counted(table.images, 'image')}; scores are times 100; mean and "
        f"standard deviation over seeds"
    )
    if table.start:
        found.append(f"all runs started from {table.start}, so the intervals do not cover other starts")
    if seeds > 1:
        found.append(
            f"difference of {first} to the base, with a 95 % interval for other seeds and other images; p is corrected "
            f"for {counted(len(table.rows) - 1, 'comparison')} (Holm)"
        )
    else:
        found.append("with one seed per setting there is no interval for other seeds")
    together = max(row.together for row in table.rows)
    if together > 1:
        found.append(
            f"up to {together} runs were trained in one program; its time is divided by their number, its speed is the "
            f"sum"
        )
    found.append(f"signature {table.signature}")
    return found


def _cells(table: StudyTable, *, plus_minus: str) -> list[list[str]]:
    first, *others = table.scores
    head = [
        "setting",
        "seeds",
        first,
        "difference",
        "95 % interval",
        "p",
        *others,
        "parameters",
        "minutes",
        "captions/s",
    ]
    cells = [head]
    for row in table.rows:
        compared = _compared(row.scores[first], base=row is table.rows[0])
        scores = [_score(row, name, plus_minus) for name in (first, *others)]
        parameters = "" if row.parameters is None else f"{row.parameters:,}"
        speeds = [_number(row.minutes, ".1f"), _number(row.captions_per_second, ",.0f")]
        cells.append([row.setting.name, str(len(row.seeds)), scores[0], *compared, *scores[1:], parameters, *speeds])
    return cells


def _score(row: TableRow, name: str, plus_minus: str) -> str:
    score = row.scores[name]
    if not score.values:
        return "no results"
    percent = " %" if name == TRUE else ""
    mean = f"{100 * score.mean:.1f}"
    return f"{mean} {plus_minus} {100 * score.deviation:.1f}{percent}" if len(score.values) > 1 else mean + percent


def _compared(score: ScoreRow, *, base: bool) -> list[str]:
    if base or score.difference is None:
        return ["", "", ""]
    difference, low, high, _ = _difference(score.difference)
    if math.isnan(low):
        return [f"{difference:+.1f}", "", ""]
    p_value = "<0.001" if score.p_value < 0.001 else f"{score.p_value:.3f}"
    return [f"{difference:+.1f}", f"{low:+.1f} to {high:+.1f}", p_value]


def _difference(found: Any) -> list[float]:
    """Difference, low, high, times 100, and the p-value without correction."""
    return [100 * (found.ours - found.other), 100 * found.low, 100 * found.high, found.p_value]


def _changes(table: StudyTable) -> list[str]:
    """What each setting changes."""
    return [
        f"{row.setting.name}: {'; '.join(differences(table.study.base, row.setting.experiment)) or 'the base'}"
        for row in table.rows
    ]


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _csv_number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(text))


_LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "<": "$<$", ">": "$>$", "~": r"\textasciitilde{}", "^": r"\^{}"} | {
    character: f"\\{character}" for character in "&%$#_{}"
}


def _latex_row(cells: Sequence[str]) -> str:
    texts = ("".join(_LATEX.get(character, character) for character in printable(cell)) for cell in cells)
    signed = (re.sub(r"(?<![\w.])([+-])(?=\d)", r"$\1$", text) for text in texts)
    return " & ".join(signed) + r" \\"
