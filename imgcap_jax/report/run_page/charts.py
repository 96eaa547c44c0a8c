"""Charts as inline SVG. The script of the page shows the values next to the pointer, and at the arrow keys."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from imgcap_jax.report.html import Cell, number, table, text

COLOURS = 8  # colours of the style sheet; further lines are dashed
# Pixels of the viewBox.
_NARROW, _WIDE = (400, 250), (1200, 330)
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 34
_FEW = 4  # lines that always have a legend
_MOST_ROWS = 60  # of the table below a chart


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: what it is.
        colour: its number.
        points: (x, y), in ascending order of x.
        spread: for each point, the distance of the band's edges from the line; empty: no band.
    """

    name: str
    colour: int
    points: tuple[tuple[float, float], ...]
    spread: tuple[float, ...] = ()

    @property
    def look(self) -> str:
        """The classes of the colour and of the dashes."""
        return f"s{self.colour % COLOURS} d{self.colour // COLOURS % 3}"


def line_chart(
    title: str, lines: Sequence[Line], x_name: str, *, digits: int = 1, wide: bool = False, legend: bool = True
) -> str:
    """A chart of lines with a legend and, for people who do not see it, a sentence and a table.

    Args:
        title: what the y axis shows, with its unit.
        lines: at least one, each with at least one point.
        x_name: what the x axis shows.
        digits: digits after the decimal point of the values.
        wide: whether it takes the width of the page. A phone gets the narrow form.
        legend: whether a chart of many lines has a legend. Others on the page have the same colours.
    """
    sizes = [("wide", _WIDE), ("narrow", _NARROW)] if wide else [("", _NARROW)]
    pictures = "".join(_svg(title, lines, x_name, digits, size, css) for css, size in sizes)
    key = ""
    if len(lines) > 1 and (legend or len(lines) <= _FEW):
        items = "".join(
            f'<li><button type="button" aria-pressed="true" data-line="{text(line.name)}">'
            f'<svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="line {line.look}" d="M0 4H24"/></svg>'
            f"{text(line.name)}</button></li>"
            for line in lines
        )
        key = f'<ul class="lines" aria-label="lines of the chart">{items}</ul>'
    return (
        f'<figure class="chart{" hero" if wide else ""}"><figcaption>{text(title)}</figcaption>{pictures}{key}'
        f"<details><summary>Values</summary>{_values(title, lines, x_name, digits)}</details></figure>\n"
    )


def bars(title: str, names: Sequence[str], groups: Sequence[tuple[str, Sequence[float]]], x_name: str) -> str:
    """Grouped vertical bars.

    Args:
        title: what the bars show, with its unit.
        names: the names of the places on the x axis.
        groups: (name, value at each place).
        x_name: what the x axis shows.
    """
    width, height = _NARROW
    top = max((value for _, values in groups for value in values), default=1.0) or 1.0
    ticks = nice_ticks(0.0, top)
    y = Scale(0.0, max(top, ticks[-1]), height - _BOTTOM, _TOP)
    step = (width - _LEFT - _RIGHT) / max(len(names), 1)
    bar = step * 0.84 / max(len(groups), 1)
    every = math.ceil(len(names) * 26 / (width - _LEFT - _RIGHT))
    marks = []
    for place, name in enumerate(names):
        left = _LEFT + place * step
        floor = height - _BOTTOM
        tip = "\n".join([f"{x_name} {name}", *(f"{label}: {values[place]:.1f}" for label, values in groups)])
        shapes = "".join(
            f'<rect class="bar s{order % COLOURS}" x="{left + step * 0.08 + order * bar:.1f}" '
            f'y="{y(values[place]):.1f}" width="{bar:.1f}" height="{max(0.0, floor - y(values[place])):.1f}"/>'
            for order, (_, values) in enumerate(groups)
        )
        marks.append(
            f'<g data-tip="{text(tip)}"><rect class="hit" x="{left:.1f}" y="{_TOP}" width="{step:.1f}" '
            f'height="{height - _BOTTOM - _TOP}"/>{shapes}</g>'
        )
        if place % every == 0:
            marks.append(f'<text class="x" x="{left + step / 2:.1f}" y="{height - _BOTTOM + 15}">{text(name)}</text>')
    legend = "".join(
        f'<li><span><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><rect class="bar s{order % COLOURS}" '
        f'width="24" height="8"/></svg>{text(label)}</span></li>'
        for order, (label, _) in enumerate(groups)
    )
    rows = [
        [Cell(name, float(place)), *(number(values[place]) for _, values in groups)] for place, name in enumerate(names)
    ]
    return (
        f'<figure class="chart"><figcaption>{text(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}; the values follow as a table">'
        f"{_y_axis(ticks, y, width)}{''.join(marks)}"
        f'<text class="x name" x="{(width + _LEFT - _RIGHT) / 2:.0f}" y="{height - 3}">{text(x_name)}</text></svg>'
        f'<ul class="lines">{legend}</ul><details><summary>Values</summary>'
        f"{table([x_name, *(label for label, _ in groups)], rows, title)}</details></figure>\n"
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that cover the range from low to high."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = (low - margin if low else 0.0), high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels: low to start, high to end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)

    @property
    def linear(self) -> list[float]:
        """(offset, factor), for the script."""
        factor = (self.end - self.start) / ((self.high - self.low) or 1.0)
        return [round(self.start - self.low * factor, 4), round(factor, 8)]


def _svg(title: str, lines: Sequence[Line], x_name: str, digits: int, size: tuple[int, int], css: str) -> str:
    width, height = size
    xs = [point[0] for line in lines for point in line.points]
    ys = [value for line in lines for value in _extent(line)]
    y_ticks = nice_ticks(min(ys), max(ys))
    first, last = min(xs), max(xs)
    if first == last:
        first, last = first - 0.5, last + 0.5
    x = Scale(first, last, _LEFT, width - _RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], height - _BOTTOM, _TOP)
    x_ticks = [
        tick for tick in nice_ticks(first, last, 8 if css == "wide" else 5) if first - 1e-9 <= tick <= last + 1e-9
    ]
    drawn = "".join(_line(line, x, y) for line in lines)
    labels = "".join(
        f'<text class="x" x="{x(tick):.1f}" y="{height - _BOTTOM + 15}">{short(tick)}</text>' for tick in x_ticks
    )
    data = {
        "x": x_name,
        "sx": x.linear,
        "sy": y.linear,
        "digits": digits,
        "lines": [
            {
                "name": line.name,
                "look": line.look,
                "x": [round(point[0], 4) for point in line.points],
                "y": [float(f"{point[1]:.6g}") for point in line.points],
                "e": [float(f"{value:.3g}") for value in line.spread],
            }
            for line in lines
        ],
    }
    return (
        f'<svg class="plot {css}" viewBox="0 0 {width} {height}" role="application" '
        f'aria-roledescription="chart" tabindex="0" '
        f'aria-label="{text(_sentence(title, lines, x_name, digits))}" data-plot="{text(json.dumps(data))}">'
        f"{_y_axis(y_ticks, y, width)}{labels}"
        f'<text class="x name" x="{(width + _LEFT - _RIGHT) / 2:.0f}" y="{height - 3}">{text(x_name)}</text>'
        f"{drawn}</svg>"
    )


def _extent(line: Line) -> list[float]:
    values = [point[1] for point in line.points]
    return values + [value + sign * by for value, by in zip(values, line.spread, strict=False) for sign in (-1, 1)]


def _y_axis(ticks: Sequence[float], y: Scale, width: int) -> str:
    return "".join(
        f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{width - _RIGHT}"/>'
        f'<text class="y" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{short(tick)}</text>'
        for tick in ticks
    )


def _line(line: Line, x: Scale, y: Scale) -> str:
    pixels = [(x(point[0]), y(point[1])) for point in line.points]
    band = ""
    if line.spread:
        edges = [
            [f"{x(a):.1f} {y(b + sign * by):.1f}" for (a, b), by in zip(line.points, line.spread, strict=True)]
            for sign in (1, -1)
        ]
        band = f'<path class="band {line.look}" d="M{"L".join([*edges[0], *reversed(edges[1])])}Z"/>'
    path = "L".join(f"{a:.1f} {b:.1f}" for a, b in pixels)
    dots = ""
    if len(pixels) <= 40:
        dots = "".join(f'<circle class="dot {line.look}" cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>' for a, b in pixels)
    return f'<g data-line="{text(line.name)}">{band}<path class="line {line.look}" d="M{path}"/>{dots}</g>'


def _sentence(title: str, lines: Sequence[Line], x_name: str, digits: int) -> str:
    """The chart in words."""
    said = []
    for line in lines[:COLOURS]:
        (first_x, first), (last_x, last) = line.points[0], line.points[-1]
        best_x, best = max(line.points, key=lambda point: point[1])
        said.append(
            f"{line.name}: {first:.{digits}f} at {x_name} {first_x:g}, {last:.{digits}f} at {x_name} {last_x:g}, "
            f"highest {best:.{digits}f} at {x_name} {best_x:g}"
        )
    more = f"; and {len(lines) - COLOURS} more lines" if len(lines) > COLOURS else ""
    return f"{title}. {'; '.join(said)}{more}. The arrow keys go through the values."


def _values(title: str, lines: Sequence[Line], x_name: str, digits: int) -> str:
    """The values of a chart as a table, at evenly spaced points if there are many."""
    values = {x for line in lines for x, _ in line.points}
    xs = sorted(values)
    step = math.ceil(len(xs) / _MOST_ROWS)
    shown = xs[::step]
    of_lines = [dict(line.points) for line in lines]
    rows = [[Cell(f"{x:g}", x), *(number(values.get(x), digits) for values in of_lines)] for x in shown]
    thinned = f"; every {step}th of {len(xs)} points" if step > 1 else ""
    return table([x_name, *(line.name for line in lines)], rows, f"{title}{thinned}")


def short(value: float) -> str:
    """A number of an axis."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"
