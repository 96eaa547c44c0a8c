"""imgcap doctor: a working environment, and broken ones."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from imgcap_jax.cli import doctor
from imgcap_jax.cli.main import main


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with caches and datasets in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command, which must end with this exit code; returns the JSON, with findings by name."""

    def run(code: int, *options: str) -> Any:
        capsys.readouterr()
        assert main(["doctor", "--json", *options]) == code
        found = json.loads(capsys.readouterr().out)
        assert found["ok"] == (code == 0)
        found["by_name"] = {one["name"]: one for section in found["sections"].values() for one in section}
        return found

    return run


def test_a_new_environment(report: Callable[..., Any], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(0)
    assert found["next"] == "imgcap data prepare scenes"
    by_name = found["by_name"]
    assert by_name["jax"]["value"].split()[0] == jax.__version__
    assert by_name["platform"]["value"] == "cpu"
    assert by_name["devices"]["value"] == f"{len(jax.devices())} x cpu"
    assert by_name["training.dtype"]["value"] == "auto is float32 here"
    assert by_name["XLA_FLAGS"]["value"].endswith("--xla_force_host_platform_device_count=4")
    assert by_name["TFDS_DATA_DIR"]["value"] == str(place / "data")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["training, evaluating and captioning work here", "next: imgcap data prepare scenes"]
    assert not [line for line in lines if line.startswith("!")]
    assert not (place / "runs").exists()


def test_datasets_and_runs_are_listed(report: Callable[..., Any], place: Path, tiny_data: Path, trained: Path) -> None:
    found = report(0, "--data-dir", str(tiny_data))
    assert "train 40" in found["by_name"]["scenes"]["value"]
    assert found["next"] == "imgcap train scenes --smoke"
    (place / "runs").mkdir()
    (place / "runs" / "mine").symlink_to(trained)
    found = report(0, "--data-dir", str(tiny_data))
    assert found["by_name"]["mine"]["value"].startswith("step 10, best at step ")
    assert found["next"] == "imgcap evaluate runs/mine --split val --beam 3"


def test_a_cache_that_cannot_be_written(
    report: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").touch()
    monkeypatch.setenv("IMGCAP_CACHE", str(place / "file" / "cache"))
    found = report(1)
    assert found["by_name"]["cache"]["state"] == "problem"
    assert "cannot be written: Not a directory" in found["by_name"]["cache"]["value"]
    assert found["next"].startswith("IMGCAP_CACHE=FOLDER")
    assert main(["doctor"]) == 1
    assert "1 problem, marked with !: cache" in capsys.readouterr().out


def test_missing_extras_are_notes_with_the_command(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocoevalcap" else find_spec(name))
    meteor = report(0)["by_name"]["meteor"]
    assert (meteor["state"], meteor["advice"]) == ("note", "pip install pycocoevalcap")


def test_missing_and_old_packages_are_problems(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def other(name: str) -> str:
        if name == "grain":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.0" if name == "optax" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    found = report(1)["by_name"]
    assert (found["grain"]["value"], found["grain"]["state"]) == ("missing", "problem")
    assert found["grain"]["advice"] == 'pip install "grain>=0.2.18"'
    assert found["optax"]["advice"] == 'needs >=0.2.8: pip install "optax>=0.2.8"'


def test_devices_that_fail_or_do_not_answer(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(doctor, "_ask_devices", fail)
    assert "Unable to initialize backend" in report(1)["by_name"]["devices"]["value"]
    monkeypatch.setattr(doctor, "_SECONDS_FOR_DEVICES", 0.05)
    monkeypatch.setattr(doctor, "_ask_devices", lambda: time.sleep(1))
    found = report(1)["by_name"]["devices"]
    assert found["value"] == "no answer within 0 s"
    assert "on all of them at once" in found["advice"]


def test_a_broken_installation_is_reported(tmp_path: Path) -> None:
    """A module that cannot be imported is a finding, not a traceback."""
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from imgcap_jax.cli.main import main; "
        f"sys.exit(main(['doctor']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert "broken on purpose" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
