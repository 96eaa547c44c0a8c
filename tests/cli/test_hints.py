"""What the commands say about mistyped names, and where results cannot be written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.cli.main import main

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _quiet_environment(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_data))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "flickr8k", "--lr", "3"], "unknown option --lr; did you mean --optimizer.learning-rate?"),
        (["train", "flickr8k", "--epochs=3"], "did you mean --training.epochs?"),
        (["train", "flickr8k", "--zzz", "3"], "unknown option --zzz; --help lists the options"),
        (["caption", ".", "--run", "run", "--top-p", "0.5"], "did you mean --decode.top-p?"),
        (["data", "inspect", "scenes", "--split", "val"], "unknown option --split; --help lists the options"),
        (["train", "flickr8k", "--training.epochs", "abc"], "--training.epochs is 'abc'; it must be a number"),
        (["train", "flickr8k", "--data.image-size", "a"], "--data.image-size is 'a'; it must be a whole number"),
        (["train", "flickr8k", "--training.epochs"], "--training.epochs has no value"),
    ],
)
def test_a_mistyped_option_names_the_near_one_or_none(arguments: list[str], said: str, refused: Refused) -> None:
    assert said in refused(arguments)


def test_a_mistyped_dataset_names_the_near_one(refused: Refused) -> None:
    assert refused(["data", "prepare", "flicker8k"]).endswith("no such file or folder; did you mean flickr8k?")
    assert refused(["data", "prepare", "x.zip"]).endswith("x.zip: no such file or folder; check the path")
    assert refused(["data", "inspect", "scene"]).endswith("did you mean scenes?")
    assert refused(["data", "inspect", "/somewhere/scenes"]).endswith("did you mean scenes?")
    Path("holiday photos").mkdir()
    line = refused(["data", "inspect", "holiday photos"])
    assert line.endswith("is a folder, not the name of a prepared dataset; run: imgcap data prepare 'holiday photos'")
    assert "run: imgcap data prepare FOLDER --name NAME;" in refused(["data", "inspect", "/no/where"])


def test_a_file_that_cannot_be_written_is_reported_before_the_work(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("imgcap_jax.run.evaluation.sweep", must_not_run)
    monkeypatch.setattr("imgcap_jax.data.inspect.inspect", must_not_run)
    Path("file").write_text("")
    for place in ("/proc/a", "file/a"):
        assert f"{place}.html can't be written (" in refused(["evaluate", str(trained), "--page", f"{place}.html"])
        assert f"{place}.png can't be written (" in refused(["data", "inspect", "scenes", "--sheet", f"{place}.png"])
        assert f"{place}.json can't be written (" in refused(["score", "a", "b", "--json", f"{place}.json"])


def test_an_interrupted_preparation_says_whether_it_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("imgcap_jax.data.prepare.prepare", interrupt)
    for source, said in ("scenes", "starts again"), ("coco", "resumes"):
        assert main(["data", "prepare", source]) == 130
        assert capsys.readouterr().err == f"imgcap: interrupted; the same command {said}\n"


def test_preparation_ends_with_the_next_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("imgcap_jax.data.prepare.prepare", lambda *_, **__: Path("data/mine/1.0.0"))
    assert main(["data", "prepare", "photos", "--data-dir", "my data"]) == 0
    assert capsys.readouterr().out == "next: imgcap data inspect mine --data-dir 'my data'\n"
