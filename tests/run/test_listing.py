"""The list of runs: their status, epochs, scores and damages."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.files import OWNER, is_locked, lock_file
from imgcap_jax.run import finder, listing
from imgcap_jax.run.listing import RunSummary, list_runs, summarise
from imgcap_jax.training import checkpoints


def write_run(
    folder: Path, step: int | None = 10, *, metrics: list[dict[str, Any]] | None = None, **progress: Any
) -> Path:
    """A run of 2 epochs of 5 steps (40 images, batches of 8) without arrays; step: that of its newest checkpoint."""
    folder.mkdir(parents=True)
    experiment = {"data": {"batch_size": 8}, "training": {"epochs": 2.0, "patience": 3}}
    (folder / "experiment.json").write_text(json.dumps(experiment))
    if step is not None:
        state = folder / "checkpoints" / "newest" / str(step)
        state.mkdir(parents=True)
        data = {"sources": [["scenes", "train", 40, 1.0]]}
        found = {"step": step, "data": data, "best": 0.5, "misses": 0, "validation_due": False, **progress}
        (state / "validated.json").write_text(json.dumps(found))
        (state / "SHA256SUMS").write_text("# 0 files\n")
    lines = metrics if metrics is not None else [{"kind": "train", "step": step or 1, "loss": 2.0, "epoch": 0.2}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_names_are_those_that_training_writes() -> None:
    assert finder.CHECKPOINTS == checkpoints.CHECKPOINTS
    assert checkpoints._VALIDATED in listing._PROGRESS


def test_a_trained_run_is_finished(trained: Path) -> None:
    found = summarise(trained)
    assert (found.status, found.step, found.epoch, found.epochs, found.note) == ("finished", 10, 2.0, 2.0, "")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert found.best == max(line["CIDEr-D"] for line in lines if line["kind"] == "validation")
    assert found.size == sum(path.lstat().st_size for path in trained.rglob("*") if path.is_file())


def test_status(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "finished")
    write_run(runs / "early_stop", 6, misses=3)
    write_run(runs / "due", 10, validation_due=True)
    write_run(runs / "interrupted", 5)
    write_run(runs / "population" / "seed=0", None)
    write_run(runs / "study" / "a" / "seed=1", 5, metrics=[{"kind": "train", "step": 6, "loss": None}])
    (write_run(runs / "no_json") / "experiment.json").write_text("{")
    (write_run(runs / "no_experiment") / "experiment.json").unlink()
    (write_run(runs / "no_progress") / "checkpoints" / "newest" / "10" / "validated.json").write_text('{"step": "x"}')
    (write_run(runs / "bad_metrics") / "metrics.jsonl").write_bytes(b'\xff\n{"step"\n[]\n{"step": 3, "epoch": 0.6}\n{')
    write_run(runs / ".cache" / "hidden")
    write_run(runs / "finished" / "inner")
    (runs / "link").symlink_to(runs / "finished")
    found = {str(run.folder.relative_to(runs)): run for run in list_runs(runs)}
    assert {name: run.status for name, run in found.items()} == {
        "finished": "finished",
        "early_stop": "finished",
        "due": "interrupted",
        "interrupted": "interrupted",
        "population/seed=0": "no checkpoint",
        "study/a/seed=1": "failed",
        "no_json": "damaged",
        "no_experiment": "damaged",
        "no_progress": "damaged",
        "bad_metrics": "finished",
    }
    assert found["interrupted"].epoch == 1.0
    assert found["study/a/seed=1"].note == "the loss was not finite at step 6"
    assert "experiment.json" in found["no_experiment"].note


def test_a_run_is_in_training_while_its_folder_is_locked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5, metrics=[{"kind": "train", "step": 7, "loss": 1.0, "epoch": 1.4}])
    assert not is_locked(run / OWNER)
    assert not (run / OWNER).exists()
    lock = lock_file(run / OWNER)
    assert lock is not None
    with lock:
        found = summarise(run)
        assert (found.status, found.step, found.epoch) == ("training", 7, 1.4)
    assert summarise(run).status == "interrupted"  # the file of a killed process is left
    with (run / OWNER).open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert not is_locked(run / OWNER)


def test_command_prints_a_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(["runs"]) == "imgcap: runs is not a folder; give the folder of your runs, or train first"
    write_run(Path("runs/worse"), 5, best=0.25)
    write_run(Path("runs/better"), best=0.75)
    (write_run(Path("runs/bad")) / "experiment.json").write_text("{")
    assert main(["runs", "--sort", "score"]) == 0
    header, *rows, note = capsys.readouterr().out.splitlines()
    assert header.split() == ["runs", "status", "epoch", "best", "CIDEr-D", "changed", "size"]
    assert [row.split()[0] for row in rows] == ["better", "bad", "worse"]
    assert rows[2].split()[:6] == ["worse", "interrupted", "1.0", "of", "2", "25.0"]
    assert note.startswith("bad: experiment.json: ")
    assert main(["runs", "runs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["folder"] for run in found] == ["runs/bad", "runs/better", "runs/worse"]
    assert set(found[0]) == set(RunSummary.__dataclass_fields__)
    assert "exclude each other" in refused(["runs", "--json", "--watch"])
    Path("empty").mkdir()
    assert main(["runs", "empty"]) == 0
    assert capsys.readouterr().out == "no runs in empty\n"


def test_watch_ends_with_ctrl_c_and_imports_no_jax(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    program = (
        "import os, signal, sys, time, imgcap_jax.cli.main as m; "
        "time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGINT); "  # between two refreshes
        "code = m.main(sys.argv[1:]); "
        "print(code, [name for name in ('jax', 'flax', 'tensorflow') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", program, "runs", str(tmp_path), "--watch"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split()[:2] == ["run", "finished"]
    assert lines[-1] == "0 []"
