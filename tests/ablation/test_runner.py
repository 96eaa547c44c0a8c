"""Studies that are run: what they compute, in which ways, and what happens to runs that fail or are interrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.ablation.estimate import time_run
from imgcap_jax.ablation.records import Record, current_results, evaluated_source, result_files
from imgcap_jax.ablation.runner import Ablation, ablate, check_study, missing_results
from imgcap_jax.ablation.runs import runs_of
from imgcap_jax.ablation.statistics import study_table
from imgcap_jax.cli.main import main
from imgcap_jax.errors import UserError
from imgcap_jax.files import owning
from imgcap_jax.study import Factor, Study

TRAINED = ["base/seed=0", "base/seed=1", "size=12/seed=0", "size=12/seed=1"]
FAILING = ["rate=infinite/seed=0", "rate=infinite/seed=1"]


def run(study: Study, folder: Path, **options: Any) -> tuple[Ablation, list[str]]:
    lines: list[str] = []
    return ablate(study, folder, cache=folder / "cache", show=lines.append, **options), lines


def record_of(study: Study, name: str, folder: Path) -> Record:
    (run_of,) = [one for one in runs_of(study) if one.name == name]
    record, _ = current_results(folder, run_of, evaluated_source(study))
    assert record is not None
    return record


def values(study: Study, folder: Path) -> dict[str, dict[str, tuple[float, ...]]]:
    rows = study_table(study, folder).rows
    return {row.setting.name: {name: score.values for name, score in row.scores.items()} for row in rows}


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ablation, list[str]]:
    """The study, one run after another."""
    folder = tmp_path_factory.mktemp("study")
    return folder, *run(study, folder)


def test_failed_runs_do_not_stop_the_others(study: Study, finished: tuple[Path, Ablation, list[str]]) -> None:
    folder, done, lines = finished
    assert sorted(done.finished) == TRAINED
    assert sorted(done.failed) == FAILING
    assert all("the loss is" in reason for reason in done.failed.values())
    assert any(line.startswith("  rate=infinite/seed=0 failed: the loss is") for line in lines)
    table = study_table(study, folder)
    assert (table.runs, table.finished, sorted(table.failed)) == (6, 4, FAILING)
    assert [len(row.seeds) for row in table.rows] == [2, 2, 0, 2]


def test_the_table_has_the_scores_of_the_runs(study: Study, finished: tuple[Path, Ablation, list[str]]) -> None:
    """Those that ``imgcap evaluate`` wrote: single decodings with captions, several ones as a sweep."""
    folder = finished[0]
    found = values(study, folder)
    for number, seed in enumerate(study.seeds):
        alone = json.loads((folder / f"size=12/seed={seed}" / "scores_val.json").read_text())
        assert found["size=12"]["CIDEr-D"][number] == pytest.approx(alone["scores"]["CIDEr-D"], abs=1e-6)
        assert found["size=12"]["true"][number] == pytest.approx(alone["truth"]["true"], abs=1e-6)
        sweep = json.loads((folder / f"base/seed={seed}" / "sweep_val.json").read_text())
        by_beam = {one["decoding"]["beam"]: one["scores"] for one in sweep}
        assert found["base"]["BLEU-4"][number] == pytest.approx(by_beam[2]["BLEU-4"], abs=1e-6)
        assert found["beam=1"]["BLEU-4"][number] == pytest.approx(by_beam[1]["BLEU-4"], abs=1e-6)


def test_finished_runs_are_skipped_and_failed_ones_tried_again(
    study: Study, finished: tuple[Path, Ablation, list[str]]
) -> None:
    folder = finished[0]
    before = result_files(folder)
    done, lines = run(study, folder)
    assert len(before) == 4
    assert result_files(folder) == before
    assert sorted(done.finished) == TRAINED
    assert [line for line in lines if line.startswith("training")] == [f"training {name}" for name in FAILING]
    assert sum("failed before (the loss is" in line for line in lines) == 2


def test_a_new_decoding_needs_no_training(study: Study, finished: tuple[Path, Ablation, list[str]]) -> None:
    folder = finished[0]
    beams = Factor("beam", {"1": {"decoding.beam": 1}, "3": {"decoding.beam": 3}})
    wider = replace(study, factors=(beams,))
    before = json.loads((folder / "base/seed=0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert [missing_results(run, folder, evaluated_source(wider)) for run in runs_of(wider)] == [["beam=3"], ["beam=3"]]
    done, _ = run(wider, folder)
    assert sorted(done.finished) == TRAINED[:2]
    assert json.loads((folder / "base/seed=0" / "metrics.jsonl").read_text().splitlines()[-1]) == before
    assert {*record_of(wider, "base/seed=0", folder).results} == {"base", "beam=1", "beam=3"}


def test_a_population_gives_the_same_table(
    study: Study, finished: tuple[Path, Ablation, list[str]], tmp_path: Path
) -> None:
    """Members that fail are found by training smaller groups."""
    done, lines = run(study, tmp_path, together=8)
    assert sorted(done.finished) == TRAINED
    assert sorted(done.failed) == FAILING
    assert "training 4 runs as one program, from base/seed=0" in lines
    ours, expected = values(study, tmp_path), values(study, finished[0])
    assert ours.keys() == expected.keys()
    for name, scores in expected.items():
        assert ours[name] == {score: pytest.approx(of, abs=1e-6) for score, of in scores.items()}
    assert record_of(study, "size=12/seed=0", tmp_path).together == 2


def test_shards_divide_the_runs(study: Study, finished: tuple[Path, Ablation, list[str]], tmp_path: Path) -> None:
    """The runs are trained already, so that they are only evaluated."""
    folder = tmp_path / "study"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "results")
    able = replace(study, factors=study.factors[::2])
    first, _ = run(able, folder, shard=(1, 2))
    second, _ = run(able, folder, shard=(2, 2))
    assert len(first.finished) == len(second.finished) == 2
    assert sorted([*first.finished, *second.finished]) == TRAINED
    assert (first.elsewhere, second.elsewhere) == (second.finished, first.finished)
    expected = values(study, finished[0])
    assert values(able, folder) == {name: expected[name] for name in ("base", "size=12", "beam=1")}


def test_a_run_of_another_process_is_left_to_it(study: Study, tmp_path: Path) -> None:
    small = replace(study, factors=study.factors[2:])
    with owning(tmp_path / ".claims" / "base/seed=0", "training"), owning(tmp_path / ".claims" / "base/seed=1", "t"):
        done, _ = run(small, tmp_path)
    assert done == Ablation(elsewhere=["base/seed=0", "base/seed=1"])


def test_another_study_in_the_folder_is_refused(study: Study, finished: tuple[Path, Ablation, list[str]]) -> None:
    changed = replace(study, base=replace(study.base, data=replace(study.base.data, captions_per_image=2)))
    with pytest.raises(UserError, match=r"base/seed=0 contains another experiment \(data.captions_per_image: 3 -> 2"):
        check_study(changed, finished[0], None)
    with pytest.raises(UserError, match="is a run; the runs of a study are in a folder"):
        check_study(study, finished[0] / "base" / "seed=0", None)


def test_all_runs_have_the_same_start(study: Study, finished: tuple[Path, Ablation, list[str]], tmp_path: Path) -> None:
    start, folder = finished[0] / "base" / "seed=0", tmp_path / "study"
    one = replace(study, factors=study.factors[2:], seeds=(0,))
    with pytest.raises(UserError, match="start from another run; name it with --init-from"):
        check_study(replace(one, from_run=True), folder, None)
    run(one, folder, init_from=start)
    assert study_table(one, folder).start == str(start)
    more = replace(one, seeds=(0, 1))
    with pytest.raises(UserError, match=r"seed=0 started from .*; give --init-from "):
        run(more, folder)
    with pytest.raises(UserError, match=r"seed=0 started from .*, not from "):
        run(more, folder, init_from=finished[0] / "base" / "seed=1")
    with pytest.raises(UserError, match="started from fresh weights, not from "):
        run(study, finished[0], init_from=start)


def test_results_of_other_runs_are_not_used(
    study: Study, finished: tuple[Path, Ablation, list[str]], tmp_path: Path
) -> None:
    """The advice of an error is to delete a run that has changed: its results are then out of date."""
    folder, small = tmp_path / "study", replace(study, factors=study.factors[2:])
    shutil.copytree(finished[0], folder)
    source = evaluated_source(small)
    first, second = runs_of(small)
    assert not missing_results(first, folder, source)
    slower = replace(small, base=replace(small.base, optimizer=replace(small.base.optimizer, learning_rate=1e-5)))  # type: ignore[type-var]
    shutil.rmtree(folder / "base" / "seed=0")
    assert missing_results(first, folder, source) == ["base", "beam=1"]
    shutil.copytree(finished[0] / "base" / "seed=1", folder / "base" / "seed=0")  # another run
    assert missing_results(runs_of(slower)[0], folder, source) == ["base", "beam=1"]
    assert not missing_results(second, folder, source)
    test = replace(small, split="test")
    assert missing_results(second, folder, evaluated_source(test)) == ["base", "beam=1"]
    wider = replace(small, base=replace(small.base, decoding=replace(small.base.decoding, beam=5)))
    assert [len(row.seeds) for row in study_table(test, folder).rows] == [0, 0]
    assert study_table(wider, folder).finished == 0
    best = folder / "base" / "seed=1" / "checkpoints" / "best"
    shutil.move(best, tmp_path / "best")
    assert missing_results(second, folder, source) == ["base", "beam=1"]


def test_the_time_of_a_population_survives_an_interruption(study: Study, tmp_path: Path) -> None:
    """Killed between the evaluations of its members: the rest is only evaluated, and the time is divided as before."""
    small = replace(study, factors=study.factors[2:])
    run(small, tmp_path, together=2)
    before = record_of(small, "base/seed=1", tmp_path)
    assert before.together == 2
    (tmp_path / "results" / "base" / "seed=1.json").unlink()
    _, lines = run(small, tmp_path, together=2)
    assert not any(line.startswith("training") for line in lines)
    after = record_of(small, "base/seed=1", tmp_path)
    assert (after.together, after.minutes) == (before.together, before.minutes)


def test_a_damaged_result_is_named(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "results" / "base" / "seed=0.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"seed": 0')
    with pytest.raises(UserError, match=r"results/base/seed=0.json"):
        study_table(study, tmp_path)


def test_errors_of_the_disk_are_no_other_process(study: Study, tmp_path: Path) -> None:
    (tmp_path / ".claims").write_text("")
    with pytest.raises(UserError, match=r"\.claims"):
        run(study, tmp_path)


def test_unknown_scores_are_refused_before_training(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the score 'CIDEr', which does not exist; did you mean CIDEr-D"):
        run(replace(study, scores=("CIDEr",)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_timed_steps(study: Study) -> None:
    timed = time_run(study.base, init_from=None)
    assert (timed.steps, timed.validations) == (5, 1)
    assert timed.step_seconds > 0
    assert timed.seconds > timed.start_seconds > 0


STUDY = """
from dataclasses import replace

from tiny import experiment
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.study import Factor, Study

base = replace(
    experiment,
    decoder=ShowTell(hidden_size=8, embedding_size=8, dropout=0.3),
    training=replace(experiment.training, epochs=EPOCHS),
)
study = Study(
    base,
    (Factor("beam", {"1": {"decoding.beam": 1}}), *MORE),
    seeds=(0, 1),
    scores=("CIDEr-D", "true"),
)
"""

RATE = 'Factor("rate", {"low": {"optimizer.learning_rate": 1e-5}})'


def study_of(*, epochs: int, more: str = "") -> str:
    """A file with a study of two runs, or four with the rate."""
    return STUDY.replace("EPOCHS", str(epochs)).replace("*MORE", more)


@pytest.fixture
def command(tiny_file: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``ablate`` with a study of two runs."""
    (tmp_path / "tiny.py").write_text(tiny_file.read_text())
    (tmp_path / "my_study.py").write_text(study_of(epochs=1))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_data))
    return ["ablate", str(tmp_path / "my_study.py"), "--run", str(tmp_path / "runs")]


def test_command(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], forget_code: Any) -> None:
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 settings, 2 runs in " in said
    assert "0 finished, 0 to resume, 2 to start" in said
    assert not (tmp_path / "runs").exists()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 runs: 2 finished" in said
    assert "difference of CIDEr-D to the base" in said
    names = {path.name for path in (tmp_path / "runs").iterdir() if path.is_file()}
    assert names == {"table.md", "table.tex", "table.csv", "table.json", "differences.png"}
    assert main([*command, "--dry-run"]) == 0
    assert "2 finished, 0 to resume, 0 to start" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "3/2"], "--shard is '3/2'"),
        (["--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["--together", "0"], "--together is 0"),
        (["--devices", "a"], "--devices is 'a'"),
        (["--devices", "0,1,2", "--jobs", "2"], "3 devices cannot be divided among 2 jobs"),
    ],
)
def test_wrong_options(command: list[str], arguments: list[str], message: str, refused: Any, forget_code: Any) -> None:
    assert message in refused([*command, *arguments])


def test_names_of_experiments_and_studies(refused: Any) -> None:
    assert "flickr8k is no study but an experiment: imgcap train flickr8k" in refused(["ablate", "flickr8k"])
    assert "flickr8k_short is no experiment but a study" in refused(["train", "flickr8k_short"])
    assert "no study 'nothing'; give a .py file or one of " in refused(["ablate", "nothing"])


def start(command: list[str], *more: str) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-m", "imgcap_jax.cli.main", *command, *more]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def scores(folder: Path) -> list[Any]:
    """The table without times."""
    return [
        [row["setting"], row["seeds"], row["scores"]] for row in json.loads((folder / "table.json").read_text())["rows"]
    ]


def test_settings_are_compared_over_seeds(
    study: Study,
    finished: tuple[Path, Ablation, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Any,
) -> None:
    folder, _, _ = finished
    base, size = str(folder / "base"), str(folder / "size=12")
    assert main(["compare", base, size, "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("2 seeds") == 2
    assert "captioned now" not in printed  # the captions of the study are reused
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"] == ["decoder.hidden_size: 8 -> 12"]
    for place, name in (("other", "base"), ("ours", "size=12")):
        expected = values(study, folder)[name]["CIDEr-D"]
        assert found["differences"]["CIDEr-D"][place] == pytest.approx(sum(expected) / 2)
    assert "they share the runs there" in refused(["compare", base, str(folder / "beam=1")])
    assert "has no best parameters" in refused(["compare", base, str(folder / "rate=infinite")])


@pytest.mark.slow
def test_killed_studies_and_parallel_shards_end_in_the_same_table(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "my_study.py").write_text(study_of(epochs=8, more=RATE))
    whole = start([*command[:-1], str(tmp_path / "whole")])
    assert "4 finished" in whole.communicate()[0]
    expected = scores(tmp_path / "whole")

    moments = random.Random(0)
    for number in range(8):
        killed = start(command)
        time.sleep(moments.uniform(3, 25))
        killed.send_signal(signal.SIGKILL if number % 3 else signal.SIGTERM)
        killed.communicate()
    last = start(command)
    assert "4 finished" in last.communicate()[0]
    assert scores(tmp_path / "runs") == expected

    shards = [start([*command[:-1], str(tmp_path / "shards")], "--shard", f"{number}/2") for number in (1, 2)]
    assert all(shard.communicate() and shard.returncode == 0 for shard in shards)
    assert scores(tmp_path / "shards") == expected

    jobs = start([*command[:-1], str(tmp_path / "jobs")], "--jobs", "2")
    said, _ = jobs.communicate()
    assert jobs.returncode == 0, said
    assert scores(tmp_path / "jobs") == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to stop the jobs of a killed process")
def test_jobs_of_a_killed_process_stop(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "my_study.py").write_text(study_of(epochs=200))
    parent = start(command, "--jobs", "2")
    assert parent.stdout is not None
    for line in parent.stdout:
        if "training base" in line:
            break
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    ends = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < ends, "a job goes on"
        time.sleep(0.5)
