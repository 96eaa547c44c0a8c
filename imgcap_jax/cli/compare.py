"""``imgcap compare``: what its arguments name."""

import argparse
from pathlib import Path

from imgcap_jax.ablation.records import runs_of_setting
from imgcap_jax.errors import UserError, check_range
from imgcap_jax.files import check_writable
from imgcap_jax.remote import shown, url_of
from imgcap_jax.run.finder import is_run_folder
from imgcap_jax.run.listing import list_runs


def check(options: argparse.Namespace) -> None:
    """Raises UserError if an option has a wrong value."""
    check_range("--captions", options.captions, at_least=0)
    if options.json is not None:
        check_writable(options.json)
    if options.a == options.b:
        raise UserError(f"{shown(options.a)} is given twice; give two runs")


def members_of(folder: Path) -> list[Path]:
    """The runs that an argument names: the run, or the runs in a folder, such as a setting of a study.

    Raises:
        UserError: a member of a folder has no trained parameters, or a setting of a study has no runs of its own.
    """
    if url_of(folder) is None and not folder.exists() and (shared := runs_of_setting(folder)) is not None:
        raise UserError(
            f"{folder}: this setting differs from that of {shared} only in decoding, and they share the runs there; "
            f"the scores of both are in {folder.parent / 'table.md'}"
        )
    if url_of(folder) is not None or is_run_folder(folder) or not folder.is_dir():
        return [folder]
    found = list(list_runs(folder))
    if not found:
        return [folder]  # reported when it is loaded
    for run in found:
        if run.best is None:
            raise UserError(f"{run.folder} has no best parameters ({run.status}); train it, or move it out of {folder}")
    return [run.folder for run in found]
