"""``imgcap evaluate`` of a folder of runs, such as a population."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError, counted
from imgcap_jax.experiment import differences
from imgcap_jax.remote import shown
from imgcap_jax.report.evaluation import brief, members_table, remarks, written
from imgcap_jax.run.evaluation import Evaluation, sweep
from imgcap_jax.run.folder import Run
from imgcap_jax.study import SEED


def check_members(options: argparse.Namespace) -> None:
    """Raises UserError if an option is for a single run."""
    for given, option in (
        (options.ensemble, "--ensemble"),
        (options.page, "--page"),
        (options.distributed, "--distributed"),
    ):
        if given:
            raise UserError(f"{shown(options.run)} is a folder of runs, and {option} is for one run; leave it out")


def evaluate_members(
    runs: Sequence[Run],
    options: argparse.Namespace,
    decoding: Decoding | None,
    swept: Sequence[str],
    cache: Callable[[Run], Path],
) -> int:
    """Evaluates each run, stores its results in its folder, and prints a table.

    Args:
        runs: the runs in the folder.
        options: of the command line.
        decoding: the search settings; None: those of each run.
        swept: the decoding options with several values.
        cache: returns the folder of the feature stores for a run.

    Raises:
        UserError: an option has several values; see also ``sweep``.
    """
    if swept:
        raise UserError(f"--decode.{swept[0]} has several values; a sweep is for one run, not for a folder of runs")
    names = [str(run.folder.relative_to(options.run)) for run in runs]
    evaluations: list[Evaluation] = []
    for name, run in zip(names, runs, strict=True):
        evaluations += sweep(
            [run],
            options.split,
            cache=cache(run),
            dataset=options.dataset,
            decodings=[decoding or run.experiment.decoding],
            floor=options.floor,
        )
        print(f"{name}: {brief(evaluations[-1])}", flush=True)
    first = runs[0].experiment
    changed = [line.partition(":")[0] for run in runs[1:] for line in differences(first, run.experiment)]
    seeds = set(changed) == {SEED}
    print("\n".join(["", *members_table(evaluations, names, seeds=seeds), "", *remarks(evaluations)]))
    if seeds:
        print(f"mean and standard deviation over {counted(len(runs), 'seed')}")
    print("\n".join(written(evaluations)))
    return 0
