"""The commands that training names at its end."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgcap_jax.cli.experiments import find
from imgcap_jax.cli.main import main
from imgcap_jax.cli.next_commands import after_smoke, after_training
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment

OWN = """
from dataclasses import dataclass
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.decoders.attend import ShowAttendTell

@dataclass(frozen=True)
class Mine(ShowAttendTell):
    pass

experiment = Experiment(decoder=Mine())
"""


def test_smoke_names_the_same_command_without_smoke() -> None:
    given = ["train", "my file.py", "--smoke", "--data.dataset", "a+b*2", "--code", "x.py"]
    assert after_smoke(given) == "imgcap train 'my file.py' --data.dataset 'a+b*2' --code x.py"


def test_training_names_evaluation_and_captioning_with_quoted_paths() -> None:
    commands = after_training(Experiment(), Path("runs/it's here"), code=[], cache=Path("my cache"))
    assert [shlex.split(command) for command in commands] == [
        ["imgcap", "evaluate", "runs/it's here", "--split", "val", "--beam", "3", "--cache", "my cache"],
        ["imgcap", "caption", "PHOTO", "--run", "runs/it's here"],
        ["imgcap", "report", "runs/it's here", "--cache", "my cache"],
    ]
    wide = after_training(Experiment(decoding=Decoding(beam=5)), Path("run"), code=[], cache=None)
    assert wide[0] == "imgcap evaluate run --split val --beam 5"


@dataclass(frozen=True)
class ReadyRegions:
    region_size: int = 8
    frozen: bool = True

    def read_regions(self, source: object) -> None: ...


def test_run_on_ready_made_regions_cannot_caption_photos() -> None:
    experiment = Experiment(encoder=ReadyRegions())  # type: ignore[arg-type]
    evaluate, report = after_training(experiment, Path("run"), code=[__file__], cache=None)
    assert evaluate.startswith("imgcap evaluate run ")
    assert report == f"imgcap report run --code {__file__}"


def test_commands_have_the_code_that_the_run_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_code: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("parts").mkdir()
    Path("parts/my_parts.py").write_text(OWN)
    experiment = find("parts/my_parts.py")
    commands = after_training(experiment, Path("run"), code=[], cache=None)
    assert all(command.endswith(" --code parts/my_parts.py") for command in commands)
    for given in (["parts/my_parts.py"], ["package.my_parts"]):
        _, caption, _ = after_training(experiment, Path("run"), code=given, cache=None)
        assert caption == f"imgcap caption PHOTO --run run --code {given[0]}"  # once


def test_trained_run_names_the_next_commands(
    trained: Path, tiny_file: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(trained.parent / "cache")
    command = ["train", str(tiny_file), "--run", str(trained), "--cache", cache, "--data.data-dir", str(tiny_data)]
    assert main(command) == 0  # it is finished
    done, evaluate, caption, report = capsys.readouterr().out.splitlines()[-4:]
    assert done.startswith(f"done: {trained}, best validation CIDEr-D ")
    assert evaluate == f"next: imgcap evaluate {trained} --split val --beam 2 --cache {cache}"
    assert caption == f"      imgcap caption PHOTO --run {trained}"
    assert report == f"      imgcap report {trained} --cache {cache}"
