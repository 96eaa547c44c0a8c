"""The training loop: early stopping, the best parameters, the lock of a run, and initial parameters of another run."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from imgcap_jax.data.sources import open_source
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.files import owning
from imgcap_jax.metrics.scoring import Scores
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.models.model import split_trained
from imgcap_jax.run.evaluation import SplitEvaluator
from imgcap_jax.run.folder import Run
from imgcap_jax.run.validation import select
from imgcap_jax.train import Outcome, _check_restored, train
from imgcap_jax.training.checkpoints import Checkpoints, Progress
from imgcap_jax.training.step import TrainState, first_state


@pytest.fixture
def experiment(tiny: Experiment) -> Experiment:
    """Ten steps, five per epoch, with a validation after every second step."""
    return replace(tiny, training=replace(tiny.training, evaluate_epochs=0.4))


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list of numbers that validations return as their CIDEr-D, one after the other."""
    values: list[float] = []

    def score(self: SplitEvaluator, captions: Mapping[int, str]) -> Scores:
        return Scores({"CIDEr-D": values.pop(0), "BLEU-4": 0.0}, {}, "none", ())

    monkeypatch.setattr(SplitEvaluator, "score", score)
    return values


def run(experiment: Experiment, folder: Path, **options: Any) -> Outcome:
    return train(experiment, folder, cache=folder.parent / "cache", show=lambda line: None, **options)


def best(folder: Path) -> tuple[int | None, list[np.ndarray]]:
    _, params, _ = split_trained(Run.load(folder).model(with_encoder=True))
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore_best(params)
    checkpoints.close()
    return checkpoints.best_step, [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


@pytest.mark.slow
def test_patience_survives_a_restart(
    experiment: Experiment, scores: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = replace(experiment, training=replace(experiment.training, patience=2))
    scores[:] = [0.3, 0.2]

    def stop(self: SplitEvaluator, *_: object) -> dict[str, float]:
        if not scores:
            raise KeyboardInterrupt  # in the validation after step 4, before its result is saved
        return {"teacher_forced_loss": 0.0, "teacher_forced_perplexity": 1.0}

    monkeypatch.setattr(SplitEvaluator, "teacher_forced", stop)
    with pytest.raises(KeyboardInterrupt):
        run(patient, tmp_path / "run")
    scores[:] = [0.2, 0.25, 0.9, 0.9]
    outcome = run(patient, tmp_path / "run")
    assert (outcome.step, outcome.best) == (6, 0.3)
    assert best(tmp_path / "run")[0] == 2
    assert scores == [0.9, 0.9]
    assert run(patient, tmp_path / "run").step == 6  # it does not continue


def test_best_checkpoint_is_that_of_the_best_validation(
    experiment: Experiment, scores: list[float], tmp_path: Path
) -> None:
    scores[:] = [0.1, 0.5, 0.4, 0.45, 0.2]
    outcome = run(experiment, tmp_path / "run")
    assert (outcome.step, outcome.best) == (10, 0.5)
    step, params = best(tmp_path / "run")
    assert step == 4
    shorter = replace(experiment.training, epochs=2.0, patience=1)
    scores[:] = [0.1, 0.5, 0.4]
    run(replace(experiment, training=shorter), tmp_path / "other")
    for ours, other in zip(params, best(tmp_path / "other")[1], strict=True):
        np.testing.assert_array_equal(ours, other)


def test_equal_cider_is_decided_by_bleu_then_loss_then_time() -> None:
    """Without that, the first validation remains the best forever if CIDEr-D is 0 for every caption."""

    def after(*validations: tuple[float, float, float]) -> tuple[int | None, int, list[str]]:
        progress, note = Progress(step=0, data={}), [""]
        for step, (cider, bleu, loss) in enumerate(validations, 1):
            scores = {"CIDEr-D": cider, "BLEU-4": bleu, "teacher_forced_loss": loss}
            # A checkpoint between the validations stores the progress as JSON.
            progress = Progress(**json.loads(json.dumps(asdict(replace(progress, step=step)))))
            progress, note = select(replace(progress, best_ties=tuple(progress.best_ties)), scores)
        return progress.best_step, progress.misses, note

    assert after((0.5, 0.1, 3.0), (0.4, 0.9, 1.0)) == (1, 1, [])
    assert after((0.4, 0.9, 1.0), (0.5, 0.1, 3.0)) == (2, 0, [])
    best, misses, [note] = after((0.0, 0.1, 3.0), (0.0, 0.2, 4.0))
    assert (best, misses) == (2, 0)
    assert "BLEU-4 is higher" in note
    best, misses, [note] = after((0.0, 0.2, 3.0), (0.0, 0.1, 1.0))
    assert (best, misses) == (1, 1)
    assert "of step 1, which are better" in note
    assert after((0.0, 3.4e-13, 3.0), (0.0, 2.2e-13, 2.0))[0] == 2  # BLEU-4 is 0 except for rounding
    best, misses, [note] = after((0.0, 0.0, 3.0), (0.0, 0.0, 2.0))
    assert (best, misses) == (2, 0)
    assert "loss is lower" in note
    assert after((0.0, 0.0, 2.0), (0.0, 0.0, 3.0))[:2] == (1, 1)
    # Equal in everything: the later one is kept, but patience runs.
    best, misses, [note] = after((0.0, 0.0, 2.0), (0.0, 0.0, 2.0), (0.0, 0.0, 2.0))
    assert (best, misses) == (3, 2)
    assert "later" in note


def test_run_from_before_ties_were_stored_is_continued() -> None:
    old = Progress(**json.loads('{"step": 2, "data": {}, "best": 0.0, "best_step": 1, "misses": 0}'))
    progress, _ = select(old, {"CIDEr-D": 0.0, "BLEU-4": 0.0, "teacher_forced_loss": 9.0})
    assert progress.best_step == 2


def test_validation_beam_selects_checkpoints_by_beam_search(experiment: Experiment, tmp_path: Path) -> None:
    """The logged CIDEr-D is that of beam search, not of greedy decoding."""
    from imgcap_jax.run.evaluation import evaluate

    wide = replace(experiment, training=replace(experiment.training, validation_beam=2, validation_images=None))
    run(wide, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["CIDEr-D"] for line in lines if line["kind"] == "validation"}
    step = best(tmp_path / "run")[0]
    assert step is not None
    again = evaluate(
        Run.load(tmp_path / "run"), "val", cache=tmp_path / "cache", decoding=replace(wide.decoding, beam=2)
    )
    assert logged[step] == max(logged.values())
    np.testing.assert_allclose(again.scores.values["CIDEr-D"], logged[step], rtol=1e-9)


def test_run_cannot_be_trained_twice_at_the_same_time(experiment: Experiment, tmp_path: Path) -> None:
    with owning(tmp_path / "run", "training"), pytest.raises(UserError, match="another process is training"):
        run(experiment, tmp_path / "run")


@pytest.fixture(scope="module")
def started(tiny: Experiment, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of one step that starts from another run and has an option without effect; and what it said."""
    folder, said = tmp_path_factory.mktemp("started") / "run", []
    train(one_step(tiny), folder, cache=folder.parent / "cache", init_from=trained, show=said.append)
    return folder, said


def one_step(tiny: Experiment) -> Experiment:
    data = replace(tiny.data, feature_dtype="bfloat16")
    return replace(tiny, data=data, training=replace(tiny.training, epochs=0.2))


def test_trained_parameters_are_averaged_with_the_decay_itself(
    tiny: Experiment, trained: Path, started: tuple[Path, list[str]]
) -> None:
    """The decay of random parameters at the first step is 0.1."""
    initial = best(trained)[1]
    decay = tiny.training.ema_decay
    assert decay == 0.9
    _, params, _ = split_trained(Run.load(started[0]).model(with_encoder=True))
    checkpoints = Checkpoints(started[0])
    transformation = tiny.optimizer.build(5, 1)
    state, progress = checkpoints.restore(first_state(params, transformation, ema=True))
    checkpoints.close()
    assert progress.step == 1
    for old, new, average in zip(initial, *map(jax.tree.leaves, (state.params, state.ema)), strict=True):
        np.testing.assert_allclose(average, decay * old + (1 - decay) * np.asarray(new), rtol=1e-5, atol=1e-7)
    moved = [
        np.abs(np.asarray(new) - old).max() for new, old in zip(jax.tree.leaves(state.params), initial, strict=True)
    ]
    assert max(moved) > 1e-4


def test_notes_are_printed_once_by_a_new_run(tiny: Experiment, started: tuple[Path, list[str]]) -> None:
    folder, said = started
    note = "note: data.feature_dtype has no effect with an encoder that is trained"
    assert said.count(note) == 1
    resumed: list[str] = []
    train(one_step(tiny), folder, cache=folder.parent / "cache", show=resumed.append)
    assert any(line.startswith("resuming") for line in resumed)
    assert not any(line.startswith("note:") for line in resumed)


def test_validation_says_how_it_decodes_and_gives_advice_once(experiment: Experiment, tmp_path: Path) -> None:
    few = replace(experiment, training=replace(experiment.training, validation_images=6))
    said: list[str] = []
    folder = tmp_path / "run"
    train(few, folder, cache=tmp_path / "cache", show=said.append)
    validations = [line for line in said if line.startswith("validation at step")]
    assert validations
    assert all("(6 of 8 images, greedy" in line for line in validations)
    last = said.index(validations[-1])
    assert not any("of the captions" in line for line in said[:last])
    assert all(f"imgcap evaluate {folder} --decode" in line for line in said if "imgcap evaluate" in line)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [[line["step"] for line in lines if line["kind"] == kind] for kind in ("train", "validation")]
    assert set(steps[1]) <= set(steps[0])


def test_captions_of_the_same_five_images_are_logged(tiny: Experiment, started: tuple[Path, list[str]]) -> None:
    """Validation after step 0, because the run starts from another one, and after step 1."""
    source = open_source("scenes", "val", tiny.data.data_dir)
    lines = [json.loads(line) for line in (started[0] / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert [sample["image_id"] for sample in line["samples"]] == [source[i].image_id for i in (0, 1, 3, 5, 7)]
        assert [sample["references"] for sample in line["samples"]] == [
            list(source.captions(i)) for i in (0, 1, 3, 5, 7)
        ]
        assert all(sample["caption"] for sample in line["samples"])


class Damaging(Checkpoints):
    """Checkpoints whose arrays change on the disk without an error."""

    def __init__(self) -> None:
        self.folder = Path("checkpoints")

    def restore(self, template: Any) -> tuple[Any, Progress]:
        return jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim == 2 else leaf, template), Progress(1, None)

    def restore_best(self, template: Any) -> Any:
        return template


def test_smoke_run_fails_if_a_checkpoint_is_not_restored_bit_for_bit() -> None:
    params: Any = {"bias": np.zeros(3), "kernel": np.zeros((2, 3))}
    state = TrainState(np.array(1), params, None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\['kernel'\] of the restored checkpoint differs"):
        _check_restored(Damaging(), state)


@pytest.fixture(scope="module")
def finished(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(tiny, folder)
    return folder


@pytest.mark.slow
def test_run_stores_its_init_from(experiment: Experiment, finished: Path, tmp_path: Path) -> None:
    run(experiment, tmp_path / "run", init_from=finished)
    assert Run.load(tmp_path / "run").init_from == finished
    assert run(experiment, tmp_path / "run").step == 10  # --init-from is not needed again
    assert run(experiment, tmp_path / "run", init_from=finished).step == 10
    with pytest.raises(UserError, match="not from"):
        run(experiment, tmp_path / "run", init_from=tmp_path / "another")
    # A finished run does not need the other run.
    shutil.copytree(finished, tmp_path / "gone")
    run(experiment, tmp_path / "of_gone", init_from=tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    assert run(experiment, tmp_path / "of_gone").step == 10
    # A run killed between its first validation and its first checkpoint starts from the other run again.
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "newest" / "10")
    said: list[str] = []
    train(experiment, tmp_path / "killed", cache=tmp_path / "cache", show=said.append)
    assert any(f"starting from {finished}" in line for line in said)
    deeper = replace(experiment, encoder=SmallCNN(widths=(8, 8), blocks=(0, 1)))
    with pytest.raises(UserError, match=r"another encoder \(blocks: "):
        run(deeper, tmp_path / "other", init_from=finished)
    with pytest.raises(UserError, match="fresh weights"):
        run(find_again(finished), finished, init_from=tmp_path / "run")


def find_again(folder: Path) -> Experiment:
    return Run.load(folder).experiment
