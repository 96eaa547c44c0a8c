"""``imgcap report``: a page about runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError, check_range, printable
from imgcap_jax.files import check_writable
from imgcap_jax.remote import shown


def folders_of(given: Sequence[Path]) -> dict[Path, Path]:
    """The folders of the runs that a user gave, each with the folder that was given: itself, or one that contains it.

    Raises:
        UserError: a folder is not a run and has none in it.
    """
    from imgcap_jax.run.finder import is_run, run_folders
    from imgcap_jax.run.mirror import pull

    found: dict[Path, Path] = {}
    for folder in given:
        pull(folder)
        there = list(run_folders(folder))
        runs = [run for run in there if is_run(run)]
        for run in there:
            if run not in runs:
                _note(f"{shown(run)} is left out: it is damaged, and has no experiment.json")
        if not runs:
            raise UserError(f"{shown(folder)} is not a run, and has no runs in it; give a folder that training wrote")
        for run in runs:
            found.setdefault(run, folder)
    return found


def report(runs: Sequence[Any], given: Sequence[Path], caches: Sequence[Path], options: argparse.Namespace) -> int:
    """Writes the page.

    Args:
        runs: the loaded runs.
        given: the folder of each that the user gave.
        caches: the folder of the features of each.
        options: of the command line.

    Raises:
        UserError: see ``write_report``.
    """
    from imgcap_jax.report.run_page.build import write_report
    from imgcap_jax.run.folder import use_data_dir

    moved = []
    for run in runs:
        placed, note = use_data_dir(run, options.data_dir)
        moved.append(placed)
        if note:
            _note(note)
    with_caches = list(zip(moved, caches, strict=True))
    write_report(with_caches, options.split, options.output, options.images, _note, given=given)
    size = options.output.stat().st_size
    print(f"report: {options.output} ({size / 1e6:.1f} MB)")
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises UserError if the page could not be written, before captions are decoded."""
    check_range("--images", options.images, at_least=1, at_most=5000)
    check_writable(options.output)


def _note(line: str) -> None:
    print(f"imgcap: note: {printable(line)}", file=sys.stderr)
