"""The log of a run: metrics.jsonl, samples.jsonl and TensorBoard events."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from imgcap_jax.training import metrics_file
from imgcap_jax.training.log import MetricsLog, Sample

SAMPLE = Sample(7, "a\udce9.jpg", "a dog runs", ["the dog is running", "a dog"])


def events(folder: Path) -> Iterator[tuple[int, str, float | str]]:
    """(step, tag, number or text) of the TensorBoard events, which are records with a length and two checksums."""
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                text = value.tensor.string_val
                yield event.step, value.tag, text[0].decode() if text else value.simple_value
            data = data[16 + size :]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_have_epoch_and_seconds_that_continue_in_a_resumed_run(tmp_path: Path, clock: list[float]) -> None:
    log = MetricsLog(tmp_path, -1, steps_per_epoch=4)
    for step in (1, 2, 3):
        clock[0] += 10
        log.write("train", step, {"loss": 1.0 / step, "rate": float("nan")})
        log.write_samples(step, [SAMPLE])
    log.close()
    # Killed; the last checkpoint was saved at step 2, after 20 seconds. Hours later it is resumed.
    clock[0] += 9999
    log = MetricsLog(tmp_path, 2, steps_per_epoch=4, seconds=20.0)
    clock[0] += 7
    log.write("train", 3, {"loss": 0.25, "rate": 1.0})
    log.write_samples(3, [SAMPLE])
    assert log.seconds == 27
    log.close()
    lines = read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["epoch"], line["seconds"], line["rate"]) for line in lines] == [
        (1, 0.25, 10, None),
        (2, 0.5, 20, None),
        (3, 0.75, 27, 1.0),
    ]
    samples = read(tmp_path / "samples.jsonl")
    assert [line["step"] for line in samples] == [1, 2, 3]
    assert samples[0]["samples"] == [
        {
            "image_id": 7,
            "file_name": "a\udce9.jpg",
            "caption": "a dog runs",
            "references": ["the dog is running", "a dog"],
        }
    ]


def test_tensorboard_shows_numbers_and_captions(tmp_path: Path, clock: list[float]) -> None:
    log = MetricsLog(tmp_path, -1, steps_per_epoch=4)
    log.write("validation", 2, {"CIDEr-D": 0.5, "rate": float("inf")})
    sample = Sample(7, "a_\udce9.jpg", "a <unk> *runs*", ["the dog is running", "a dog & a cat"])
    log.write_samples(2, [sample, sample])
    log.close()
    found = {tag: (step, value) for step, tag, value in events(tmp_path)}
    assert found["validation/CIDEr-D"] == (2, 0.5)
    assert found["validation/epoch"] == (2, 0.5)
    assert "validation/rate" not in found
    (step, text) = next(value for tag, value in found.items() if "captions" in tag)
    assert step == 2
    shown = r"**a &lt;unk&gt; \*runs\*** (a\_\\xe9.jpg)" + "\n\n* the dog is running\n* a dog &amp; a cat"
    assert text == f"{shown}\n\n{shown}"


def test_process_that_does_not_write_leaves_no_files(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, -1, steps_per_epoch=4, writing=False)
    log.write("train", 1, {"loss": 1.0})
    log.write_samples(1, [SAMPLE])
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_lines_of_a_validation_that_is_repeated_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, -1, steps_per_epoch=4)
    for step in (2, 4):
        log.write("train", step, {})
        log.write("validation", step, {})
        log.write_samples(step, [SAMPLE])
    log.close()
    MetricsLog(tmp_path, 4, steps_per_epoch=4).close()
    assert len(read(tmp_path / "metrics.jsonl")) == 4
    MetricsLog(tmp_path, 4, steps_per_epoch=4, validation_due=True).close()
    lines = [(line["step"], line["kind"]) for line in read(tmp_path / "metrics.jsonl")]
    assert lines == [(2, "train"), (2, "validation"), (4, "train")]
    assert [line["step"] for line in read(tmp_path / "samples.jsonl")] == [2]


def test_each_line_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        '{"step": 1, "kind": "train"}',
        '{"step": 2, "kind": "validation", "a": 3}',
        '{"step": 9',
        '{"step": "x"}',
        "[]",
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(metrics_file.json, "loads", lambda text: (parsed.append(text), loads(text))[1])
    log = MetricsLog(tmp_path, 2, steps_per_epoch=4)
    assert parsed == lines
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:2]
    parsed.clear()
    assert log.validation(2) == {"a": 3}
    assert parsed == lines[:2]
    assert log.validation(1) is None
    log.close()
