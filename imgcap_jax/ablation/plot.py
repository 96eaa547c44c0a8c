"""The plot of a study: the difference of each setting to the base, with its interval."""

import math
from pathlib import Path

import numpy as np

from imgcap_jax.ablation.statistics import StudyTable
from imgcap_jax.errors import printable
from imgcap_jax.files import replacing

_INK, _FAINT, _COLOUR = "#1f2328", "#8b949e", "#0b6bcb"


def write_plot(table: StudyTable, path: Path) -> None:
    """Draws the first score of a study: on the left each seed and the mean, on the right differences with intervals.

    Args:
        table: the results.
        path: a file that ends in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    name = table.scores[0]
    rows = table.rows
    places = np.arange(len(rows))[::-1]
    longest = max(len(row.setting.name) for row in rows)
    figure = Figure(figsize=(6.5 + 0.07 * longest, 1.3 + 0.36 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in zip(places, rows, strict=True):
        values = 100 * np.array(row.scores[name].values)
        left.plot(values, np.full(len(values), place), "o", color=_COLOUR, alpha=0.45, markersize=4, markeredgewidth=0)
        left.plot([100 * row.scores[name].mean], [place], "|", color=_INK, markersize=11, markeredgewidth=1.8)
        found = row.scores[name].difference
        if found is None:
            continue
        middle = 100 * (found.ours - found.other)
        apart = not math.isnan(found.low) and row.scores[name].p_value < 0.05
        if not math.isnan(found.low):
            right.plot([100 * found.low, 100 * found.high], [place, place], color=_COLOUR, linewidth=2)
        right.plot([middle], [place], "o", color=_COLOUR, markersize=6, markerfacecolor=_COLOUR if apart else "white")
    right.axvline(0, color=_FAINT, linewidth=1)
    left.set_yticks(places, [printable(row.setting.name) for row in rows])
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.set_title(f"{name}: seeds and mean", fontsize=10)
    right.set_title(f"{name}: difference to base, 95 % interval", fontsize=10)
    right.set_xlabel("filled: p < 0.05 after correction (Holm)", fontsize=8)
    left.set_xlabel(f"{table.dataset}, split {table.study.split}, {table.images:,} images", fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e2e5e9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
    right.tick_params(axis="y", length=0)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=150)
