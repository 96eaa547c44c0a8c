"""Comparisons of two runs, and of two settings with several seeds."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.metrics.compare import paired_bootstrap
from imgcap_jax.metrics.corpus import Candidates, MetricScores, References, mean_score
from imgcap_jax.metrics.seeds import compare_seeds
from imgcap_jax.run.comparison import Comparison, compare
from imgcap_jax.run.folder import Run
from imgcap_jax.run.stored import stored_or_evaluated


def copy(run: Path, to: Path, *, seed: int = 0, beam: int = 2, hidden_size: int = 8) -> Path:
    """A copy of a run that says it was trained with other settings."""
    shutil.copytree(run, to)
    experiment = json.loads((to / "experiment.json").read_text())
    experiment["training"]["seed"] = seed
    experiment["decoding"]["beam"] = beam
    experiment["decoder"]["hidden_size"] = hidden_size
    (to / "experiment.json").write_text(json.dumps(experiment))
    return to


@pytest.fixture(scope="module")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs a and b, of which b decodes greedily, and populations of each, with stored captions of 8 images."""
    folder = tmp_path_factory.mktemp("compared")
    for name, beam in (("a", 2), ("b", 1)):
        run = copy(trained, folder / name, beam=beam)
        for old in run.glob("*_val.json"):
            old.unlink()
        stored_or_evaluated(Run.load(run), "val", cache=folder / "cache")
        for seed in (0, 1):
            copy(run, folder / f"{name}_population" / f"seed={seed}", beam=beam, seed=seed)
    return folder


def test_runs_are_compared_with_the_paired_bootstrap(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    assert (
        main(["compare", str(runs / "a"), str(runs / "b"), "--captions", "2", "--json", str(runs / "found.json")]) == 0
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before  # no caption is decoded
    printed = capsys.readouterr().out
    found = json.loads((runs / "found.json").read_text())
    assert found["settings"] == ["decoding.beam: 2 -> 1"]
    a, b = (stored_or_evaluated(Run.load(runs / name), "val", cache=runs / "cache") for name in ("a", "b"))
    for name in ("CIDEr-D", "BLEU-1"):
        expected = paired_bootstrap(b.scores.metrics[name], a.scores.metrics[name])
        assert found["differences"][name] == expected.__dict__
        assert f"{100 * a.scores.values[name]:.2f}" in printed
    changes = [image["CIDEr-D"]["difference"] for image in found["images"]]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == 8
    first, last = found["images"][0], found["images"][-1]
    assert first["CIDEr-D"]["b"] == b.scores.per_image["CIDEr-D"][first["image_id"]]
    assert first["captions"] == {name: [one.captions[first["image_id"]]] for name, one in (("a", a), ("b", b))}
    assert printed.index("B better than A") < printed.index(first["file_name"]) < printed.index("A better than B")
    assert printed.index("A better than B") < printed.rindex(last["file_name"])
    assert "with 8 images neither interval nor p-value is reliable" in printed
    assert "trained parameters       3,364  3,364" in printed
    assert found["a"]["seconds"] > 0


def test_decoding_options_hold_for_both(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "a"), str(runs / "b"), "--beam", "1", "--json", str(runs / "greedy.json")]) == 0
    found = json.loads((runs / "greedy.json").read_text())
    assert {change["CIDEr-D"]["difference"] for change in found["images"]} == {0.0}  # the same parameters
    assert "the decoding differs too" not in capsys.readouterr().out


def test_folders_of_runs_are_compared_over_seeds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (runs / f"{name}_population" for name in ("a", "b"))
    assert main(["compare", str(a), str(b), "--json", str(runs / "seeds.json")]) == 0
    assert "2 seeds" in capsys.readouterr().out
    found = json.loads((runs / "seeds.json").read_text())
    assert [len(found[side]["runs"]) for side in ("a", "b")] == [2, 2]
    assert found["settings"] == ["decoding.beam: 2 -> 1"]
    ours, other = (
        [
            stored_or_evaluated(Run.load(folder / f"seed={seed}"), "val", cache=runs / "cache").scores.metrics[
                "CIDEr-D"
            ]
            for seed in (0, 1)
        ]
        for folder in (b, a)
    )
    expected = compare_seeds(ours, other)
    assert found["differences"]["CIDEr-D"]["p_value"] == expected.p_value
    assert main(["compare", str(runs / "a"), str(b)]) == 0
    assert "one of the two has a single run" in capsys.readouterr().out


def start(run: Path, *, at: Path) -> Path:
    """Makes a run say that it started from another one."""
    (run / "init_from.json").write_text(json.dumps({"run": str(at)}))
    for scores in run.glob("scores_*.json"):
        scores.write_text(json.dumps({**json.loads(scores.read_text()), "init_from": str(at)}))
    return run


def test_different_starts_are_differences(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = start(copy(runs / "a", tmp_path / "first"), at=runs / "a")
    assert main(["compare", str(runs / "a"), str(first)]) == 0
    assert f"  init_from: none -> {runs / 'a'}\n" in capsys.readouterr().out
    second = start(copy(runs / "a", tmp_path / "second"), at=runs / "b")
    assert main(["compare", str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert f"  init_from: {runs / 'a'} -> {runs / 'b'}\n" in printed
    assert "no difference" not in printed


def test_seeds_start_from_runs_that_differ_in_their_seeds_only(
    runs: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    for name, starts in (("same", ["a", "a"]), ("seeds", ["a_population/seed=0", "a_population/seed=1"])):
        for seed, at in enumerate(starts):
            start(copy(runs / "a", tmp_path / name / f"seed={seed}", seed=seed), at=runs / at)
        assert main(["compare", str(tmp_path / name), str(runs / "b_population")]) == 0
    for seed, at in enumerate(("a", "b")):
        start(copy(runs / "a", tmp_path / "mixed" / f"seed={seed}", seed=seed), at=runs / at)
    line = refused(["compare", str(tmp_path / "mixed"), str(runs / "b_population")])
    assert f"differ in more than training.seed (init_from: {runs / 'a'} -> {runs / 'b'})" in line


@dataclass(frozen=True)
class Constant:
    """A custom metric, whose label says that its value matters."""

    value: float

    @property
    def label(self) -> str:
        return f"Constant:value={self.value}"

    def __call__(self, references: References) -> Callable[[Candidates], MetricScores]:
        processed.append(len(references.image_ids))
        return lambda candidates: {"Constant": mean_score(np.full(len(candidates.lengths), self.value))}


processed: list[int] = []


def test_metrics_that_cannot_be_compared_are_noted(runs: Path) -> None:
    def run(name: str, *metrics: Constant) -> Run:
        found = Run.load(runs / name)
        return replace(found, experiment=replace(found.experiment, metrics=metrics))

    def found(a: Run, b: Run) -> Comparison:
        return compare([a], [b], "val", cache=lambda _: runs / "cache")

    one, other = run("a", Constant(1.0)), run("b", Constant(2.0))
    differ = found(one, other)
    assert "Constant" not in differ.scores
    assert "Constant is left out, because its signatures differ" in differ.notes[0]
    assert "Constant:value=1.0 and " in differ.notes[0]
    assert found(one, run("b")).notes[0] == "Constant is left out, because not all runs have this metric"
    processed.clear()
    same = found(one, run("b", Constant(1.0)))
    assert "Constant" in same.scores
    assert not any("Constant" in note for note in same.notes)
    assert processed == [8]  # the references are processed once for both


def test_what_cannot_be_compared_is_refused(runs: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    a = str(runs / "a")
    assert "given twice" in refused(["compare", a, a])
    assert "is not a run" in refused(["compare", a, str(tmp_path)])
    mixed = tmp_path / "mixed"
    for number, size in enumerate((8, 16)):
        copy(runs / "a", mixed / str(number), hidden_size=size)
    assert "differ in more than training.seed (decoder.hidden_size: 8 -> 16)" in refused(["compare", a, str(mixed)])
    (copy(runs / "a", tmp_path / "sub" / "run") / "checkpoints").rename(tmp_path / "moved")
    assert "has no best parameters (no checkpoint)" in refused(["compare", a, str(tmp_path / "sub")])
    assert "--captions is -1" in refused(["compare", a, str(runs / "b"), "--captions", "-1"])
