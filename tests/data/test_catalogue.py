"""`imgcap data list`: datasets that can be used, and those that cannot, with the reason."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.data.catalogue import list_datasets

List = Callable[..., list[str]]


@pytest.fixture
def listed(capsys: pytest.CaptureFixture[str]) -> List:
    """The lines that the command prints."""

    def run(data_dir: Path) -> list[str]:
        assert main(["data", "list", "--data-dir", str(data_dir)]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_no_datasets(tmp_path: Path, listed: List, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    (line,) = listed(tmp_path)
    assert line.startswith(f"no datasets in {tmp_path}; ")
    assert "imgcap data prepare" in line
    assert listed(tmp_path / "gone")[0].startswith(f"the folder {tmp_path / 'gone'} does not exist; ")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert main(["data", "list"]) == 0


def test_datasets_with_their_splits_sizes_and_problems(tiny_data: Path, tmp_path: Path, listed: List) -> None:
    version = next((tiny_data / "scenes").iterdir()).name
    for name in ("scenes", "scenes_longer_name", "lost", "changed", "other_kind"):
        shutil.copytree(tiny_data / "scenes", tmp_path / name)
    (tmp_path / "lost" / version / "dataset_info.json").unlink()
    (record,) = (tmp_path / "changed" / version).glob("*val*.array_record*")
    record.write_bytes(record.read_bytes()[:-1])
    for name in ("SHA256SUMS", "features.json"):
        (tmp_path / "other_kind" / version / name).unlink()
    features = '{"featuresDict": {"features": {"label": {}}}}'  # as of a TFDS dataset without captions
    (tmp_path / "other_kind" / version / "features.json").write_text(features)
    (tmp_path / "half" / "incomplete.abcdefgh").mkdir(parents=True)
    (tmp_path / "downloads").mkdir()
    nested = tmp_path / "coco_captions" / "2014"  # a config and a version, as TFDS has it
    nested.mkdir(parents=True)
    shutil.copytree(tiny_data / "scenes" / version, nested / "1.1.0")
    (nested / "1.1.0" / "dataset_info.json").unlink()
    lines = listed(tmp_path)
    assert lines[0] == f"datasets in {tmp_path}"
    rows = {line.split()[0]: line for line in lines[3:9]}
    assert list(rows) == ["changed", "coco_captions", "half", "lost", "scenes", "scenes_longer_name"]
    size = sum(path.stat().st_size for path in (tmp_path / "scenes").rglob("*") if path.is_file())
    assert f"train 40, val 8, test 12, test_compositional 8  {size / 1000:.0f} kB  drawn by" in rows["scenes"]
    assert rows["scenes"].index("train") == rows["lost"].index("cannot be used") == lines[2].index("images")
    said = dict(line.split(": ", 1) for line in lines[10:])
    assert list(said) == ["changed", "coco_captions", "half", "lost"]
    assert f"{nested}/1.1.0/dataset_info.json is missing: delete its folder" in said["coco_captions"]
    assert record.name in said["changed"]
    assert "not complete" in said["half"]
    assert "dataset_info.json is missing: delete its folder and prepare the dataset again" in said["lost"]


def test_files_that_are_renamed_meanwhile_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half" / "incomplete.abcdefgh").mkdir(parents=True)
    (tmp_path / "half" / "incomplete.abcdefgh" / "there").write_text("12345")
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda folder: ((at, below, [*names, "gone"]) for at, below, names in walk(folder)))
    (found,) = list_datasets(tmp_path)
    assert found.size == 5
