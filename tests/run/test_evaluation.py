"""Evaluation on several devices and in several processes, compared with one device."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from imgcap_jax.data.pipeline import images_of_rows
from imgcap_jax.data.sources import open_source
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.models.model import split_trained
from imgcap_jax.run.evaluation import Captioned, SplitEvaluator, batch_size, chosen_steps, evaluated_images
from imgcap_jax.run.folder import Run
from imgcap_jax.run.members import Member
from imgcap_jax.training.checkpoints import latest_step, restore_best
from imgcap_jax.training.parallel import DataParallel

BEAM = Decoding(beam=3, n_best=2, max_words=12)
SAMPLES = Decoding(beam=1, samples=2, max_words=12, seed=3)


def found_by(parallel: DataParallel, folder: Path, members: int = 1) -> tuple[list[Captioned], dict[str, float]]:
    """The captions of the test split (12 images), searched for and sampled, and the teacher-forced loss."""
    run = Run.load(folder)
    source = open_source("scenes", "test", run.experiment.data.data_dir)
    graph, own, rest = split_trained(run.model(with_encoder=True, restored=True))
    params, frozen = restore_best(folder, parallel.replicate(own))[0], parallel.replicate(rest)
    evaluator = SplitEvaluator(
        [Member(graph, run.experiment.data, None)] * members, source, run.vocabulary, parallel, say=lambda line: None
    )
    decoded = [evaluator.caption([params] * members, [frozen] * members, decoding) for decoding in (BEAM, SAMPLES)]
    return decoded, evaluator.teacher_forced(params, frozen)


@pytest.fixture(scope="module")
def alone(trained: Path) -> tuple[list[Captioned], dict[str, float]]:
    return found_by(DataParallel(devices=jax.devices()[:1]), trained)


def check_same(found: Any, expected: Any) -> None:
    (ours, loss), (theirs, expected_loss) = found, expected
    for one, other in zip(ours, theirs, strict=True):
        assert one.captions == other.captions
        assert list(one.captions) == list(other.captions)
        assert one.unfinished == other.unfinished
        for image_id, hypotheses in other.hypotheses.items():
            scores = [found.score for found in one.hypotheses[image_id]]
            np.testing.assert_allclose(scores, [found.score for found in hypotheses], rtol=1e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_captions_do_not_depend_on_the_number_of_devices(
    trained: Path, alone: tuple[list[Captioned], dict[str, float]]
) -> None:
    found = found_by(DataParallel(devices=jax.devices()[:3]), trained, members=2)  # two equal members are one model
    check_same(found, alone)
    for ours, theirs in zip(found[0], alone[0], strict=True):
        assert ours.mean_steps == theirs.mean_steps  # of the device with the longest caption


def test_mapped_rows_need_no_collective() -> None:
    parallel = DataParallel(devices=jax.devices()[:2])
    program = parallel.map_rows(lambda scale, batch: (batch["x"] * scale).sum())
    batch = parallel.put_rows({"x": np.arange(4, dtype=np.float32)}, 4)
    text = program.lower(np.float32(2), batch).compile().as_text()  # type: ignore[attr-defined]
    assert "multiply" in text
    assert not [name for name in ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute(") if name in text]
    np.testing.assert_array_equal(parallel.own(program(np.float32(2), batch)), [2, 10])


def test_each_image_belongs_to_one_process() -> None:
    class Half(DataParallel):
        """The devices of one of two processes."""

        def __init__(self, which: int) -> None:
            super().__init__(devices=jax.devices()[:4])
            self.which = which

        def rows(self, count: int) -> np.ndarray:
            return np.split(np.arange(count), 2)[self.which]

    assert batch_size(1000, 1) == 64
    assert batch_size(10, 4) == 12
    for images in (1, 5, 10, 256, 600, 1000):
        first, second = (evaluated_images(images, Half(which)) for which in (0, 1))
        if images > 2:
            assert sorted(first + second) == list(range(images))
        assert second
    assert images_of_rows(10, 4, np.array([2, 3])) == [2, 3, 6, 7]
    assert images_of_rows(1, 4, np.array([2, 3])) == [0]


TWO = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from imgcap_jax.training.parallel import DataParallel, join_processes
folder, port, index, out = sys.argv[1:]
join_processes(f"127.0.0.1:{port},2,{index}")
from imgcap_jax.data import pipeline
read, image = [], pipeline._EvalRows._image
pipeline._EvalRows._image = lambda self, i: (read.append(int(i)), image(self, i))[1]
sys.path.insert(0, os.environ["TESTS"])
from test_evaluation import found_by
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.run.folder import Run
from imgcap_jax.run.members import Member
decoded, loss = found_by(DataParallel("shard_map"), Path(folder + "0"))
captions = [asdict(one) | {"tokens": None} for one in decoded]
found = {"read": sorted(set(read)), "captions": captions, "loss": loss}

from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.data.sources import open_source
from imgcap_jax.experiment import Experiment
from imgcap_jax.run.evaluation import evaluated_images
from imgcap_jax.run.extraction import Extraction
regions = Path(os.environ["REGIONS"])
experiment = Experiment(encoder=RegionFiles(regions, region_size=2, max_regions=3))
source, parallel = open_source("scenes", "test", None), DataParallel("shard_map")
for name in ("own" + index, "common"):
    extraction = Extraction(experiment, regions.parent / name, progress=False, parallel=parallel)
    store = extraction.regions(source, views=1, images=evaluated_images(len(source), parallel))
    rows = store.shape[0] if name == "common" else store.store.shape[0]
    batches = pipeline.eval_batches(experiment.data, source, batch_size=12, rows=parallel.rows(12), features=store)
    found[name[:3]] = [rows, next(iter(batches))["regions"][:, 0, 0].tolist()]

from imgcap_jax.errors import UserError
from imgcap_jax.run.evaluation import sweep
run = Run.load(Path(folder + index))
for name, beam in (("different", 1 + int(index)), ("equal", 1)):
    decoding = Decoding(beam=beam, max_words=8)
    try:
        found[name] = next(sweep([run], "test", cache=regions.parent / "common", decodings=[decoding])).steps
    except UserError as error:
        found[name] = str(error)
Path(out).write_text(json.dumps(found))
"""


def test_two_processes_share_the_images_and_find_the_same(
    trained: Path, alone: tuple[list[Captioned], dict[str, float]], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    data_dir = Run.load(trained).experiment.data.data_dir
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "TESTS": str(Path(__file__).parent),
        "REGIONS": str(tmp_path / "regions"),
        "TFDS_DATA_DIR": str(data_dir),
    }
    (tmp_path / "regions").mkdir()
    copies = [tmp_path / f"run{index}" for index in (0, 1)]
    for copy in copies:
        shutil.copytree(trained, copy)
    (best,) = {latest_step(copy / "checkpoints" / "best") for copy in copies}
    assert best is not None
    later = copies[1] / "checkpoints" / "best" / str(best + 1)  # as if training saved it in between
    shutil.copytree(later.with_name(str(best)), later)
    for place, image_id in enumerate(open_source("scenes", "test", data_dir).image_ids()):
        np.save(tmp_path / "regions" / f"{image_id}.npy", np.full((1, 2), place, np.float32))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path / "run"), port, str(index), str(tmp_path / f"{index}.json")],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1))
    assert first["read"] == [0, 1, 2, 3, 4, 5]
    assert second["read"] == [6, 7, 8, 9, 10, 11]
    # Without a common cache each process stores the regions of its own images.
    assert [first["own"], second["own"]] == [[6, [0, 1, 2, 3, 4, 5]], [6, [6, 7, 8, 9, 10, 11]]]
    assert [first["com"], second["com"]] == [[12, [0, 1, 2, 3, 4, 5]], [12, [6, 7, 8, 9, 10, 11]]]
    # All evaluate the parameters that the first process has found, and refuse different settings.
    assert first["equal"] == second["equal"] == [best]
    assert first["different"] == second["different"]
    assert first["different"].startswith("the processes evaluate different runs, data or settings; use the same")
    assert first["captions"][0]["captions"] == second["captions"][0]["captions"]
    assert first["loss"] == second["loss"]
    assert first["loss"] == pytest.approx(alone[1], rel=1e-5)
    for found, expected in zip(first["captions"], alone[0], strict=True):
        assert [*found["captions"].values()] == [*expected.captions.values()]
        assert found["mean_steps"] == expected.mean_steps
        assert [len(one) for one in found["hypotheses"].values()] == [len(o) for o in expected.hypotheses.values()]


def test_processes_with_different_numbers_of_runs_agree_on_that_before_anything_else(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.load(trained)
    source = open_source("scenes", "test", run.experiment.data.data_dir)
    compared: list[str] = []

    def same(value: object, answer: bool) -> bool:
        compared.append(repr(value))
        return answer

    def fake(*answers: bool) -> Any:
        following = iter(answers)
        return SimpleNamespace(same=lambda value: same(value, next(following)), broadcast_all=list)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for runs in ([run], [run, run]):
        other = fake(False)
        other.broadcast_all = lambda numbers: pytest.fail("the processes could wait for each other")
        with pytest.raises(UserError, match="the processes evaluate different runs, data or settings"):
            chosen_steps(runs, source, [], other)
    assert compared[0] != compared[1]
    step = latest_step(trained / "checkpoints" / "best")
    assert chosen_steps([run, run], source, [], fake(True, True)) == [step, step]
    with pytest.raises(UserError, match="the processes evaluate different"):
        chosen_steps([run, run], source, [], fake(True, False))
