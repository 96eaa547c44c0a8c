"""The page of a study: its table, lines per setting, and which captions are read."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.ablation.statistics import ScoreRow, StudyTable, TableRow
from imgcap_jax.ablation.tables import write_tables
from imgcap_jax.cli.main import main
from imgcap_jax.metrics.seeds import SeedDifference
from imgcap_jax.report.run_page import splits
from imgcap_jax.run.folder import Run
from imgcap_jax.study import Factor, Study, folder_name

SEEDS = (1, 2, 10, 11)
SCORES = {
    "base": ScoreRow((0.5, 0.6, 0.7, 0.6), 0.6, 0.0816, None, math.nan),
    "added epochs=3": ScoreRow(
        (0.7, 0.8, 0.9, 0.8), 0.8, 0.0816, SeedDifference(0.8, 0.6, 0.05, 0.35, 0.002, 6.0), 0.004
    ),
    "added epochs=4": ScoreRow((0.6, 0.6, 0.6, 0.6), 0.6, 0.0, SeedDifference(0.6, 0.6, -0.1, 0.1, 0.95, 6.0), 0.95),
    "added epochs=5": ScoreRow((), math.nan, math.nan, None, math.nan),
}


@pytest.fixture(scope="module")
def study_folder(
    reported: Path, tmp_path_factory: pytest.TempPathFactory, edited: Callable[[Path, Callable[[Any], Any]], None]
) -> Path:
    """The folder of a study with twelve runs, and its table. A fourth setting has no runs."""
    folder = tmp_path_factory.mktemp("study") / "mine"
    base = Run.load(reported / "first").experiment
    levels = {str(epochs): {"training.epochs": float(epochs)} for epochs in (3, 4, 5)}
    study = Study(base, (Factor("added epochs", levels),), seeds=SEEDS)
    rows = []
    for setting in study.settings():
        score = SCORES[setting.name]
        seeds = SEEDS if score.values else ()
        rows.append(TableRow(setting, seeds, {"CIDEr-D": score}, 1234, 2.0, 99.0, 50.0, 1))
        for seed in seeds:
            run = folder / folder_name(setting.name) / f"seed={seed}"
            shutil.copytree(reported / "first", run, ignore=shutil.ignore_patterns("sweep_*"))
            changes = {"seed": seed, "epochs": setting.experiment.training.epochs}
            edited(run / "experiment.json", lambda found, changes=changes: found["training"].update(changes))
    table = StudyTable(study, ("CIDEr-D",), tuple(rows), 16, 12, {}, "", "scenes", 12, "signature", {})
    write_tables(table, folder)
    return folder


def test_page_of_a_study(study_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = splits.stored_or_evaluated

    def counting(run: Run, *arguments: Any, **options: Any) -> Any:
        read.append(run.folder.relative_to(study_folder).as_posix())
        result = original(run, *arguments, **options)
        assert result.reused
        return result

    monkeypatch.setattr(splits, "stored_or_evaluated", counting)
    page = tmp_path / "page.html"
    assert main(["report", str(study_folder), "--split", "test", "--output", str(page), "--images", "6"]) == 0
    # Captions of eight of the twelve runs, all settings before further seeds.
    settings = ["base", "added_epochs=3", "added_epochs=4"]
    assert read == [f"{setting}/seed={seed}" for seed in (1, 2, 10) for setting in settings][:8]
    text = page.read_text()
    assert "<h1>Report: mine</h1>" in text
    study = text.partition('<section id="study"')[2].partition("</section>")[0]
    lines = re.findall(r"<tr>(.*?)</tr>", study.partition("<details>")[0])
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]
    assert [re.sub("<[^>]*>", "", cell) for cell in rows[0]] == [
        "setting", "seeds", "CIDEr-D", "difference", "95 % interval", "p", "parameters", "minutes", "captions/s"
    ]  # fmt: skip
    assert rows[1][:6] == ["base", "4", "60.0 ± 8.2", "–", "–", "–"]
    assert rows[2][:6] == ["added epochs=3", "4", "80.0 ± 8.2", "+20.0", "+5.0 to +35.0", "0.004"]
    assert rows[3][:6] == ["added epochs=4", "4", "60.0 ± 0.0", "+0.0", "-10.0 to +10.0", "0.950"]
    assert rows[4][:3] == ["added epochs=5", "0", "–"]
    assert "incomplete: 12 of 16 runs have results" in study
    assert f"training.epochs: {Run.load(study_folder / 'base' / 'seed=1').experiment.training.epochs} -" in study
    # The plots: a circle per seed, and an interval per difference, filled if p < 0.05.
    assert study.count('class="seed') == 12
    assert (study.count('class="dot'), study.count('class="hollow')) == (1, 1)
    # One line per setting.
    plot = json.loads(re.findall(r'data-plot="([^"]+)"', text)[0].replace("&quot;", '"'))
    assert [line["name"] for line in plot["lines"]] == [
        "base (4 seeds)", "added epochs=3 (4 seeds)", "added epochs=4 (4 seeds)"
    ]  # fmt: skip
    over_seeds = text.partition("mean and standard deviation over seeds, split test")[2].partition("</table>")[0]
    assert over_seeds.count(">4</td>") == 3  # of all runs, also those whose captions were not read
    assert "Missing on this page" not in text


def test_runs_without_scores_and_damaged_files_are_named(
    study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(study_folder, folder)
    for name in ("scores_test.json", "captions_test.json"):
        (folder / "added_epochs=4" / "seed=11" / name).unlink()
    (folder / "base" / "seed=11" / "experiment.json").unlink()
    (folder / "table.json").write_text('{"rows": []}')
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "runs"), "--split", "test", "--output", str(page), "--images", "3"]) == 0
    notes = capsys.readouterr().err
    assert "base/seed=11 is left out: it is damaged, and has no experiment.json" in notes
    assert "seed=11: no scores of split test; evaluate the run" in notes
    assert "no table of the study, because" in notes
    text = page.read_text()
    assert '<section id="study"' not in text
    assert "added_epochs=3 (4 seeds)" in text  # the folder's name, without a table
