"""The average of runs (``imgcap average``)."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.models.model import split_trained
from imgcap_jax.run.folder import Run
from imgcap_jax.training.checkpoints import restore_best


def parameters(folder: Path) -> list[np.ndarray]:
    run = Run.load(folder)
    params, _ = restore_best(folder, split_trained(run.model(with_encoder=True, restored=True))[1])
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.fixture(scope="module")
def seeds(trained: Path, tiny_data: Path, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs that start from ``trained``, and one that starts from one of them."""
    folder = tmp_path_factory.mktemp("seeds")
    for name, start, seed in (("seed=0", trained, 0), ("seed=1", trained, 1), ("other", folder / "seed=0", 2)):
        given = ["--init-from", str(start), "--run", str(folder / name), "--training.seed", str(seed)]
        few = ["--training.epochs", "0.4", "--data.data-dir", str(tiny_data), "--optimizer.learning-rate", "0.01"]
        assert main(["train", str(tiny_file), *given, *few]) == 0
    return folder


def test_parameters_are_the_mean_of_those_of_the_runs(
    seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(seeds / name) for name in ("seed=0", "seed=1")]
    new = tmp_path / "mean"
    assert main(["average", *runs, "--run", str(new)]) == 0
    assert f"next: imgcap evaluate {new} --split val" in capsys.readouterr().out
    first, second, mean = (parameters(folder) for folder in (seeds / "seed=0", seeds / "seed=1", new))
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b, c in zip(first, second, mean, strict=True):
        np.testing.assert_allclose(c, (a + b) / 2, rtol=1e-6, atol=1e-7)
    assert main(["evaluate", str(new), "--split", "val"]) == 0
    assert len(json.loads((new / "captions_val.json").read_text())) == 8
    assert main(["runs", str(tmp_path)]) == 0
    assert "mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["seed=0"], "an average needs at least two runs"),
        (["seed=0", "seed=0"], "a run is given twice"),
        (["seed=0", "other"], "other and .*seed=0 did not start from the same run"),
    ],
)
def test_runs_that_cannot_be_averaged(
    seeds: Path, tmp_path: Path, runs: list[str], message: str, refused: Callable[..., str]
) -> None:
    line = refused(["average", *(str(seeds / name) for name in runs), "--run", str(tmp_path / "new")])
    assert re.search(message, line)
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_not_written(seeds: Path, refused: Callable[..., str]) -> None:
    line = refused(["average", str(seeds / "seed=0"), str(seeds / "seed=1"), "--run", str(seeds / "other")])
    assert "other exists; choose another --run" in line
