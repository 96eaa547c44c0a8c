"""Runs of self-critical training: the initial parameters, files and logs, and resuming after an interruption."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.sources import open_source
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, from_json, to_json
from imgcap_jax.metrics.cider_device import DocumentFrequencies
from imgcap_jax.models.model import split_trained
from imgcap_jax.run.evaluation import SplitEvaluator
from imgcap_jax.run.folder import Run
from imgcap_jax.text import tokenize
from imgcap_jax.train import Outcome, train
from imgcap_jax.training.checkpoints import Checkpoints
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical


@pytest.fixture
def experiment(tiny: Experiment) -> Experiment:
    """Six steps, with a validation after every third step."""
    return replace(
        tiny,
        objective=SelfCritical(samples=2, kl=0.1),
        optimizer=Optimizer("adam", 1e-2, warmup_epochs=0),
        training=replace(tiny.training, epochs=1.2, evaluate_epochs=0.6),
        decoding=replace(tiny.decoding, max_words=8),
    )


def run(experiment: Experiment, folder: Path, start: Path | None, show: Callable[[str], None] = print) -> Outcome:
    return train(experiment, folder, cache=folder.parent / "cache", init_from=start, show=show)


def newest(folder: Path) -> dict[str, np.ndarray]:
    return ocp.StandardCheckpointer().restore(folder / "checkpoints" / "newest" / "6" / "state")


def lines(folder: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "captions_per_second", "images_per_second")
    return [{name: value for name, value in line.items() if name not in times} for line in read]


@pytest.mark.slow
def test_interrupted_run_ends_the_same_without_its_initial_run(
    experiment: Experiment, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(experiment, tmp_path / "whole", trained)
    logged = lines(tmp_path / "whole")
    assert [line["step"] for line in logged if line["kind"] == "validation"] == [0, 3, 6]
    reported = {"reward", "reward_deviation", "baseline", "length", "ended", "bad_endings", "repeated_words"}
    reported |= {"surprisal", "kl"}
    steps = [line for line in logged if line["kind"] == "train"]
    assert len(steps) == 6
    assert all(reported < line.keys() for line in steps)
    assert abs(steps[0]["kl"]) < 1e-5 < abs(steps[-1]["kl"])  # the parameters are the initial ones, then they differ
    assert {"length", "bad_endings", "repetitions", "repeated_words", "unfinished"} < logged[0].keys()

    # The document frequencies are those of the training captions with eos.
    source = open_source("scenes", "train", experiment.data.data_dir)
    vocabulary = Run.load(tmp_path / "whole").vocabulary
    of = CaptionTable.as_references([source], vocabulary, eos=True).fingerprint
    idf = np.asarray(DocumentFrequencies.load(tmp_path / "whole" / "document_frequencies.npz", of).idf[0])
    for word in vocabulary.words[4:]:
        images = sum(any(word in tokenize(text) for text in source.captions(i)) for i in range(len(source)))
        np.testing.assert_allclose(idf[vocabulary.ids([word])[0]], np.log(len(source) / images), atol=1e-6)
    np.testing.assert_allclose(idf[2], 0.0, atol=1e-6)  # every image has eos

    shutil.copytree(trained, tmp_path / "gone")
    said: list[str] = []

    def stop(self: SplitEvaluator, *given: object) -> dict[str, float]:
        said.append("validation")
        if len(said) == 2:
            raise KeyboardInterrupt  # in the validation after step 3, before its checkpoint
        return forced(self, *given)  # type: ignore[arg-type]

    forced = SplitEvaluator.teacher_forced
    monkeypatch.setattr(SplitEvaluator, "teacher_forced", stop)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "cut", tmp_path / "gone")
    monkeypatch.setattr(SplitEvaluator, "teacher_forced", forced)
    shutil.rmtree(tmp_path / "gone")
    run(experiment, tmp_path / "cut", None)
    shown = lines(tmp_path / "cut")
    assert shown == logged
    ours, theirs = newest(tmp_path / "cut"), newest(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


def stop(*given: object, **named: object) -> None:
    raise KeyboardInterrupt


def test_run_killed_before_its_first_checkpoint_starts_again(
    experiment: Experiment, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files exist then, such as the initial parameters. The settings can still change."""
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path / "run", trained)
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path / "run", None)  # --init-from is not needed again
        with pytest.raises(UserError, match="give --init-from"):
            run(replace(experiment, objective=SelfCritical(samples=3)), tmp_path / "run", None)
    changed = replace(experiment, training=replace(experiment.training, epochs=0.1))
    assert run(changed, tmp_path / "run", trained).step == 1


def test_run_killed_in_its_first_validation_resumes(
    experiment: Experiment, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(experiment, training=replace(experiment.training, epochs=0.1))
    for moment in (SplitEvaluator, "caption"), (Checkpoints, "save_best"):
        with monkeypatch.context() as patch:
            patch.setattr(*moment, stop)
            with pytest.raises(KeyboardInterrupt):
                run(short, tmp_path / "run", trained)
    with pytest.raises(UserError, match="contains another experiment"):
        run(replace(short, objective=SelfCritical(samples=3)), tmp_path / "run", None)
    said: list[str] = []
    assert run(short, tmp_path / "run", None, said.append).step == 1
    assert "at step 0 of 1" in said[0]


@pytest.mark.slow
def test_best_checkpoint_is_the_initial_one_without_a_better_validation(
    experiment: Experiment, trained: Path, tmp_path: Path
) -> None:
    """A learning rate that spoils the parameters, and patience 1."""
    spoilt = replace(
        experiment,
        objective=SelfCritical(samples=2, baseline="greedy"),
        optimizer=Optimizer("sgd", 1e3, schedule="constant", warmup_epochs=0, clip_norm=None),
        training=replace(experiment.training, patience=1, ema_decay=0.0),
    )
    said: list[str] = []
    outcome = run(spoilt, tmp_path / "run", trained, said.append)
    assert outcome.step == 3
    assert "self-critical, STANDARD_wInit+Cider-D[n4,s6.0]+greedy[nspi2]+1.0.0" in "\n".join(said)
    best = []
    for folder in (tmp_path / "run", trained):
        checkpoints = Checkpoints(folder)
        _, params, _ = split_trained(Run.load(folder).model(with_encoder=True))
        best.append(checkpoints.restore_best(params))
        if folder != trained:
            assert checkpoints.best_step == 0
        checkpoints.close()
    for ours, theirs in zip(*map(jax.tree.leaves, best), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_objective_needs_init_from_and_is_stored_in_the_experiment(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --init-from RUN"):
        run(experiment, tmp_path / "run", None)
    assert from_json(to_json(experiment), "here") == experiment


def test_penalty_without_effect_is_refused_before_features_are_computed(
    experiment: Experiment, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgcap_jax.session.with_features", stop)
    monkeypatch.setattr("imgcap_jax.training.self_critical.FUNCTION_WORDS", frozenset())
    monkeypatch.setattr("imgcap_jax.training.self_critical.CONJUNCTIONS", frozenset())
    with pytest.raises(UserError, match=r"objective\.repetition has no effect"):
        run(replace(experiment, objective=SelfCritical(samples=2, repetition=0.1)), tmp_path / "run", trained)
