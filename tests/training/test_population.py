"""Populations, compared with the runs that they stand for, trained one by one."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.cli.populations import results, variants
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.model import split_trained
from imgcap_jax.population import train_population
from imgcap_jax.run.folder import Run
from imgcap_jax.train import Outcome, train
from imgcap_jax.training.checkpoints import Checkpoints, restore_best
from imgcap_jax.training.population import merged, with_values
from imgcap_jax.training.self_critical import SelfCritical

TIMES = ("seconds", "captions_per_second", "images_per_second")


@pytest.fixture(scope="module")
def experiment(tiny: Experiment) -> Experiment:
    """Five steps per epoch, validated twice; members of different learning rates stop at different validations."""
    training = replace(tiny.training, epochs=2.0, evaluate_epochs=1.0)
    return replace(tiny, decoder=ShowTell(hidden_size=16, embedding_size=16, dropout=0.3), training=training)


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def best(folder: Path) -> list[np.ndarray]:
    params, _ = restore_best(folder, split_trained(Run.load(folder).model(with_encoder=True))[1])
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert_close(lines(ours), lines(theirs), best(ours), best(theirs))
    assert Run.load(ours).experiment == Run.load(theirs).experiment


def assert_close(ours: list[Any], theirs: list[Any], parameters: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Metrics and parameters agree to the rounding of float32."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            same = value == b[name] if isinstance(value, str) else value == pytest.approx(b[name], rel=2e-4, abs=1e-5)
            assert same, (name, value, b[name])
    for found, wanted in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def population(experiment: Experiment, text: str, folder: Path, **options: Any) -> list[Any]:
    members = variants(experiment, text)
    train_population(members, folder, cache=folder / "cache", show=lambda line: None, **options)
    return members


@pytest.mark.parametrize(
    "text",
    [
        "training.seed=0,1 optimizer.learning_rate=1e-3,5e-3 decoder.dropout=0,0.2",
        pytest.param("training.seed=0..7", marks=pytest.mark.slow),
        pytest.param("optimizer.weight_decay=0,0.1 objective.label_smoothing=0.0,0.1", marks=pytest.mark.slow),
    ],
)
def test_each_member_is_the_run_that_it_stands_for(experiment: Experiment, text: str, tmp_path: Path) -> None:
    members = population(experiment, text, tmp_path / "together")
    # Eight single runs take minutes.
    for member in members if "seed=0..7" in text else members[1::4] or members[1:]:
        alone = tmp_path / "alone" / member.name
        train(member.experiment, alone, cache=tmp_path / "cache", show=lambda line: None)
        assert_same_run(tmp_path / "together" / member.name, alone)
    first, second = (lines(tmp_path / "together" / member.name) for member in members[:2])
    assert first != second


def test_an_interrupted_population_resumes_from_different_checkpoints(experiment: Experiment, tmp_path: Path) -> None:
    """One member is finished, and another one has lost its newest checkpoint."""
    text = "training.seed=3,4"
    expected = population(experiment, text, tmp_path / "whole")
    folders = [tmp_path / "whole" / member.name for member in expected]
    before = [(lines(folder), best(folder)) for folder in folders]
    shutil.rmtree(folders[1] / "checkpoints" / "newest" / "10")
    said: list[str] = []
    train_population(expected, tmp_path / "whole", cache=tmp_path / "cache", show=said.append)
    assert any(line.startswith("resuming") and "step 9 of 10" in line for line in said)
    for folder, (of_lines, of_best) in zip(folders, before, strict=True):
        assert_close(lines(folder), of_lines, best(folder), of_best)


def test_a_member_that_stops_early_is_not_changed_any_more(experiment: Experiment, tmp_path: Path) -> None:
    """A learning rate that changes nothing lets no validation be better than the first one."""
    patient = replace(experiment, training=replace(experiment.training, epochs=3.0, patience=1, ema_decay=0.0))
    members = variants(patient, "optimizer.learning_rate=1e-30,5e-3")
    outcomes = train_population(members, tmp_path / "runs", cache=tmp_path / "cache", show=lambda line: None)
    early, late = (outcomes[member.name] for member in members)
    assert early.step < late.step
    newest = [Checkpoints(tmp_path / "runs" / member.name).step for member in members]
    assert newest == [early.step, late.step]
    assert lines(tmp_path / "runs" / members[0].name)[-1]["step"] == early.step


@pytest.mark.slow
def test_a_self_critical_population_varies_temperature_and_kl(experiment: Experiment, tmp_path: Path) -> None:
    train(experiment, tmp_path / "start", cache=tmp_path / "cache", show=lambda line: None)
    critical = replace(experiment, objective=SelfCritical(samples=3))
    with pytest.raises(UserError, match=r"objective\.kl cannot differ.*initial parameters"):
        population(critical, "objective.kl=0.0,0.1", tmp_path / "refused", init_from=tmp_path / "start")
    text = "objective.temperature=0.7,1.0 objective.kl=0.05,0.1"
    members = population(critical, text, tmp_path / "together", init_from=tmp_path / "start")
    for member in members[::3]:
        alone = tmp_path / "alone" / member.name
        options: Any = {"cache": tmp_path / "cache", "show": lambda line: None, "init_from": tmp_path / "start"}
        train(member.experiment, alone, **options)
        assert_same_run(tmp_path / "together" / member.name, alone)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training.seed", "malformed"),
        ("training.seed=5..2", "the first value is larger"),
        ("training.seed=1", "has one member"),
        ("training.seed=0..x", "'0..x' is no range of whole numbers"),
        ("training.seed=1,1", "seed=1 is given twice"),
        ("training.sed=1,2", "did you mean --training.seed"),
        ("training.seed=1,x", "must be a whole number"),
        ("data.batch_size=4,8", "data.batch_size cannot differ between members"),
        ("objective.label_smoothing=0,2", "--objective.label-smoothing is 2.0"),
        ("optimizer.algorithm=adam,sgd", "only numbers that can have a fraction can differ"),
        ("decoder.hidden_size=8,16", "decoder.hidden_size cannot differ"),
        ("optimizer.accumulate=1,2", "optimizer.accumulate is 1, which decides what is computed"),
        ("training.seed=0..100000000", "has more than 1000 members"),
        ("optimizer.warmup_epochs=0,1", "optimizer.warmup_epochs cannot differ"),
    ],
)
def test_bad_populations_are_an_error(experiment: Experiment, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        population(experiment, text, tmp_path / "runs")


def test_shared_leaves_are_stored_once() -> None:
    trees = [{"a": np.ones(3), "b": np.float32(number)} for number in range(2)]
    joined, shared = merged(trees)
    assert shared == {"a": True, "b": False}
    assert joined["a"] is trees[0]["a"]
    np.testing.assert_array_equal(joined["b"], [0, 1])


def test_values_replace_fields_without_checks(experiment: Experiment) -> None:
    changed = with_values(experiment, {"optimizer.learning_rate": -1.0, "decoder.dropout": 3.0})
    assert (changed.optimizer.learning_rate, changed.decoder.dropout) == (-1.0, 3.0)  # type: ignore[attr-defined]
    assert replace(changed, optimizer=experiment.optimizer, decoder=experiment.decoder) == experiment
    assert experiment.decoder.dropout == 0.3  # type: ignore[attr-defined]


def test_the_command_names_the_best_member(
    tiny_file: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs"
    arguments = [
        "train",
        str(tiny_file),
        "--run",
        str(run),
        "--data.data-dir",
        str(tiny_data),
        "--training.epochs",
        "0.4",
    ]
    assert main([*arguments, "--population", "training.seed=0..1"]) == 0
    out = capsys.readouterr().out
    assert "a population of 2 runs that differ in training.seed" in out
    assert out.count("2 steps, best validation CIDEr-D") == 2
    assert out.count("(highest)") <= 1  # none if the scores are equal
    assert re.search(r"^mean \d+\.\d, standard deviation \d+\.\d over 2 seeds$", out, re.MULTILINE)
    assert f"next: imgcap evaluate {run} --split" in out


def test_options_of_fields_that_differ_are_refused(experiment: Experiment) -> None:
    for given in (["--training.seed", "3"], ["--training.seed=3"]):
        with pytest.raises(UserError, match=r"--training\.seed has no effect; leave out one of them"):
            variants(experiment, "training.seed=0..1", given)
    assert len(variants(experiment, "training.seed=0..1", ["--training.epochs", "3"])) == 2


def test_the_highest_score_is_named_unless_it_is_a_tie(experiment: Experiment) -> None:
    def lines(text: str, *scores: float | None) -> list[str]:
        members = variants(experiment, text)
        found = zip(members, scores, strict=True)
        return results(members, {member.name: Outcome(4, score, None) for member, score in found})

    assert lines("training.seed=8..10", 0.493, 0.499, 0.505) == [
        "seed=8   4 steps, best validation CIDEr-D 49.3",
        "seed=9   4 steps, best validation CIDEr-D 49.9",
        "seed=10  4 steps, best validation CIDEr-D 50.5  (highest)",
        "mean 49.9, standard deviation 0.6 over 3 seeds",
    ]
    assert not any("highest" in line for line in lines("training.seed=0,1,2", 0.5, 0.5, 0.4))
    assert len(lines("decoder.dropout=0,0.1", 0.5, 0.4)) == 2
    assert len(lines("training.seed=0,1", 0.5, None)) == 2
