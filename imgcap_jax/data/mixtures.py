"""Mixtures of datasets: how often an epoch repeats each of them, and which source each row comes from."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grain

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


class Interleaving(grain.transforms.DatasetSelectionMap):
    """The source of each row of an endless mixture. The rows of each source are spread evenly over the epoch.

    `MapDataset.mix` rounds the proportions to a hundredth of the smallest; here each epoch has the exact counts.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        """Args: counts: the number of rows of each source per epoch."""
        self._counts = tuple(counts)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """The number of the source, and of the row among the rows of that source."""
        row, following, remaining = int(index), int(index) + 1, sum(self._counts)
        for source, count in enumerate(self._counts):
            # Of n rows, the sources after this one get n * (remaining - count) / remaining, rounded down.
            others = row * (remaining - count) // remaining
            others_following = following * (remaining - count) // remaining
            if row - others != following - others_following:
                return source, row - others
            row, following, remaining = others, others_following, remaining - count
        raise AssertionError("a row without a source")
