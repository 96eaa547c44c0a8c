"""Mixtures of datasets: how often an epoch repeats each of them, and which source each row comes from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from imgcap_jax.data.sources import CaptionSource

Mixture = Sequence[tuple["CaptionSource", float]]
"""Sources with their weights. A weight is the number of times that an epoch repeats each image of its source."""


def rows_per_epoch(mixture: Mixture) -> list[int]:
    """The number of images that each source provides per epoch: its weight times its size, at least 1.

    With all weights 1, an epoch has each image of all sources once, as if the datasets were one.
    """
    return [max(1, round(weight * len(source))) for source, weight in mixture]


def describe_mixture(mixture: Mixture) -> str:
    """One line that says how often an epoch repeats the images of each dataset, and its share of the batches."""
    counts = rows_per_epoch(mixture)
    parts = [
        f"{source.name} {len(source):,} images x {weight:g} ({count / sum(counts):.1%})"
        for (source, weight), count in zip(mixture, counts, strict=True)
    ]
    return f"an epoch has {sum(counts):,} images: {', '.join(parts)}"


def interleave(
    counts: Sequence[int], rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The source of each row of an endless mixture, and the number of the row among the rows of that source.

    The rows of each source are spread evenly over the epoch, and each epoch has exactly ``counts`` rows of each source.

    Args:
        counts: the number of rows of each source per epoch.
        rows: int64 [R].

    Returns:
        Two arrays int64 [R].
    """
    source, place = np.full_like(rows, len(counts) - 1), rows.copy()
    row, following, remaining = rows, rows + 1, sum(counts)
    open_rows = np.ones(len(rows), np.bool_)
    for number, count in enumerate(counts[:-1]):
        # Of n rows, the sources after this one get n * (remaining - count) / remaining, rounded down.
        others = row * (remaining - count) // remaining
        others_following = following * (remaining - count) // remaining
        here = open_rows & (row - others != following - others_following)
        source[here], place[here] = number, (row - others)[here]
        open_rows &= ~here
        row, following, remaining = others, others_following, remaining - count
    place[open_rows] = row[open_rows]
    return source, place
