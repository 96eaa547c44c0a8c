"""Tables of text for the terminal."""

from collections.abc import Collection, Sequence


def aligned(table: Sequence[Sequence[str]], left: Collection[int] = ()) -> list[str]:
    """One line per row, with aligned columns.

    Args:
        table: the cells of each row.
        left: the indices of the left-aligned columns. All others are right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
