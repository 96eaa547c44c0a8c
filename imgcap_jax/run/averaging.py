"""The average of the parameters of several runs, as a run of its own."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from imgcap_jax.errors import UserError
from imgcap_jax.models.model import split_trained
from imgcap_jax.remote import shown, url_of
from imgcap_jax.run.extraction import uses_store
from imgcap_jax.run.folder import OF_DATA, Run, check_ensemble
from imgcap_jax.training.checkpoints import Checkpoints, restore_best


def average(runs: Sequence[Run], folder: Path) -> Run:
    """Writes a run whose parameters are the mean of the best parameters of ``runs``: a model soup.

    The mean is useful if the runs started from the same parameters, such as several seeds of self-critical training
    (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482). Means of runs with other starts are useless.

    Args:
        runs: at least two, with the same architecture and the same ``init_from``.
        folder: that of the new run, which must not exist.

    Returns:
        The new run. Its experiment is that of the first run.

    Raises:
        UserError: the runs do not fit together, or the folder exists.
    """
    if len(runs) < 2:
        raise UserError("an average needs at least two runs")
    if url_of(folder) is not None:
        raise UserError(f"{shown(folder)}: averages are written on this machine; give a local folder as --run")
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("a run is given twice; give each run once")
    if folder.exists():
        raise UserError(f"{shown(folder)} exists; choose another --run")
    check_ensemble(runs)
    for run in runs[1:]:
        if None in (run.init_from, runs[0].init_from) or run.init_from != runs[0].init_from:
            raise UserError(
                f"{shown(run.folder)} and {shown(runs[0].folder)} did not start from the same run, so the mean of "
                f"their parameters is useless; average runs with the same --init-from"
            )
    found = []
    for run in runs:
        run.check_weights()
        model = run.model(with_encoder=not uses_store(run.experiment), restored=True)
        found.append(restore_best(run.folder, split_trained(model)[1]))
    shapes = [jax.tree.map(jnp.shape, params) for params, _ in found]
    for run, shape in zip(runs, shapes, strict=True):
        if shape != shapes[0] or run.weights != runs[0].weights:
            raise UserError(
                f"{shown(run.folder)} and {shown(runs[0].folder)} have different architectures; only runs with the "
                f"same can be averaged"
            )
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *(params for params, _ in found))
    averaged = replace(runs[0], folder=folder)
    try:
        averaged.save()
        for name in OF_DATA:
            if (runs[0].folder / name).is_file():
                shutil.copyfile(runs[0].folder / name, folder / name)
        checkpoints = Checkpoints(folder, writing=True)
        checkpoints.save_best(max(step for _, step in found), mean)
        checkpoints.close()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return averaged
