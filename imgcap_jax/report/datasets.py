"""Lines for the terminal that list the datasets in a folder."""

from collections.abc import Sequence
from pathlib import Path

from imgcap_jax.data.catalogue import ListedDataset
from imgcap_jax.report.columns import aligned


def lines(datasets: Sequence[ListedDataset], data_dir: Path) -> list[str]:
    """A table of the datasets, followed by the problems of those that cannot be used. Without any: what to do."""
    if not datasets:
        found = f"no datasets in {data_dir}" if data_dir.is_dir() else f"the folder {data_dir} does not exist"
        return [
            f"{found}; to prepare one there: imgcap data prepare FOLDER --name NAME, or for a first try: "
            f"imgcap data prepare scenes"
        ]
    table = [("name", "images", "size", "prepared from")]
    for dataset in datasets:
        splits = ", ".join(f"{split} {count:,}" for split, count in dataset.splits.items())
        table.append((dataset.name, splits or "cannot be used", _size(dataset.size), dataset.source or "see below"))
    broken = [f"{dataset.name}: {dataset.problem}" for dataset in datasets if dataset.problem]
    return [f"datasets in {data_dir}", "", *aligned(table, left=(0, 1, 3)), *([""] if broken else []), *broken]


def _size(count: int) -> str:
    """A number of bytes: "12.3 MB"."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
