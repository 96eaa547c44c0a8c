"""``imgcap runs``: a list of runs."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from imgcap_jax.errors import UserError, printable
from imgcap_jax.remote import shown, url_of
from imgcap_jax.run.listing import RunSummary, list_runs

RUNS = Path("runs")
_SECONDS = 2.0  # between two refreshes of --watch
_WIDE = 1000  # columns if the output is a pipe or a file
_STYLES = {"training": "green", "failed": "red", "damaged": "red", "no checkpoint": "yellow", "interrupted": "yellow"}
_SORTS: dict[str, Callable[[RunSummary], Any]] = {
    "name": lambda run: shown(run.folder),
    "score": lambda run: -(run.best if run.best is not None else -1.0),
    "age": lambda run: -run.updated,
    "size": lambda run: -run.size,
    "status": lambda run: run.status,
    "epoch": lambda run: -(run.epoch if run.epoch is not None else -1.0),
}
SORTS = tuple(_SORTS)


def runs(options: argparse.Namespace) -> int:
    """Prints the runs in a folder, once or until Ctrl-C."""
    folder: Path = options.folder or RUNS
    if url_of(folder) is not None:
        raise UserError(f"{shown(folder)}: runs in buckets are not listed; give a local folder")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of your runs, or train first")
    if options.watch and options.json:
        raise UserError("--watch and --json exclude each other; leave out one of them")
    if options.watch:
        _watch(folder, options.sort)
        return 0
    found = _sorted(folder, options.sort)
    if options.json:
        print(json.dumps([{**asdict(run), "folder": str(run.folder)} for run in found], indent=1))
    elif not found:
        print(f"no runs in {folder}")
    else:
        console = _console()
        console.print(_table(found, folder))
        for run in found:
            if run.note:
                console.print(Text(f"{_name(run, folder)}: {printable(run.note)}"), soft_wrap=True)
    return 0


def _sorted(folder: Path, sort: str) -> list[RunSummary]:
    return sorted(list_runs(folder), key=_SORTS[sort])


def _watch(folder: Path, sort: str) -> None:
    """Shows the table again every two seconds. Ctrl-C ends it."""
    console = _console()
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
            while True:
                found = _sorted(folder, sort)
                live.update(_table(found, folder) if found else Text(f"no runs in {folder}"), refresh=True)
                time.sleep(_SECONDS)
    except KeyboardInterrupt as interrupt:
        if type(interrupt) is not KeyboardInterrupt:  # SIGTERM
            raise
    if not console.is_terminal:
        console.print()


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def _name(run: RunSummary, folder: Path) -> str:
    """The run's folder as it can be pasted into a command; the folder of all runs is above the table."""
    return printable(str(run.folder.relative_to(folder))) if run.folder != folder else printable(str(folder))


def _table(found: Sequence[RunSummary], folder: Path) -> Table:
    rows = [
        (
            run.status,
            _epoch(run),
            "-" if run.best is None else f"{100 * run.best:.1f}",
            _age(time.time() - run.updated),
            _bytes(run.size),
        )
        for run in found
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(str(folder), no_wrap=True, overflow="ellipsis")
    for place, name in enumerate(("status", "epoch", "best CIDEr-D", "changed", "size")):
        width = max(len(name), *(len(row[place]) for row in rows))  # only names of runs are cut
        table.add_column(name, justify="right" if place else "left", no_wrap=True, min_width=width)
    for run, (status, *others) in zip(found, rows, strict=True):
        table.add_row(Text(_name(run, folder)), Text(status, _STYLES.get(status, "")), *others)
    return table


def _epoch(run: RunSummary) -> str:
    if run.epoch is None:
        return "-" if run.step is None else f"step {run.step}"
    of = "" if run.epochs is None else f" of {run.epochs:g}"
    return f"{run.epoch:.1f}{of}"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"


def _bytes(size: int) -> str:
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= of:
            return f"{size / of:.1f} {unit}"
    return f"{size} B"
