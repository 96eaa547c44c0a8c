"""Finds runs in folders. It looks at names of files only, and imports no JAX."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from imgcap_jax.training.metrics_file import METRICS

# The names of files, as in run/folder.py and training/checkpoints.py, which import JAX.
EXPERIMENT, CHECKPOINTS = "experiment.json", "checkpoints"
_DEEPEST = 8  # folders below the given one


def is_run(folder: Path) -> bool:
    """Whether training has written this folder."""
    return (folder / EXPERIMENT).is_file()


def is_run_folder(folder: Path) -> bool:
    """Whether training has written this folder, or a damaged run is in it."""
    return is_run(folder) or ((folder / METRICS).is_file() and (folder / CHECKPOINTS).is_dir())


def run_folders(folder: Path) -> Iterator[Path]:
    """The run in a folder, or the runs in all folders below it: populations, studies. Damaged runs are among them.

    They are in alphabetical order, with numbers in names by their values. Hidden folders, symbolic links and folders in
    runs are skipped.
    """
    return _run_folders(folder, _DEEPEST)


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if is_run_folder(folder):
        yield folder
        return
    try:
        with os.scandir(folder) as entries:
            names = [one.name for one in entries if one.is_dir(follow_symlinks=False) and one.name[0] != "."]
    except OSError:  # it vanished, or may not be read
        return
    for name in sorted(names, key=_natural) if depth else ():
        yield from _run_folders(folder / name, depth - 1)


def _natural(name: str) -> tuple[list[str | float], str]:
    """Sorts numbers in names by their values. Names that differ only in zeros, as 1 and 01, keep a fixed order."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)], name
