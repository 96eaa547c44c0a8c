"""Services that get the metrics of a run: their threads, failures, resumed runs, and the real packages offline."""

import gc
import importlib.util
import io
import json
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from imgcap_jax.errors import UserError
from imgcap_jax.training import log as log_module
from imgcap_jax.training.log import LogTo, MetricsLog, Sample
from imgcap_jax.training.writers import find
from imgcap_jax.training.writers.contract import LoggedRun, WriterSettings
from imgcap_jax.training.writers.find import find_writers
from imgcap_jax.training.writers.mlflow import Mlflow
from imgcap_jax.training.writers.trackio import Trackio
from imgcap_jax.training.writers.wandb import Wandb
from imgcap_jax.training.writers.worker import MOST_WAITING

SAMPLES = [Sample(7, "a\udce9.jpg", "a dog runs", ["the dog is running"]), Sample(8, "b.jpg", "two <unk>", ["cats"])]
SETTINGS = {"decoder.hidden_size": 512, "decoder.type": "x:Y", "data.side_words": ["left", "right"], "data.dir": None}


@dataclass
class Recorded:
    """What a service has. It outlives the process."""

    lines: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)
    pictures: list[tuple[int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    opened: list[LoggedRun] = field(default_factory=list)
    threads: set[int | None] = field(default_factory=set)
    closed: int = 0


@dataclass(frozen=True)
class Service:
    """A service in memory. fails: at which call it raises an error."""

    recorded: Recorded
    fails: str = ""
    waits: threading.Event | None = None

    def open(self, run: LoggedRun) -> "Service":
        self._call("open")
        self.recorded.opened.append(run)
        return self

    def _call(self, name: str) -> None:
        if name == self.fails:
            raise ConnectionError(f"{name}: no\nnetwork.")
        if self.waits is not None:
            self.waits.wait(60)
        self.recorded.threads.add(threading.current_thread().ident)

    def last_step(self, kind: str) -> int:
        return max((step for one, step, _ in self.recorded.lines if one == kind), default=-1)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._call("scalars")
        self.recorded.lines.append((kind, step, dict(values)))

    def samples(self, step: int, samples: Sequence[Sample], pictures: Sequence[np.ndarray]) -> None:
        self.recorded.names += [sample.file_name for sample in samples]
        self.recorded.pictures.append((step, len(pictures)))

    def close(self) -> None:
        self.recorded.closed += 1


def pictures() -> list[np.ndarray]:
    return [np.full((4, 5, 3), number, np.uint8) for number in range(len(SAMPLES))]


def train(folder: Path, first: int, last: int, services: Mapping[str, WriterSettings], **options: Any) -> list[str]:
    """Logs steps as training does, with a validation at each even one. Returns the lines that are shown."""
    folder.mkdir(exist_ok=True)
    shown: list[str] = []
    to = LogTo(services, group="seeds")
    log = MetricsLog(folder, first, steps_per_epoch=4, to=to, settings=SETTINGS, show=shown.append)
    for step in range(first + 1, last + 1):
        log.write("train", step, {"loss": 1.0 / (step + 1), "rate": float("nan")})
        if step % 2 == 0:
            log.write("validation", step, {"CIDEr-D": 0.1 * step, "BLEU-4": 0.25})
            log.write_samples(step, SAMPLES, options.get("draw"))
    log.close()
    return shown


def logged(folder: Path) -> list[tuple[str, int, dict[str, float]]]:
    """The lines of metrics.jsonl without numbers that are not finite."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("kind"), line.pop("step"), {k: v for k, v in line.items() if v is not None}) for line in lines]


def test_service_gets_the_metrics_in_a_thread_of_its_own(tmp_path: Path) -> None:
    recorded = Recorded()
    assert train(tmp_path, 0, 4, {"mine": Service(recorded)}, draw=pictures) == []
    assert recorded.lines == logged(tmp_path)
    assert len(recorded.lines) == 6
    assert recorded.pictures == [(2, 2), (4, 2)]
    assert recorded.names == [r"a\xe9.jpg", "b.jpg"] * 2
    assert recorded.closed == 1
    assert len(recorded.threads) == 1
    assert threading.current_thread().ident not in recorded.threads
    (run,) = recorded.opened
    assert (run.name, run.group, run.settings) == (tmp_path.name, "seeds", SETTINGS)


def test_resumed_run_has_the_same_id_and_repeats_no_step(tmp_path: Path) -> None:
    recorded = Recorded()
    train(tmp_path, 0, 5, {"mine": Service(recorded)})
    train(tmp_path, 3, 8, {"mine": Service(recorded)})  # killed at step 5, after a checkpoint at step 3
    assert len({run.id for run in recorded.opened}) == 1
    assert [(kind, step) for kind, step, _ in recorded.lines] == [
        (kind, step) for step in range(1, 9) for kind in (("train", "validation") if step % 2 == 0 else ("train",))
    ]
    train(other := tmp_path / "other", 0, 1, {"mine": Service(recorded)})
    assert recorded.opened[-1].id != recorded.opened[0].id
    assert (other / "log_id.json").is_file()


def test_service_that_is_added_later_gets_all_earlier_metrics(tmp_path: Path) -> None:
    train(tmp_path, 0, 4, {})
    assert not (tmp_path / "log_id.json").exists()
    recorded = Recorded()
    train(tmp_path, 4, 6, {"mine": Service(recorded)})
    assert recorded.lines == logged(tmp_path)


@pytest.mark.parametrize("fails", ["open", "scalars"])
def test_service_that_fails_is_noted_once_and_others_go_on(tmp_path: Path, fails: str) -> None:
    recorded = Recorded()
    shown = train(tmp_path, 0, 6, {"bad": Service(Recorded(), fails), "good": Service(recorded)}, draw=pictures)
    note = f"note: bad: {fails}: no network; training continues without it, and metrics.jsonl has all metrics"
    assert shown == [note]
    assert recorded.lines == logged(tmp_path)


@pytest.mark.parametrize("fails", ["open", "scalars"])
def test_failed_service_keeps_nothing_in_memory(tmp_path: Path, fails: str) -> None:
    log = MetricsLog(tmp_path, 0, steps_per_epoch=4, to=LogTo({"bad": Service(Recorded(), fails)}), show=lambda _: None)
    kept: list[weakref.ref[Any]] = []

    def write(step: int) -> None:
        sample = replace(SAMPLES[0], image_id=step)
        kept.append(weakref.ref(sample))
        log.write("train", step, {"loss": 1.0})
        log.write_samples(step, [sample])

    write(1)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "bad"] or [None]
    if thread is not None:
        thread.join(10)
    for step in range(2, 50):
        write(step)
    gc.collect()
    assert [sample for sample in kept if sample() is not None] == []
    log.close()


def test_service_that_hangs_for_long_gets_all_metrics_from_the_file(tmp_path: Path) -> None:
    hangs, recorded = threading.Event(), Recorded()
    shown: list[str] = []
    service = Service(recorded, waits=hangs)
    log = MetricsLog(tmp_path, 0, steps_per_epoch=4, to=LogTo({"slow": service}), show=shown.append)
    drawn: list[weakref.ref[Any]] = []

    def write(step: int) -> None:
        sample = replace(SAMPLES[0], image_id=step)
        drawn.append(weakref.ref(sample))
        log.write("train", step, {"loss": 1.0 / step})
        log.write("validation", step, {"CIDEr-D": 0.1})
        log.write_samples(step, [sample])

    for step in range(1, 4 * MOST_WAITING):
        write(step)
    gc.collect()
    assert len([sample for sample in drawn if sample() is not None]) <= MOST_WAITING
    hangs.set()
    log.close()
    assert shown == ["note: slow is late: it gets all metrics, but not the captions of every validation"]
    assert recorded.lines == logged(tmp_path)
    assert len(recorded.lines) == 2 * (4 * MOST_WAITING - 1)
    assert recorded.pictures[-1][0] == 4 * MOST_WAITING - 1
    assert recorded.closed == 1


def test_training_does_not_wait_for_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_CLOSING_SECONDS", 0.2)
    never = threading.Event()
    began = time.monotonic()
    (note,) = train(tmp_path, 0, 6, {"slow": Service(Recorded(), waits=never)})
    never.set()
    assert time.monotonic() - began < 20
    assert note == "note: slow has not taken all metrics; metrics.jsonl has them, and the same command sends the rest"
    assert len(logged(tmp_path)) == 9


def test_pictures_that_cannot_be_drawn_are_left_out(tmp_path: Path) -> None:
    def draw() -> list[np.ndarray]:
        raise UserError("b.jpg: damaged")

    recorded = Recorded()
    shown = train(tmp_path, 0, 2, {"mine": Service(recorded)}, draw=draw)
    assert shown == ["note: the captions of validation images are logged without pictures: b.jpg: damaged"]
    assert recorded.pictures == [(2, 0)]
    assert recorded.closed == 1


def test_names_of_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_is_installed", lambda name: name != "wandb")
    assert find_writers(["mlflow, trackio", "mlflow"]) == {"mlflow": Mlflow(), "trackio": Trackio()}
    for name, message in {
        "wandb": "--log wandb: the package is not installed; pip install wandb",
        "": "there is no such service; use wandb, trackio, mlflow, or MODULE:CLASS",
        "absent_module:Writer": "absent_module is not imported; add --code absent_module.py",
        "imgcap_jax.experiment:Training": "Training has no 'open'",
    }.items():
        with pytest.raises(UserError, match=message):
            find_writers([name])


def test_tensorboard_has_the_attention_of_samples(trained: Path) -> None:
    sizes: dict[str, list[tuple[int, int]]] = {}
    for path in sorted((trained / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # records with a length and two checksums
            (size,) = struct.unpack("<Q", data[:8])
            for value in Event.FromString(data[12 : 12 + size]).summary.value:
                if value.HasField("image"):
                    picture = Image.open(io.BytesIO(value.image.encoded_image_string))
                    sizes.setdefault(value.tag, []).append(picture.size)
            data = data[16 + size :]
    assert sorted(sizes) == [f"validation/sample_{number}" for number in range(1, 6)]
    assert all(len(found) == 2 for found in sizes.values())  # validations
    samples = json.loads((trained / "samples.jsonl").read_text().splitlines()[-1])["samples"]
    for number, sample in enumerate(samples, 1):
        words = len(sample["caption"].split())
        width, height = sizes[f"validation/sample_{number}"][-1]
        assert width >= 7 * 96  # the image and at least six words
        assert height >= -(-(words + 1) // 7) * 96


# The real packages, offline. Each reads back what it has stored: (kind, step, name) -> value.
Stored = dict[tuple[str, int, str], list[float]]


def _stored(values: Sequence[tuple[str, int, float]]) -> Stored:
    found: Stored = {}
    for name, step, value in values:
        kind, _, metric = name.partition("/")
        found.setdefault((kind, step, metric), []).append(value)
    return found


def read_wandb(folder: Path) -> Stored:
    """The newest file of an offline run, which is a log of LevelDB: records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    path = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda one: one.stat().st_mtime_ns)
    data, place, record, values = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record = (b"" if kind in (1, 2) else record) + data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            history = Record.FromString(record).history
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
            numbers = {
                name: value for name, value in items.items() if isinstance(value, float | int) and name.count("/") == 1
            }
            values += [(name, items["_step"], value) for name, value in numbers.items()]
    return _stored(values)


def read_mlflow(folder: Path) -> Stored:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("imgcap")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["decoder.hidden_size"] == "512"
    assert run.info.status == "FINISHED"
    points = [point for name in run.data.metrics for point in client.get_metric_history(run.info.run_id, name)]
    return _stored([(point.key, point.step, point.value) for point in points])


def read_trackio(folder: Path) -> Stored:
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = Api().runs("imgcap")
    logs = SQLiteStorage.get_logs("imgcap", run.name)
    return _stored(
        [
            (name, line["step"], value)
            for line in logs
            for name, value in line.items()
            if "/" in name and isinstance(value, float | int)
        ]
    )


SERVICES: dict[str, tuple[WriterSettings, Callable[[Path], Stored]]] = {
    "wandb": (Wandb(), read_wandb),
    "mlflow": (Mlflow(), read_mlflow),
    "trackio": (Trackio(), read_trackio),
}


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.filterwarnings("default")  # deprecated calls within the packages
def test_offline_files_have_the_metrics_of_the_run(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install {name})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    service, read = SERVICES[name]
    if name == "trackio":  # reads the folder when it is imported
        from trackio import utils

        monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    run = tmp_path / "run"
    assert train(run, 0, 5, {name: service}, draw=pictures) == []
    assert train(run, 3, 8, {name: service}, draw=pictures) == []  # killed at step 5, after a checkpoint at step 3
    expected = {(kind, step, metric): v for kind, step, values in logged(run) for metric, v in values.items()}
    found = read(tmp_path)
    assert {place for place, values in found.items() if len(values) != 1} == set()
    differ = {place for place in found.keys() | expected.keys() if found.get(place) != [expected.get(place)]}
    # The seconds of repeated steps are those of the first time.
    assert {place for place in differ if place[2] != "seconds"} == set()
    assert not {place for place in differ if place[1] > 5}
