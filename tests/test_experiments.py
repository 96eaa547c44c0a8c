"""The experiments and studies that come with the package can be loaded, are described, and have commands that work."""

import re
import shlex
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcap_jax.ablation.runs import runs_of
from imgcap_jax.cli.experiments import find, find_study
from imgcap_jax.cli.options import override
from imgcap_jax.cli.parser import build_parser
from imgcap_jax.data.images import Augmentation
from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.data.sources import open_source
from imgcap_jax.experiment import Experiment, from_json, to_json
from imgcap_jax.models.encoders.staged import Staged
from imgcap_jax.train import train
from imgcap_jax.training.self_critical import SelfCritical

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "experiments"
PAGE = REPOSITORY / "docs" / "experiments.md"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
STUDIES = sorted(path.stem for path in (FOLDER / "studies").glob("*.py") if path.stem != "__init__")
STARTED = [name for name in EXPERIMENTS if name.endswith("_scst") or name in ("flickr8k_finetune", "flickr8k_coco")]


def described(name: str, package: str = "") -> tuple[str, list[list[str]]]:
    """The docstring of an experiment or a study, and the words of its commands without `imgcap`."""
    text = import_module(f"imgcap_jax.experiments.{package}{name}").__doc__
    assert text is not None
    commands = [shlex.split(line) for line in re.findall(r"^ *imgcap (.+)", text, re.MULTILINE)]
    return text, commands


def check_command(words: list[str]) -> None:
    """Parses a command as `imgcap` does, and applies its options of the experiment."""
    options, rest = build_parser().parse_known_args(words)
    if options.command == "train":
        override(find(options.experiment), rest)
    else:
        assert rest == []


def test_names_are_found_by_the_command_line() -> None:
    from imgcap_jax.cli.experiments import shipped_names

    assert shipped_names() == EXPERIMENTS
    assert len(EXPERIMENTS) > 20
    assert len(STUDIES) > 5


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_complete(name: str) -> None:
    experiment = find(name)
    assert from_json(to_json(experiment), name) == experiment
    text, commands = described(name)
    assert re.match(r"[A-Z][^\n]*[.,]\n", text)
    assert re.search(r"^(Ours: |Scores )|BENCHMARKS\.md", text, re.MULTILINE), "no scores, and no `not yet run`"
    for words in commands:
        check_command(words)
    trained = [words for words in commands if words[0] == "train"]
    evaluated = [words for words in commands if words[0] == "evaluate"]
    prepared = [words for words in commands if words[:2] == ["data", "prepare"]]
    assert prepared
    assert [*prepared, *trained, *evaluated] == commands
    assert trained[-1][1] == name
    assert {words[1] for words in evaluated} == {f"runs/{name}"}
    if name in STARTED:
        start = trained[-2][1]
        assert trained[-1][-2:] == ["--init-from", f"runs/{start}"]
        given = find(start)
        assert (experiment.decoder, experiment.data.min_count) == (given.decoder, given.data.min_count)
    else:
        assert len(trained) == 1
        assert "--init-from" not in trained[0]
    for words in trained:
        assert ("--encoder.folder" in words) == isinstance(experiment.encoder, RegionFiles)
    for words in evaluated:
        beam = int(words[words.index("--beam") + 1]) if "--beam" in words else experiment.decoding.beam
        assert beam == experiment.decoding.beam


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_self_critical_training_starts_from_a_run(name: str) -> None:
    assert isinstance(find(name).objective, SelfCritical) == name.endswith("_scst")


@pytest.mark.parametrize("name", STUDIES)
def test_study_is_complete(name: str) -> None:
    study = find_study(name)
    text, commands = described(name, "studies.")
    assert re.search(r"^Results: not yet run\.$|docs/ablations\.md", text, re.MULTILINE)
    assert len(study.seeds) >= 3
    runs = runs_of(study)
    assert len(runs) % len(study.seeds) == 0
    prepare, *trained, ablate = commands
    assert prepare[:2] == ["data", "prepare"]
    for words in commands:
        check_command(words)
    assert ablate[:2] == ["ablate", name]
    starts = [f"runs/{words[1]}" for words in trained]
    assert ablate[2:] == (["--init-from", *starts] if starts else [])
    if isinstance(study.base.objective, SelfCritical):
        assert starts


def rows() -> list[list[str]]:
    """The rows of the tables of docs/experiments.md, whose first cells are names of experiments or studies."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_page_lists_every_experiment_and_every_study_once() -> None:
    assert sorted(row[0] for row in rows()) == sorted([*EXPERIMENTS, *STUDIES])


def test_scores_of_the_page_are_those_of_docstrings_and_benchmarks() -> None:
    measured = (REPOSITORY / "BENCHMARKS.md").read_text()
    checked = 0
    for name, *cells in rows()[: len(EXPERIMENTS)]:  # studies come last
        text, _ = described(name)
        assert ("not yet run" in cells) == ("Ours: not yet run." in text), name
        found = text if "not yet run" in cells else text + measured
        for number in re.findall(r"\d+\.\d+", re.sub(r"[\d.]+ epochs", "", " ".join(cells))):
            assert re.search(rf"\b{re.escape(number)}\b", found), f"{name}: {number}"
            checked += 1
    assert checked > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_trains(name: str, tiny_data: Path, tmp_path: Path) -> None:
    """Two steps of each experiment at its own sizes of the decoder, on drawn scenes of 32 pixels."""
    _, commands = described(name)
    start = None
    for trained in [words[1] for words in commands if words[0] == "train"]:
        experiment = on_scenes(find(trained), tiny_data, tmp_path)
        outcome = train(
            experiment, tmp_path / trained, cache=tmp_path / "cache", init_from=start, show=lambda line: None
        )
        assert outcome.step == 2
        assert outcome.best is not None
        start = tmp_path / trained


def on_scenes(experiment: Experiment, tiny_data: Path, folder: Path) -> Experiment:
    """The experiment for two steps on 40 drawn scenes."""
    encoder: Any = experiment.encoder
    if isinstance(encoder, Staged):
        encoder = replace(encoder, weights="random")
    elif isinstance(encoder, RegionFiles):
        encoder = replace(encoder, folder=folder / "regions", max_regions=3)
        for split in ("train", "val"):
            for number in open_source("scenes", split, tiny_data).image_ids():
                (folder / "regions").mkdir(exist_ok=True)
                np.save(folder / "regions" / f"{number}.npy", np.full((2, encoder.region_size), number % 5, np.float16))
    data = replace(
        experiment.data,
        dataset="scenes",
        data_dir=tiny_data,
        image_size=32,
        batch_size=20,
        min_count=1,
        views=min(2, experiment.data.views),
        augmentation=experiment.data.augmentation if experiment.data.views > 1 else Augmentation(),
    )
    training = replace(experiment.training, epochs=1.0, evaluate_epochs=1.0, validation_images=4)
    return replace(experiment, data=data, encoder=encoder, training=training)
