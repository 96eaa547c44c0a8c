"""A chart with one row per setting: values of seeds with their mean, or a difference with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass

from imgcap_jax.report.html import text
from imgcap_jax.report.run_page.charts import Scale, nice_ticks, short

# Pixels of the viewBox. The name of a row is above its values, so that a phone shows both.
_WIDTH, _ROW, _TOP, _BOTTOM, _SIDE = 400, 40, 6, 36, 14
_NAME_LENGTH = 58  # characters


@dataclass(frozen=True)
class Interval:
    """A row of the chart.

    Attributes:
        name: what it is.
        middle: the mean, or the difference.
        bounds: of the interval; None: there is none.
        dots: single values, such as those of seeds.
        filled: whether the circle of a row with ``bounds`` is filled.
        tip: lines that are shown next to the pointer.
    """

    name: str
    middle: float
    bounds: tuple[float, float] | None = None
    dots: tuple[float, ...] = ()
    filled: bool = True
    tip: tuple[str, ...] = ()


def interval_chart(title: str, rows: Sequence[Interval], x_name: str, *, zero: bool = False) -> str:
    """The chart; "" without rows.

    Args:
        title: what it shows.
        rows: from top to bottom.
        x_name: what the x axis shows, with its unit.
        zero: whether a line marks zero.
    """
    if not rows:
        return ""
    values = [value for row in rows for value in (row.middle, *(row.bounds or ()), *row.dots)] + [0.0] * zero
    ticks = nice_ticks(min(values), max(values))
    x = Scale(ticks[0], ticks[-1], _SIDE, _WIDTH - _SIDE)
    floor = _TOP + _ROW * len(rows)
    axis = "".join(
        f'<path class="grid" d="M{x(tick):.1f} {_TOP}V{floor}"/>'
        f'<text class="x" x="{x(tick):.1f}" y="{floor + 15}">{short(tick)}</text>'
        for tick in ticks
    )
    line = f'<path class="cross" d="M{x(0.0):.1f} {_TOP}V{floor}"/>' if zero else ""
    marks = "".join(_row(row, _TOP + _ROW * place, x) for place, row in enumerate(rows))
    return (
        f'<figure class="chart"><figcaption>{text(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {floor + _BOTTOM}" role="img" '
        f'aria-label="{text(title)}; the values are in the table">{axis}{line}{marks}'
        f'<text class="x name" x="{_WIDTH / 2:.0f}" y="{floor + _BOTTOM - 4}">{text(x_name)}</text></svg></figure>\n'
    )


def _row(row: Interval, top: float, x: Scale) -> str:
    centre = top + _ROW * 0.68
    shapes = [f'<circle class="seed s0" cx="{x(value):.1f}" cy="{centre:.1f}" r="3.5"/>' for value in row.dots]
    if row.bounds is not None:
        low, high = row.bounds
        shapes.append(f'<path class="line s0" d="M{x(low):.1f} {centre:.1f}H{x(high):.1f}"/>')
    if row.dots:
        shapes.append(f'<path class="mean" d="M{x(row.middle):.1f} {centre - 7:.1f}v14"/>')
    else:
        kind = "dot" if row.filled else "hollow"
        shapes.append(f'<circle class="{kind} s0" cx="{x(row.middle):.1f}" cy="{centre:.1f}" r="5"/>')
    name = row.name if len(row.name) <= _NAME_LENGTH else f"{row.name[: _NAME_LENGTH - 3]}..."
    tip = "\n".join((row.name, *row.tip))
    return (
        f'<g data-tip="{text(tip)}"><rect class="hit" x="0" y="{top:.1f}" width="{_WIDTH}" height="{_ROW}"/>'
        f'<text class="row" x="{_SIDE}" y="{top + 13:.1f}">{text(name)}</text>{"".join(shapes)}</g>'
    )
