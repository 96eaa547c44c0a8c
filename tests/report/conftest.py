"""A page of ``imgcap report`` about small runs, for the tests that read it and those that open it in a browser."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.cli.main import main


@pytest.fixture(scope="session")
def edited() -> Callable[[Path, Callable[[Any], Any]], None]:
    """A function that changes a JSON file."""

    def edit(path: Path, change: Callable[[Any], Any]) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture(scope="session")
def reported(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, edited: Callable[[Path, Callable[[Any], Any]], None]
) -> Path:
    """A folder with the runs ``first`` and ``pair/seed_1``, ``pair/seed_2``, and the page about them, report.html."""
    folder = tmp_path_factory.mktemp("reported")
    shutil.copytree(trained, folder / "first", ignore=shutil.ignore_patterns("*.json.tmp", "scores_*", "captions_*"))
    assert main(["evaluate", str(folder / "first"), "--split", "test"]) == 0
    scores = json.loads((folder / "first" / "scores_test.json").read_text())
    sweep = [
        {**scores, "decoding": {**scores["decoding"], "beam": beam}, "scores": {**scores["scores"], "CIDEr-D": value}}
        for beam, value in ((1, 0.25), (3, 0.75), (5, 0.5))
    ]
    (folder / "first" / "sweep_test.json").write_text(json.dumps(sweep))
    for seed in (1, 2):
        member = folder / "pair" / f"seed_{seed}"
        shutil.copytree(folder / "first", member)
        (member / "sweep_test.json").unlink()
        edited(member / "experiment.json", lambda found, seed=seed: found["training"].update(seed=seed, epochs=3))
        lines = [json.loads(line) for line in (member / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["kind"] == "validation":
                line["CIDEr-D"] = 0.2 * seed * line["epoch"]
            else:
                line["reward"] = 0.5 * seed
        (member / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    runs = [str(folder / "first"), str(folder / "pair")]
    page = str(folder / "report.html")
    assert main(["report", *runs, "--split", "test", "--output", page, "--images", "9"]) == 0
    return folder
