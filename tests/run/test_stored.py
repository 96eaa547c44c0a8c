"""Stored captions of a split: when they are reused, and when the split is decoded again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.run import stored
from imgcap_jax.run.folder import Run
from imgcap_jax.run.stored import SplitScorers, stored_or_evaluated
from imgcap_jax.training.checkpoints import latest_step


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run, of which the validation split was decoded and stored."""
    folder = tmp_path_factory.mktemp("stored") / "run"
    shutil.copytree(trained, folder)
    for name in ("captions_val.json", "scores_val.json"):
        (folder / name).unlink(missing_ok=True)
    first = stored_or_evaluated(Run.load(folder), "val", cache=folder.parent / "cache")
    assert not first.reused
    return folder


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_stored_captions_are_scored_and_not_decoded(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(stored, "evaluate")
    run = Run.load(evaluated)
    found = stored_or_evaluated(run, "val", cache=evaluated.parent / "cache", scorer=SplitScorers("val")(run))
    assert found.reused
    assert found.step == latest_step(evaluated / "checkpoints" / "best")
    written = json.loads((evaluated / "captions_val.json").read_text())
    assert {entry["image_id"]: entry["caption"] for entry in written} == found.captions
    assert {entry["image_id"]: entry["file_name"] for entry in written} == found.file_names
    scores = json.loads((evaluated / "scores_val.json").read_text())["scores"]
    assert scores == {name: round(value, 6) for name, value in found.scores.values.items()}
    assert list(found.captions) == list(found.references)


CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "an older step": ("scores_val.json", lambda found: found.update(step=1)),
    "another dataset": ("scores_val.json", lambda found: found.update(dataset="other")),
    "other data": ("scores_val.json", lambda found: found.update(fingerprint="0")),
    "another start": ("scores_val.json", lambda found: found.update(init_from="/runs/other")),
    "another version": ("scores_val.json", lambda found: found.update(signature="imgcap-0|n:8")),
    "a missing key": ("scores_val.json", lambda found: found.pop("decoding")),
    "a caption of another evaluation": ("captions_val.json", lambda found: found[0].update(caption="a red circle")),
    "an image without caption": ("captions_val.json", lambda found: found.pop()),
}


class Decoded(Exception):
    """Raised in place of an evaluation, with its arguments."""


@pytest.mark.parametrize("change", CHANGES)
def test_captions_that_are_out_of_date_are_decoded_again(
    evaluated: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(run: Run, split: str, **options: Any) -> None:
        raise Decoded(options["write"])

    monkeypatch.setattr(stored, "evaluate", evaluate)
    folder = tmp_path / "run"
    shutil.copytree(evaluated, folder)
    edit(folder, *CHANGES[change])
    with pytest.raises(Decoded) as decoded:
        stored_or_evaluated(Run.load(folder), "val", cache=tmp_path / "cache")
    assert decoded.value.args == (True,)


def test_metrics_that_only_one_of_both_has_are_not_compared(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(stored, "evaluate")
    folder = tmp_path / "run"
    shutil.copytree(evaluated, folder)

    def change(found: Any) -> None:
        del found["fingerprint"], found["init_from"]  # of an earlier version
        del found["scores"]["ROUGE-L"]  # as if it was installed later
        found["signature"] = found["signature"].replace("ROUGE-L:b1.2", "Absent:1.0")
        found["scores"]["Absent"] = 0.5

    edit(folder, "scores_val.json", change)
    found = stored_or_evaluated(Run.load(folder), "val", cache=tmp_path / "cache")
    assert found.reused
    assert "ROUGE-L" in found.scores.values


def test_results_of_other_decoding_settings_are_kept(evaluated: Path) -> None:
    run = Run.load(evaluated)
    before = {path.name: path.read_bytes() for path in evaluated.glob("*_val.json")}
    greedy = replace(run.experiment.decoding, beam=1)
    found = stored_or_evaluated(run, "val", cache=evaluated.parent / "cache", decoding=greedy)
    assert not found.reused
    assert found.decoding.beam == 1
    assert {path.name: path.read_bytes() for path in evaluated.glob("*_val.json")} == before


def test_results_without_checkpoints_are_read(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    found = stored_or_evaluated(Run.load(tmp_path / "run"), "val", cache=tmp_path / "cache")
    assert found.reused
    (tmp_path / "run" / "captions_val.json").unlink()
    with pytest.raises(UserError, match="best"):
        stored_or_evaluated(Run.load(tmp_path / "run"), "val", cache=tmp_path / "cache")
