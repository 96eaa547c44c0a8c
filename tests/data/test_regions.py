"""Ready-made regions: finding the files, padding and masks, training and captioning."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcap_jax.captioner import Captioner
from imgcap_jax.data import features
from imgcap_jax.data.features import FeatureStore, PartOfStore
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.regions import ReadyRegions, RegionFiles
from imgcap_jax.data.sources import CaptionSource, open_source
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, Training, from_json, to_json
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.run.evaluation import evaluate
from imgcap_jax.run.extraction import Extraction
from imgcap_jax.run.folder import Run
from imgcap_jax.train import train
from imgcap_jax.training.cross_entropy import CrossEntropy

D = 6


@pytest.fixture(scope="module")
def source(tiny_data: Path) -> CaptionSource:
    return open_source("scenes", "train", tiny_data)


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 to 5 regions per image in all supported layouts, in files named by image id."""
    folder = tmp_path_factory.mktemp("regions")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i, image_id in enumerate(open_source("scenes", split, tiny_data).image_ids()):
            regions = rng.random((1 + i % 5, D)).astype(np.float32)
            match i % 4:
                case 0:
                    np.savez_compressed(folder / f"{image_id}.npz", feat=regions)
                case 1:
                    np.savez(folder / f"{image_id}.npz", feat=regions, boxes=np.zeros(3))
                case 2:
                    np.save(folder / f"{image_id}.npy", regions)
                case 3:
                    np.savez(folder / f"{image_id}.npz", any_name=regions.reshape(len(regions), 1, D))
    return folder


def test_files_must_be_named_in_one_way(source: CaptionSource, tmp_path: Path) -> None:
    class Photos:
        """Images 1.jpg, 2.jpg and 3.jpg with the ids 0, 1 and 2."""

        name, split = "photos", "train"

        def __len__(self) -> int:
            return 3

        def filenames(self) -> list[str]:
            return ["1.jpg", "2.jpg", "3.jpg"]

        def image_ids(self) -> list[int]:
            return [0, 1, 2]

    photos: Any = Photos()
    for number in (1, 2, 3):
        np.save(tmp_path / f"{number}.npy", np.full((1, D), number, np.float32))
    ready = ReadyRegions(RegionFiles(tmp_path, region_size=D, max_regions=2), photos)
    assert [ready.read(i, 0)[0][0, 0] for i in range(3)] == [1, 2, 3]
    np.save(tmp_path / "0.npy", np.zeros((1, D), np.float32))
    with pytest.raises(UserError, match="by file name and by image id"):
        ReadyRegions(RegionFiles(tmp_path, region_size=D), photos)
    np.savez(tmp_path / "0.npz", np.zeros((1, D), np.float32))
    with pytest.raises(UserError, match=r"both 0\.npy and 0\.npz"):
        ReadyRegions(RegionFiles(tmp_path, region_size=D), photos)


def test_regions_are_padded_and_masked(source: CaptionSource, folder: Path) -> None:
    ready = ReadyRegions(RegionFiles(folder, region_size=D, max_regions=4), source)
    assert len(ready) == len(source)
    for i in range(8):
        regions, mask = ready.read(i, 0)
        assert mask is not None
        count = min(1 + i % 5, 4)
        assert regions.shape == (4, D)
        np.testing.assert_array_equal(mask, np.arange(4) < count)
        assert (regions[:count] > 0).all()
        assert not regions[count:].any()
    exact = np.load(folder / f"{source.image_ids()[2]}.npy")
    np.testing.assert_array_equal(ready.read(2, 0)[0][:3], exact)


def test_errors_name_the_problem(source: CaptionSource, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        ReadyRegions(RegionFiles(tmp_path / "nowhere"), source)
    with pytest.raises(UserError, match="40 of 40 images have no region file"):
        ReadyRegions(RegionFiles(tmp_path), source)
    with pytest.raises(UserError, match="no feature `regions`"):
        ReadyRegions(RegionFiles(), source)
    with pytest.raises(UserError, match=r"expected floating-point regions \[n, 2048\]"):
        ReadyRegions(RegionFiles(folder), source).read(0, 0)
    with pytest.raises(UserError, match="has no array 'x' but feat, boxes"):
        ReadyRegions(RegionFiles(folder, region_size=D, key="x"), source).read(1, 0)
    compressed = (folder / f"{source.image_ids()[0]}.npz").read_bytes()
    damaged = compressed[:60] + bytes(20) + compressed[80:]
    broken = tmp_path / "broken"
    broken.mkdir()
    for image_id in source.image_ids():
        (broken / f"{image_id}.npz").write_bytes(b"PK not a zip")
    (broken / f"{source.image_ids()[1]}.npz").write_bytes(damaged)
    np.savez(broken / f"{source.image_ids()[2]}.npz", np.full((2, D), np.nan, np.float32))
    np.savez(broken / f"{source.image_ids()[3]}.npz", np.full((2, D), 1e300))
    np.savez(broken / f"{source.image_ids()[4]}.npz", np.zeros((2, 3, 0), np.float32))
    np.save(broken / "objects.npy", np.array([{}]), allow_pickle=True)
    (broken / "objects.npy").replace(broken / f"{source.image_ids()[5]}.npz")
    reasons = (
        "is damaged (File is not a zip file): make",
        "is damaged",
        "NaN",
        "beyond float32",
        "expected",
        "numbers",
    )
    for i, reason in enumerate(map(re.escape, reasons)):
        with pytest.raises(UserError, match=reason):
            ReadyRegions(RegionFiles(broken, region_size=D), source).read(i, 0)


def test_store_of_files_has_their_values_in_half_precision(
    source: CaptionSource, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RegionFiles(folder, region_size=D, max_regions=4)
    files = ReadyRegions(settings, source)
    experiment = Experiment(data=CaptionData("scenes"), encoder=settings)
    extraction = Extraction(experiment, tmp_path, progress=False)

    def limited(ready: ReadyRegions, i: int, view: int) -> Any:
        if i == 30:
            raise KeyboardInterrupt
        return read(ready, i, view)

    read = ReadyRegions.read
    monkeypatch.setattr(features, "_BATCH_OF_FILES", 2)
    monkeypatch.setattr(features, "_BLOCK_BATCHES", 2)
    with monkeypatch.context() as patch:
        patch.setattr(ReadyRegions, "read", limited)
        with pytest.raises(KeyboardInterrupt):
            extraction.regions(source, views=1)
    missing: list[int] = []
    monkeypatch.setattr(ReadyRegions, "read", lambda ready, i, view: (missing.append(i), read(ready, i, view))[1])
    store = extraction.regions(source, views=1)
    assert isinstance(store, FeatureStore)
    assert min(missing) == 28  # the interrupted block of four; finished blocks are not read again
    monkeypatch.setattr(ReadyRegions, "read", read)
    for i in range(len(source)):
        values, mask = store.read(i, 0)
        expected, expected_mask = files.read(i, 0)
        np.testing.assert_array_equal(values, expected.astype(np.float16))
        np.testing.assert_array_equal(mask, expected_mask)
    numbers, views = np.array([5, 0, 39]), np.zeros(3, np.int32)
    many, masks = store.read_many(numbers, views)
    assert masks is not None
    for place, i in enumerate(numbers.tolist()):
        np.testing.assert_array_equal(many[place], store.read(i, 0)[0])
        np.testing.assert_array_equal(masks[place], store.read(i, 0)[1])
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.read(3, 0)[1], files.read(3, 0)[1])
    shape = store.shape
    (store.folder / "counts.bin").write_bytes(bytes(4 * len(source)))
    with pytest.raises(UserError, match=r"counts\.bin is damaged \(its digest differs\): delete the folder"):
        FeatureStore(store.folder)
    part = FeatureStore.of_regions(files, root=tmp_path / "part", progress=False, images=[3, 7])
    assert isinstance(part, PartOfStore)
    assert (part.store.shape, len(part)) == ((2, *shape[1:]), len(source))
    np.testing.assert_array_equal(part.read(7, 0)[0], files.read(7, 0)[0].astype(np.float16))
    with pytest.raises(KeyError):
        part.read(4, 0)


def test_changed_region_file_makes_a_new_store(source: CaptionSource, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    settings = RegionFiles(copy, region_size=D, max_regions=4)
    before = FeatureStore.of_regions(ReadyRegions(settings, source), root=tmp_path, progress=False)
    assert isinstance(before, FeatureStore)
    shutil.move(copy, tmp_path / "moved")
    moved = ReadyRegions(RegionFiles(tmp_path / "moved", region_size=D, max_regions=4), source)
    same = FeatureStore.of_regions(moved, root=tmp_path, progress=False)
    assert isinstance(same, FeatureStore)
    assert same.folder == before.folder
    np.save(tmp_path / "moved" / f"{source.image_ids()[2]}.npy", np.ones((3, D), np.float32))
    after = FeatureStore.of_regions(moved, root=tmp_path, progress=False)
    assert isinstance(after, FeatureStore)
    assert after.folder != before.folder
    assert (after.read(2, 0)[0][:3] == 1).all()


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [
        ("float16", 1e5, r"ready-made regions of up to 1e\+05 do not fit float16; set data\.feature_dtype to bfloat16"),
        ("bfloat16", 3.4e38, r"ready-made regions of up to 3\.4e\+38 do not fit bfloat16; check their files"),
    ],
)
def test_values_that_no_dtype_holds_are_those_of_the_files(
    source: CaptionSource, folder: Path, tmp_path: Path, dtype: Any, value: float, said: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    np.save(tmp_path / "copy" / f"{source.image_ids()[2]}.npy", np.full((1, D), value, np.float32))
    ready = ReadyRegions(RegionFiles(tmp_path / "copy", region_size=D), source)
    with pytest.raises(UserError, match=said):
        FeatureStore.of_regions(ready, root=tmp_path, dtype=dtype, progress=False)


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def bomb(declared: int) -> bytes:
    """An .npz file of 30 kB whose member, said to have `declared` bytes, unpacks to 30 MB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("feat.npy", "w") as member:
            member.write(npy_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (1250000, {D})}}"))
            for _ in range(30):
                member.write(bytes(1_000_000))
        archive.getinfo("feat.npy").file_size = declared
    return stream.getvalue()


HOSTILE = {
    "shape not of numbers": (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2**40, 6)}"), "damaged"),
    "huge shape": (npy_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40}, 6)}}"), "does not match"),
    "negative": (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 6)}") + bytes(48), "damaged"),
    "objects": (npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 6)}") + bytes(96), "numbers"),
    "no bytes": (npy_header("{'descr': '<U0', 'fortran_order': False, 'shape': (2, 6)}"), "numbers"),
    "nested header": (npy_header("(" * 9000), "damaged"),
    "signs": (npy_header("-" * 9000 + "1"), "damaged"),
    "header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "damaged"),
    "zip bomb": (bomb(300_000_000), "300 MB of arrays in 0.0 MB"),
    "zip bomb with a wrong size": (bomb(1000), "damaged"),
    "empty": (b"", "damaged"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_region_files_cost_little(attack: str, source: CaptionSource, folder: Path, tmp_path: Path) -> None:
    content, reason = HOSTILE[attack]
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    first = tmp_path / f"{source.image_ids()[0]}.npz"
    first.unlink()
    first.write_bytes(content)
    ready = ReadyRegions(RegionFiles(tmp_path, region_size=D), source)
    tracemalloc.start()
    with pytest.raises(UserError) as raised:
        ready.read(0, 0)
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pipe_in_the_place_of_a_region_file_is_not_read(source: CaptionSource, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    first = tmp_path / f"{source.image_ids()[0]}.npz"
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(UserError, match=f"1 of {len(source)} images have no region file"):
        ReadyRegions(RegionFiles(tmp_path, region_size=D), source)


@pytest.fixture(scope="module")
def trained(tiny_data: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """Two runs that differ only in ``max_regions``, 5 and 9."""
    home = tmp_path_factory.mktemp("ready")
    runs = {}
    for room in (5, 9):
        experiment = Experiment(
            data=CaptionData("scenes", tiny_data, image_size=32, batch_size=8, captions_per_image=2, min_count=1),
            encoder=RegionFiles(folder, region_size=D, max_regions=room),
            decoder=ShowAttendTell(hidden_size=8, embedding_size=8, attention_size=4, region_size=None, dropout=0.0),
            objective=CrossEntropy(attention_penalty=1.0),
            training=Training(epochs=1, validation_images=8, log_steps=1),
            decoding=Decoding(beam=2),
        )
        train(experiment, home / str(room), cache=home / "cache", show=lambda line: None)
        runs[room] = Run.load(home / str(room))
    return runs


def test_padding_regions_have_no_effect(trained: dict[int, Run], tmp_path: Path) -> None:
    evaluations = [evaluate(run, "val", cache=tmp_path) for run in trained.values()]
    assert evaluations[0].captioned.captions == evaluations[1].captioned.captions
    lines = [(run.folder / "metrics.jsonl").read_text().splitlines() for run in trained.values()]
    losses = [[json.loads(line).get("loss") for line in some if '"train"' in line] for some in lines]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_run_on_ready_made_regions_cannot_caption_photos(trained: dict[int, Run]) -> None:
    experiment = trained[5].experiment
    assert from_json(to_json(experiment), "x") == experiment
    with pytest.raises(UserError, match="ready-made regions"):
        Captioner(trained[5])
