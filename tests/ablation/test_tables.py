"""Tables of studies in all formats, from results with known statistics."""

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgcap_jax.ablation.plot import write_plot
from imgcap_jax.ablation.records import Record, Result, decoding_text
from imgcap_jax.ablation.runs import runs_of
from imgcap_jax.ablation.statistics import StudyTable, study_table
from imgcap_jax.ablation.tables import as_json, comma_separated, latex, lines, markdown, write_tables
from imgcap_jax.data.sources import open_source
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.experiment import digest
from imgcap_jax.metrics.corpus import MetricScore, mean_score
from imgcap_jax.metrics.seeds import compare_seeds
from imgcap_jax.run.folder import Run
from imgcap_jax.study import Factor, Study


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the study, of which one run is missing: shares of true captions are given, captions are references."""
    folder = tmp_path_factory.mktemp("study")
    source = open_source("scenes", "val", study.base.data.data_dir)
    ids = [int(image_id) for image_id in source.image_ids()]
    rng = np.random.default_rng(0)
    for run in runs_of(study):
        if run.name == "rate=infinite/seed=1":
            continue
        results = {}
        for setting in run.settings:
            captions = {i: source.captions(n)[rng.integers(3)] for n, i in enumerate(ids)}
            true = {i: bool(rng.random() < 0.5) for i in ids}
            results[setting.name] = Result(decoding_text(setting.experiment.decoding), captions, true, 50.0)
        # A run with best parameters of step 5.
        (folder / run.name / "checkpoints" / "best" / "5").mkdir(parents=True)
        Run(folder / run.name, run.experiment, Vocabulary.build(["a circle"], 1)).save()
        experiment = digest(run.experiment)
        record = Record(run.seed, experiment, "scenes", "val", source.fingerprint, 5, 1234, 2.0, 100.0, 1, results)
        record.write(folder, run.name)
    return folder


@pytest.fixture(scope="module")
def table(study: Study, folder: Path) -> StudyTable:
    return study_table(replace(study, scores=("true", "CIDEr-D")), folder)


def test_means_and_deviations_are_over_seeds(table: StudyTable, folder: Path) -> None:
    records = [json.loads((folder / "results" / f"size=12/seed={seed}.json").read_text()) for seed in (0, 1)]
    shares = [np.mean([*record["results"]["size=12"]["true"].values()]) for record in records]
    row = table.rows[1]
    assert row.setting.name == "size=12"
    assert row.seeds == (0, 1)
    assert row.scores["true"].values == pytest.approx(shares)
    assert row.scores["true"].mean == pytest.approx(np.mean(shares))
    assert row.scores["true"].deviation == pytest.approx(np.std(shares, ddof=1))
    assert (row.parameters, row.minutes, row.captions_per_second) == (1234, 2.0, 100.0)


def test_decodings_of_the_same_runs_are_compared_run_by_run(table: StudyTable, folder: Path) -> None:
    found: dict[str, list[MetricScore]] = {name: [] for name in ("base", "beam=1", "size=12")}
    for run in ("base/seed=0", "base/seed=1", "size=12/seed=0", "size=12/seed=1"):
        for name, result in json.loads((folder / "results" / f"{run}.json").read_text())["results"].items():
            found[name].append(mean_score(np.array([*result["true"].values()], float)))
    by_name = {row.setting.name: row.scores["true"].difference for row in table.rows}
    assert by_name["beam=1"] == compare_seeds(found["beam=1"], found["base"], same_runs=True)
    assert by_name["size=12"] == compare_seeds(found["size=12"], found["base"])
    assert by_name["beam=1"] != compare_seeds(found["beam=1"], found["base"])


def test_p_values_are_corrected_for_all_settings(table: StudyTable) -> None:
    """Also for the setting with one seed, which is not tested."""
    raw = [row.scores["true"].difference for row in table.rows[1:]]
    corrected = [row.scores["true"].p_value for row in table.rows[1:]]
    assert math.isnan(corrected[1])
    pairs = [(one.p_value, new) for one, new in zip(raw, corrected, strict=True) if one and not math.isnan(new)]
    smallest, largest = sorted(pairs)
    assert smallest[1] == pytest.approx(min(1, 3 * smallest[0]))
    assert largest[1] == pytest.approx(min(1, max(smallest[1], 2 * largest[0])))


def test_terminal_and_markdown(table: StudyTable) -> None:
    head, base, *others = lines(table)
    assert head.split()[:3] == ["setting", "seeds", "true"]
    assert base.split()[0] == "base"
    assert others[1].startswith("rate=infinite")
    assert "+-" not in others[1]  # one seed has no deviation
    assert any("incomplete: 5 of 6 runs have results" in line for line in others)
    rows = [line for line in markdown(table).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + len(table.rows)
    assert "beam=1: decoding.beam: 2 -\\> 1" in markdown(table)


def test_latex(table: StudyTable) -> None:
    text = latex(table)
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    assert len(body) == len(table.rows)
    columns = re.search(r"\\begin\{tabular\}\{(l r*|lr+)\}", text)
    assert columns
    assert all(row.count("&") == len(columns[1]) - 1 and row.endswith(r"\\") for row in body)
    assert r"\pm" in body[0]
    assert r" \%" in body[0]
    assert not re.search(r"(?<!\\)[%_#]", "".join(body))


def test_csv(table: StudyTable) -> None:
    rows = list(csv.DictReader(io.StringIO(comma_separated(table))))
    assert len(rows) == 2 * len(table.rows)
    first = rows[2]
    score = table.rows[1].scores["true"]
    assert (first["setting"], first["score"], first["size"], first["beam"]) == ("size=12", "true", "12", "2")
    assert float(first["mean"]) == pytest.approx(100 * score.mean, rel=1e-5)
    assert score.difference is not None
    assert float(first["low"]) == pytest.approx(100 * score.difference.low, rel=1e-5)
    assert float(first["p_holm"]) == pytest.approx(score.p_value, rel=1e-5)
    assert rows[4]["deviation"] == ""  # one seed


def test_json(table: StudyTable) -> None:
    found = json.loads(as_json(table))
    assert (found["runs"], found["finished"], found["images"]) == (6, 5, 8)
    assert found["rows"][2]["scores"]["true"]["deviation"] is None
    assert found["rows"][3]["changes"] == ["decoding.beam: 2 -> 1"]
    assert found["signature"] == table.signature


def test_names_cannot_break_a_table(study: Study, folder: Path) -> None:
    level = {r"50% & a_b|c\d <x>": {"decoding.beam": 1}}
    odd = study_table(replace(study, factors=(Factor("be{am}", level),), scores=("true",)), folder)
    assert len(odd.rows) == 2
    (row,) = [line for line in latex(odd).splitlines() if line.startswith("be")]
    assert row.count("&") - row.count(r"\&") == latex(odd).splitlines()[-4].count("&")
    rows = [line for line in markdown(odd).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_files(table: StudyTable, tmp_path: Path) -> None:
    assert [path.name for path in write_tables(table, tmp_path)] == ["table.md", "table.tex", "table.csv", "table.json"]
    write_plot(table, tmp_path / "plot.png")
    write_plot(table, tmp_path / "plot.svg")
    assert Image.open(tmp_path / "plot.png").width > 500
    assert "<svg" in (tmp_path / "plot.svg").read_text()
