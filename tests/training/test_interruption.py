"""Signals during a validation, and restarts on other devices."""

import json
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from imgcap_jax.cli.interruption import lost_process
from imgcap_jax.experiment import Experiment
from imgcap_jax.metrics.scoring import Scores
from imgcap_jax.run.evaluation import SplitEvaluator
from imgcap_jax.train import Outcome, train
from imgcap_jax.training.checkpoints import Checkpoints, Progress, latest_step
from imgcap_jax.training.orbax_files import read_progress
from imgcap_jax.training.parallel import DataParallel


def run(experiment: Experiment, folder: Path, say: Callable[[str], None] = lambda line: None) -> Outcome:
    return train(experiment, folder, cache=folder.parent / "cache", show=say)


def state(folder: Path, kind: str = "newest") -> dict[str, np.ndarray]:
    step = latest_step(folder / "checkpoints" / kind)
    item = "state" if kind == "newest" else "default"
    return ocp.StandardCheckpointer().restore(folder / "checkpoints" / kind / str(step) / item)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    times = ("seconds", "captions_per_second", "images_per_second")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in times} for line in found]


def newest(folder: Path) -> Progress:
    step = latest_step(folder / "checkpoints" / "newest")
    saved = folder / "checkpoints" / "newest" / str(step)
    if (saved / "validated.json").exists():
        return Progress.parse((saved / "validated.json").read_text())
    return Progress.parse(read_progress(saved))


def assert_same(ours: Path, theirs: Path) -> None:
    for kind in ("newest", "best"):
        assert latest_step(ours / "checkpoints" / kind) == latest_step(theirs / "checkpoints" / kind)
        got, expected = state(ours, kind), state(theirs, kind)
        assert got.keys() == expected.keys()
        for name, leaf in expected.items():
            np.testing.assert_array_equal(got[name], leaf, err_msg=f"{kind} {name}")
    assert lines(ours) == lines(theirs)
    assert (ours / "samples.jsonl").read_bytes() == (theirs / "samples.jsonl").read_bytes()


def test_validation_stops_between_batches_and_is_repeated(
    tiny: Experiment, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped during the validation after the first epoch, and again in the repeated one; then like ``trained``."""
    folder = tmp_path / "run"
    score = SplitEvaluator.score
    said: list[str] = []

    def interrupted(evaluator: SplitEvaluator, captions: Mapping[int, str]) -> Scores:
        signal.raise_signal(signal.SIGTERM)
        return score(evaluator, captions)

    monkeypatch.setattr(SplitEvaluator, "score", interrupted)
    for _ in range(2):
        outcome = run(tiny, folder, said.append)
        assert (outcome.step, outcome.interrupted) == (5, signal.SIGTERM)
        assert newest(folder).validation_due
        assert latest_step(folder / "checkpoints" / "best") is None
        assert [line for line in lines(folder) if line["kind"] == "validation"] == []
    assert said.count("stopping; everything up to step 5 is saved") == 2
    monkeypatch.undo()
    assert run(tiny, folder).step == 10
    assert not newest(folder).validation_due
    assert_same(folder, trained)
    before = (folder / "metrics.jsonl").read_bytes()
    assert run(tiny, folder).step == 10  # nothing is due
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_damaged_newest_checkpoint_costs_steps_and_nothing_else(
    tiny: Experiment, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best parameters and the lines of metrics after the checkpoint before are computed again."""
    folder = tmp_path / "run"
    validated = Checkpoints.save_validated

    def fail(checkpoints: Checkpoints, progress: Progress) -> None:
        validated(checkpoints, progress)
        if progress.step == 10:
            raise KeyboardInterrupt  # killed after all of it

    monkeypatch.setattr(Checkpoints, "save_validated", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, folder)
    monkeypatch.undo()
    checkpoint = folder / "checkpoints" / "newest" / "10"
    (checkpoint / "state" / "manifest.ocdbt").write_bytes(b"")
    said: list[str] = []
    assert run(tiny, folder, said.append).step == 10
    assert [line for line in said if line.startswith("note: ")] == [
        f"note: the checkpoint {checkpoint} is damaged (state/manifest.ocdbt has changed; it is kept in "
        f"{folder / 'checkpoints' / 'damaged' / 'newest_10_1'}); continuing from step 9"
    ]
    assert_same(folder, trained)


@pytest.mark.slow
def test_run_is_resumed_on_other_devices(
    tiny: Experiment, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers to rounding on four devices, then two, then one."""
    folder = tmp_path / "run"
    save = Checkpoints.save

    def stop(checkpoints: Checkpoints, state: Any, progress: Progress) -> None:
        save(checkpoints, state, progress)
        if progress.step in (3, 7):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", stop)
    for count, last in ((4, 4), (2, 8), (1, 10)):
        monkeypatch.setattr("imgcap_jax.train.DataParallel", partial(DataParallel, devices=jax.devices()[:count]))
        assert run(tiny, folder).step == last
    for name, leaf in state(trained).items():
        np.testing.assert_allclose(state(folder)[name], leaf, atol=1e-5, err_msg=name)
    for ours, theirs in zip(lines(folder), lines(trained), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5) if name != "kind" else None


def test_error_of_a_lost_process_is_one_line_whatever_its_type() -> None:
    # Of a compiled function that is called again, and for the first time.
    text = "UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:15266"
    for error in (jax.errors.JaxRuntimeError(text), ValueError(text)):
        assert lost_process(error).startswith("another process has ended, or can't be reached (UNKNOWN: Gloo")
    for error in (ValueError("NCCL is no word"), ValueError("UNKNOWN: x"), RuntimeError(text)):
        assert lost_process(error) == ""
