"""Commands whose data, features or runs are in buckets (tests/buckets.py)."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.data import sources
from imgcap_jax.data.features import FeatureStore, PartOfStore
from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.regions import ReadyRegions, RegionFiles
from imgcap_jax.data.scenes.builder import SceneSplits
from imgcap_jax.data.sources import open_source
from imgcap_jax.errors import UserError
from imgcap_jax.remote import place
from imgcap_jax.run import mirror

URL = "gs://bucket/runs/several"


@pytest.fixture
def buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the file system. Its bucket `bucket` is the folder tmp_path/gs/bucket."""
    spec = importlib.util.spec_from_file_location("buckets", Path(__file__).parent.parent / "buckets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "gs" / "bucket").mkdir(parents=True)
    monkeypatch.setenv("FAKE_BUCKETS", str(tmp_path / "gs"))
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "a"))
    monkeypatch.setattr(mirror, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(fsspec, "url_to_fs", module.open_url)
    return module.Buckets


def test_dataset_is_prepared_in_a_bucket(
    buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "prepare", "scenes", "--train-scenes", "5", "--data-dir", "gs://bucket/data"]
    tiny = SceneSplits(train=5, val=2, test=2, test_compositional=2, image_size=32)
    monkeypatch.setattr("imgcap_jax.data.scenes.builder.SceneSplits", lambda train: tiny)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "in gs://bucket/data/scenes/1.0.0" in out
    assert "next: imgcap data inspect scenes --data-dir gs://bucket/data" in out
    assert Path(buckets.written[-1]).name == "dataset_info.json"
    assert not any("lock" in name or ".tmp" in name for name in buckets.written)
    before = len(buckets.written)
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "b"))
    assert main(arguments) == 0
    assert "already prepared in gs://bucket/data/scenes/1.0.0" in capsys.readouterr().out
    assert len(buckets.written) == before
    assert open_source("scenes", "train", Path("gs://bucket/data"))[4].captions


def test_interrupted_upload_of_a_dataset_is_completed_and_a_new_one_is_read(
    buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = SceneSplits(train=5, val=2, test=2, test_compositional=2, image_size=32)
    data = tmp_path / "gs" / "bucket" / "data" / "scenes" / "1.0.0"
    buckets.failures = 100
    with pytest.raises(UserError, match=r"gs://bucket/data/scenes/1\.0\.0/.* can't be written"):
        prepare("scenes", data_dir=Path("gs://bucket/data"), scenes=tiny, progress=False)
    assert not (data / "dataset_info.json").exists()
    buckets.failures = 0
    prepare("scenes", data_dir=Path("gs://bucket/data"), scenes=tiny, progress=False)
    assert (data / "dataset_info.json").is_file()
    # Another machine replaces the dataset.
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "b"))
    prepare("scenes", data_dir=Path("gs://bucket/data"), scenes=replace(tiny, train=6), progress=False)
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "a"))
    sources._pull.cache_clear()  # as in another process
    assert len(open_source("scenes", "train", Path("gs://bucket/data"))) == 6


def test_whole_store_in_a_bucket_is_used_for_a_part(
    buckets: Any, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("scenes", "val", tiny_data)
    (tmp_path / "files").mkdir()
    for number, image_id in enumerate(source.image_ids()):
        np.save(tmp_path / "files" / f"{image_id}.npy", np.full((1, 2), number, np.float32))
    regions = ReadyRegions(RegionFiles(tmp_path / "files", region_size=2, max_regions=3), source)

    def store(images: list[int] | None = None) -> FeatureStore | PartOfStore:
        return FeatureStore.of_regions(regions, root=place("gs://bucket/cache"), progress=False, images=images)

    assert isinstance(store([2, 5]), PartOfStore)  # the bucket has nothing yet
    store()
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "small"))
    size = len(source) * 3 * 2 * 2
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * size - 1))
    part = store([3, 4])
    assert isinstance(part, PartOfStore)
    assert part.read(4, 0)[0][0, 0] == 4
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * size))
    monkeypatch.setattr(ReadyRegions, "read", lambda *_: pytest.fail("computed again"))
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "b"))
    whole = store([3, 4])
    assert isinstance(whole, FeatureStore)
    assert [whole.read(i, 0)[0][0, 0] for i in (3, 4, 7)] == [3, 4, 7]
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "a"))
    assert isinstance(store([2, 5]), FeatureStore)  # it is here


@pytest.mark.slow
def test_population_in_a_bucket_continues_on_another_machine(
    buckets: Any,
    tiny_data: Path,
    tiny_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = tmp_path / "gs" / "bucket" / "runs" / "several"
    words = ["train", str(tiny_file), "--data.data-dir", str(tiny_data), "--run", URL]
    arguments = [*words, "--population", "training.seed=0..1"]
    assert main([*arguments, "--training.epochs", "1"]) == 0
    assert f"next: imgcap evaluate {URL}/seed=" in capsys.readouterr().out
    for name in ("seed=0", "seed=1"):
        assert (bucket / name / "checkpoints" / "newest" / "5" / "SHA256SUMS").is_file()
        assert json.loads((bucket / name / "experiment.json").read_text())
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "b"))
    assert main(arguments) == 2
    assert "training.epochs: 1" in capsys.readouterr().err
    assert main([*arguments, "--training.epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("5 steps, best validation CIDEr-D") == 2
    assert main(["evaluate", f"{URL}/seed=1", "--split", "test"]) == 0
    assert (bucket / "seed=1" / "scores_test.json").is_file()
    assert main([*words[:-1], f"{URL}/seed=1", "--population", "training.seed=0..1"]) == 2
    assert f"{URL}/seed=1 is a run" in capsys.readouterr().err
