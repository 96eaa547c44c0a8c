"""Runs, datasets and features in buckets, with a folder in the place of gs:// (tests/buckets.py)."""

import errno
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.errors import UserError
from imgcap_jax.files import cache_folder, owning, write_digests
from imgcap_jax.remote import each, place, pull_tree, push_tree, shown, url_of
from imgcap_jax.run import mirror
from imgcap_jax.run.folder import find_run
from imgcap_jax.run.mirror import Mirror, pull, push
from imgcap_jax.training.checkpoints import Checkpoints, Progress

TESTS = Path(__file__).parent.parent
URL = "gs://bucket/runs/x"
STEPS = 10
METEOR = cache_folder("meteor")


def load_buckets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("buckets", TESTS / "buckets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the file system. Its bucket `bucket` is the folder tmp_path/gs/bucket."""
    module = load_buckets()
    (tmp_path / "gs" / "bucket").mkdir(parents=True)
    monkeypatch.setenv("FAKE_BUCKETS", str(tmp_path / "gs"))
    monkeypatch.setattr(mirror, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(fsspec, "url_to_fs", module.open_url)
    use_machine(tmp_path, monkeypatch, "a")
    return module.Buckets


def use_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From here on, working copies are those of another machine."""
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / name))


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def checkpoint(folder: Path, kind: str, step: int, text: str = "") -> None:
    write(folder, f"checkpoints/{kind}/{step}/state/data", text or f"{kind} {step}")
    write_digests(folder / "checkpoints" / kind / str(step))


def steps(folder: Path, kind: str) -> list[int]:
    return sorted(int(path.parent.name) for path in folder.glob(f"checkpoints/{kind}/*/SHA256SUMS"))


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_folder_in_a_bucket_has_a_working_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_machine(tmp_path, monkeypatch, "a")
    folder = place(URL)
    assert folder == tmp_path / "a" / "remote" / "gs" / "bucket" / "runs" / "x"
    assert place(str(Path(URL))) == folder  # gs:/bucket/runs/x
    assert url_of(folder) == shown(folder) == URL
    assert url_of(folder / "y") == f"{URL}/y"
    assert place("runs/x") == Path("runs/x")
    assert url_of(Path("runs/x")) is None
    for text, reason in {
        "http://host/x": "only local folders and gs://, s3://, az:// work",
        "gs://": "give gs://BUCKET/FOLDER",
        "gs://bucket/../x": "give gs://BUCKET/FOLDER",
        "": "empty path",
    }.items():
        with pytest.raises(UserError, match=reason):
            place(text)


def test_checkpoints_are_pushed_digests_last_and_pulled_when_complete(
    buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bucket = place(URL), tmp_path / "gs" / "bucket" / "runs" / "x"
    with owning(folder, "training"), Mirror(folder) as pushing:
        write(folder, "metrics.jsonl", "1\n")
        write(folder, "checkpoints/newest/1/state/data", "newest 1")  # without digests
        time.sleep(0.3)
        assert not (bucket / "metrics.jsonl").exists()
        checkpoint(folder, "newest", 1)
        wait_until(lambda: steps(bucket, "newest") == [1])
        write(folder, "checkpoints/newest/3.orbax-checkpoint-tmp-0/state/data", "half")
        for step in (2, 3):
            checkpoint(folder, "best", step)
            checkpoint(folder, "newest", step)
        shutil.rmtree(folder / "checkpoints" / "newest" / "1")
        wait_until(lambda: 3 in steps(bucket, "newest"))
        pushing.check()
    assert not (bucket / "checkpoints/newest/1/state/data").exists()
    assert steps(bucket, "newest") == [2, 3]
    names = [name.removeprefix("bucket/runs/x/") for name in buckets.written]
    for kind in ("newest", "best"):
        for step in steps(bucket, kind):
            unit = f"checkpoints/{kind}/{step}"
            assert names.index(f"{unit}/state/data") < names.index(f"{unit}/SHA256SUMS")
    # A checkpoint never lacks the metrics of its steps, and a resumed run has its best parameters.
    assert names.index("metrics.jsonl") < names.index("checkpoints/newest/1/SHA256SUMS")
    assert names.index("checkpoints/best/3/SHA256SUMS") < names.index("checkpoints/newest/3/SHA256SUMS")
    assert not [name for name in names if "tmp" in name or ".lock" in name]

    (bucket / "checkpoints/newest/3/SHA256SUMS").rename(bucket / "checkpoints/newest/3/unknown")  # half-pushed
    use_machine(tmp_path, monkeypatch, "b")
    other = place(URL)
    pull(other)
    assert (steps(other, "best"), steps(other, "newest")) == ([2, 3], [])  # what evaluation reads
    assert (other / "metrics.jsonl").read_text() == "1\n"
    with owning(other, "training"), Mirror(other):
        assert (steps(other, "best"), steps(other, "newest")) == ([2, 3], [2])
        assert (other / "checkpoints/newest/2/state/data").read_text() == "newest 2"
        checkpoint(other, "newest", 3, "again")
    assert (bucket / "checkpoints/newest/3/state/data").read_text() == "again"
    assert not (bucket / "checkpoints/newest/3/unknown").exists()

    use_machine(tmp_path, monkeypatch, "a")  # whose copy has another checkpoint of step 3
    pull(folder, to_train=True)
    assert (folder / "checkpoints/newest/3/state/data").read_text() == "again"


def test_copy_that_is_ahead_of_the_bucket_is_kept_and_pushed(
    buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill while a checkpoint was pushed."""
    folder, bucket = place(URL), tmp_path / "gs" / "bucket" / "runs" / "x"
    with Mirror(folder):
        checkpoint(folder, "newest", 1)
    assert steps(bucket, "newest") == [1]
    write(folder, "metrics.jsonl", "5\n")
    checkpoint(folder, "newest", 5)
    shutil.rmtree(folder / "checkpoints/newest/1")
    pull(folder)
    assert steps(folder, "newest") == [5]
    Mirror(folder)
    assert steps(bucket, "newest") == [5]
    assert (bucket / "metrics.jsonl").read_text() == "5\n"

    # A run that was never pushed is never moved.
    shutil.rmtree(bucket)
    shutil.rmtree(folder)
    checkpoint(folder, "newest", 0)
    pull(folder)
    assert steps(folder, "newest") == [0]
    use_machine(tmp_path, monkeypatch, "b")
    with Mirror(place(URL)):
        checkpoint(place(URL), "newest", 7)
    use_machine(tmp_path, monkeypatch, "a")
    with pytest.raises(UserError, match=f"has a run that is not the one in {URL}; move one of them away"):
        pull(folder)
    assert steps(folder, "newest") == [0]


def test_results_of_another_machine_stay_in_the_bucket(
    buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if training resumes from a copy that is ahead of the bucket."""
    folder, bucket = place(URL), tmp_path / "gs" / "bucket" / "runs" / "x"
    with Mirror(folder):
        checkpoint(folder, "best", 1)
        checkpoint(folder, "newest", 1)
        write(folder, "metrics.jsonl", "1\n")
    write(folder, "scores_val.json", "old")
    push(folder, ["scores_val.json"])
    checkpoint(folder, "newest", 2)  # killed before it was pushed
    write(folder, "metrics.jsonl", "2\n")

    def evaluate(name: str) -> None:
        use_machine(tmp_path, monkeypatch, "b")
        pull(place(URL))
        write(place(URL), name, "of b")
        push(place(URL), [name])
        use_machine(tmp_path, monkeypatch, "a")

    for name in ("captions_test.json", "scores_val.json"):
        evaluate(name)
    with Mirror(folder):
        evaluate("scores_test.json")
        checkpoint(folder, "newest", 3)
        wait_until(lambda: 3 in steps(bucket, "newest"))
        (folder / "captions_test.json").unlink()
    found = contents(bucket)
    assert found["metrics.jsonl"] == b"2\n"
    assert found["scores_val.json"] == found["scores_test.json"] == b"of b"
    assert "captions_test.json" not in found  # it was here, and was deleted here
    with Mirror(folder):
        checkpoint(folder, "newest", 4)
    assert contents(bucket)["scores_test.json"] == b"of b"
    assert (folder / "scores_test.json").read_text() == "of b"


def test_rest_of_a_run_whose_first_push_was_interrupted_is_deleted(buckets: Any, tmp_path: Path) -> None:
    folder, bucket = place(URL), tmp_path / "gs" / "bucket" / "runs" / "x"
    write(bucket, "init_from.json", "{}")
    write(bucket, "checkpoints/best/1/state/data", "half")
    with Mirror(folder):
        checkpoint(folder, "newest", 1)
    assert [name for name in contents(bucket) if not name.startswith("checkpoints/newest/1/")] == [".remote"]


def test_failing_disk_ends_training(buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place(URL)
    message = f"{folder}/checkpoints can't be pushed to {URL} \\(Input/output error\\); the run is in {folder}"

    def broken(checkpoint: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / "checkpoints"))

    def train() -> None:
        with Mirror(folder) as pushing:
            checkpoint(folder, "newest", 1)
            wait_until(lambda: pushing.failed)
            assert str(pushing.drain(5)).startswith(f"{folder}/checkpoints can't be pushed")

    monkeypatch.setattr(mirror, "read_digests", broken)
    with pytest.raises(UserError, match=message):
        train()
    monkeypatch.setattr(mirror, "_POLL_SECONDS", 3600)
    other = Mirror(place("gs://bucket/runs/y"))
    checkpoint(place("gs://bucket/runs/y"), "newest", 1)
    assert "Input/output error" in str(other.drain(5))


def test_upload_that_lost_its_thread_is_an_error(buckets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pushing = Mirror(place(URL))
    monkeypatch.setattr(pushing, "_finish", lambda: None)
    assert f"{URL} lacks the newest checkpoint" in str(pushing.drain(5))


def test_no_file_is_begun_after_the_time_to_push(
    buckets: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mirror, "_POLL_SECONDS", 3600)
    pushing = Mirror(place(URL))
    for number in range(50):
        write(place(URL), f"checkpoints/newest/1/state/{number}", "")
    write_digests(place(URL) / "checkpoints" / "newest" / "1")
    monkeypatch.setattr(buckets, "latency", 0.2)
    assert pushing.drain(0.3) is None
    assert "lacks the newest checkpoint" in capsys.readouterr().err
    wait_until(lambda: pushing.failed)
    assert len(buckets.written) < 20
    assert not any(name.endswith("SHA256SUMS") for name in buckets.written)


def test_transfers_do_not_keep_the_process_alive() -> None:
    daemons: list[bool] = []
    each(lambda name: daemons.append(threading.current_thread().daemon), [str(number) for number in range(20)])
    assert daemons == [True] * 20
    with pytest.raises(ZeroDivisionError):
        each(lambda name: print(1 / int(name)), ["2", "0", "1"])


def test_run_that_the_bucket_has_lost_stays_on_this_machine(
    buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, bucket = place(URL), tmp_path / "gs" / "bucket" / "runs" / "x"
    with Mirror(folder):
        checkpoint(folder, "newest", 1)
    shutil.rmtree(bucket)
    before = contents(folder)
    with pytest.raises(UserError, match=f"{URL} has lost its run; to use what this machine has of it, copy {folder}"):
        pull(folder)
    assert contents(folder) == before
    with owning(folder, "training"), Mirror(folder):  # starts again
        assert not steps(folder, "newest")
        aside = folder.parent / "x.old1"
        assert contents(aside) == before
        checkpoint(folder, "newest", 2)
    note = f"imgcap: note: {URL} no longer has the run that this machine has a copy of; the copy is kept in {aside}\n"
    assert capsys.readouterr().err == note

    shutil.rmtree(bucket)
    use_machine(tmp_path, monkeypatch, "b")
    with Mirror(place(URL)):
        checkpoint(place(URL), "newest", 7)
        checkpoint(place(URL), "best", 7)
    use_machine(tmp_path, monkeypatch, "a")
    pull(folder)  # to evaluate what is in the bucket
    assert (steps(folder, "best"), steps(folder.parent / "x.old2", "newest")) == ([7], [2])


def test_damaged_copy_of_a_checkpoint_is_replaced_and_never_pushed(
    buckets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, bucket = place(URL), tmp_path / "gs" / "bucket" / "runs" / "x"
    with Mirror(folder):
        checkpoint(folder, "best", 1)
        checkpoint(folder, "newest", 1)
    write(folder, "checkpoints/best/1/state/data", "damaged")
    pull(folder)
    assert (folder / "checkpoints/best/1/state/data").read_text() == "best 1"

    # Also of a run that is ahead. What only this machine has is left to training.
    checkpoint(folder, "newest", 2)
    for name in ("newest/1", "best/1", "newest/2"):
        write(folder, f"checkpoints/{name}/state/data", "damaged")
    with Mirror(folder):
        assert (folder / "checkpoints/newest/1/state/data").read_text() == "newest 1"
        assert (folder / "checkpoints/best/1/state/data").read_text() == "best 1"
        assert (folder / "checkpoints/newest/2/state/data").read_text() == "damaged"
        said: list[str] = []
        checkpoints = Checkpoints(folder, writing=True)
        monkey = pytest.MonkeyPatch()
        monkey.setattr(checkpoints, "_progress", lambda step: Progress(step, {}, best_step=1))
        assert checkpoints.recover(said.append) == 1
        monkey.undo()
    assert said[0].startswith(f"note: the checkpoint {URL}/checkpoints/newest/2 is damaged")
    assert steps(bucket, "newest") == [1]
    assert not [name for name in contents(bucket) if "damaged" in name or "newest/2/" in name]
    with Mirror(folder):
        checkpoint(folder, "newest", 2)
    assert (bucket / "checkpoints/newest/2/state/data").read_text() == "newest 2"


def test_messages_name_the_bucket(buckets: Any, tmp_path: Path) -> None:
    folder = place(URL)
    for step in (1, 2):
        checkpoint(folder, "best", step)
    write(folder, "checkpoints/best/2/state/data", "damaged")
    with pytest.raises(UserError) as refused:
        Checkpoints(folder).restore_best({})
    assert str(refused.value) == (
        f"the checkpoint {URL}/checkpoints/best/2 is damaged (state/data has changed); {URL}/checkpoints/best/1 is "
        f"intact: delete it in the bucket and in {folder}/checkpoints/best to continue from that one"
    )
    write(folder, "experiment.json", "{}")
    with pytest.raises(UserError, match=f"{URL} has checkpoints but no vocabulary.json"):
        find_run(folder)


def test_file_that_vanishes_while_it_is_read(buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no error of this machine's disk."""
    bucket = tmp_path / "gs" / "bucket"
    monkeypatch.setattr(buckets, "vanishing", {"data", "records"})
    checkpoint(bucket / "runs" / "x", "best", 1)
    write(bucket / "runs" / "x", "checkpoints/newest/1/SHA256SUMS", "# 0 files\n")
    with pytest.raises(UserError, match=f"{URL} changes while it is read; try again"):
        pull(place(URL))
    write(bucket, "data/records", "x")
    write(bucket, "data/info.json", "x")
    with pytest.raises(UserError, match="gs://bucket/data changes while it is read; try again"):
        pull_tree(place("gs://bucket/data"), "info.json")


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder that are parts of a run."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


ENDED = """
import sys; sys.path.insert(0, sys.argv[1])
import buckets; buckets.install()
import hashlib, pathlib
from imgcap_jax.files import write_digests
from imgcap_jax.remote import place
from imgcap_jax.run import mirror
from imgcap_jax.training import signals

mirror._POLL_SECONDS = 3600.0
signals.PATIENCE_SECONDS = 0.2
signals._GRACE_SECONDS = float(sys.argv[2])
folder = place("gs://bucket/runs/x")
with mirror.Mirror(folder) as pushing, signals.StopRequest(print, drain=pushing.drain) as stop, stop.repeatable():
    newest = folder / "checkpoints" / "newest" / "1"
    newest.mkdir(parents=True)
    (newest / "data").write_text("state")
    write_digests(newest)
    print("started", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # as a compilation, no signal interrupts it
"""


@pytest.mark.parametrize("latency", [0.0, 3.0])
def test_signal_ends_what_can_be_repeated_after_the_bucket_has_everything(
    latency: float, buckets: Any, tmp_path: Path
) -> None:
    """If there is no time for that, it is said."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED, str(TESTS), "3.0" if latency else "20"],
        env={**os.environ, "FAKE_BUCKETS_LATENCY": str(latency)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.terminate()
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert output.endswith("stopped; the same command resumes\n")
    has_it = steps(tmp_path / "gs/bucket/runs/x", "newest") == [1]
    lacks = f"note: {URL} lacks the newest checkpoint; it is in {place(URL)}, and this machine uploads it when training"
    assert (has_it, lacks in errors) == ((False, True) if latency else (True, False)), errors
    assert steps(place(URL), "newest") == [1]


def test_error_of_the_program_does_not_keep_what_is_on_disk_from_the_bucket(buckets: Any, tmp_path: Path) -> None:
    """As the end of another process."""

    def fail(error: type[BaseException]) -> None:
        with Mirror(place(URL)):
            checkpoint(place(URL), "newest", 1 if error is RuntimeError else 2)
            raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
        assert steps(tmp_path / "gs/bucket/runs/x", "newest") == [1]


def test_checkpoint_that_is_validated_later_stays_complete(buckets: Any, tmp_path: Path) -> None:
    folder, bucket = place(URL), tmp_path / "gs" / "bucket" / "runs" / "x"
    with Mirror(folder):
        checkpoint(folder, "newest", 1)
        wait_until(lambda: steps(bucket, "newest") == [1])
        write(folder, "checkpoints/newest/1/validated.json", "{}")
        write_digests(folder / "checkpoints/newest/1")
    assert "validated.json" in (bucket / "checkpoints/newest/1/SHA256SUMS").read_text()
    assert (bucket / "checkpoints/newest/1/validated.json").exists()
    assert not [name for name in buckets.removed if name.endswith("SHA256SUMS")]
    with Mirror(folder):
        checkpoint(folder, "newest", 1, "another state")
    assert [name for name in buckets.removed if name.endswith("SHA256SUMS")]
    assert (bucket / "checkpoints/newest/1/state/data").read_text() == "another state"
    # A copy that was killed before the result of its validation was pushed is ahead.
    write(folder, "checkpoints/newest/1/more.json", "{}")
    write_digests(folder / "checkpoints/newest/1")
    pull(folder, to_train=True)
    assert (folder / "checkpoints/newest/1/more.json").exists()


def test_run_that_is_trained_here_is_not_pulled(buckets: Any, tmp_path: Path) -> None:
    folder = place(URL)
    with owning(folder, "training"), Mirror(folder):
        checkpoint(folder, "newest", 1)
        write(folder, "metrics.jsonl", "old\n")
    with owning(folder, "training"):
        write(folder, "metrics.jsonl", "new\n")
        pull(folder)
        assert (folder / "metrics.jsonl").read_text() == "new\n"


def test_failing_bucket_ends_training_and_the_copy_stays(buckets: Any, tmp_path: Path) -> None:
    folder = place(URL)
    buckets.failures = 2  # fewer than the attempts
    with pytest.raises(UserError, match=r"\.remote can't be written \(no route to host\); check the name, the network"):
        Mirror(folder)
    buckets.failures = 0
    with Mirror(folder) as pushing:
        buckets.failures = 2
        checkpoint(folder, "newest", 1)
        wait_until(lambda: steps(tmp_path / "gs/bucket/runs/x", "newest") == [1])
        pushing.check()

    def fail() -> None:
        with Mirror(folder) as pushing:
            buckets.failures = 1000
            checkpoint(folder, "newest", 2)
            wait_until(lambda: pushing.failed)
            pushing.check()

    with pytest.raises(UserError, match=f"the run is in {folder}, and the same command on this machine resumes"):
        fail()
    buckets.failures = 0
    assert steps(folder, "newest") == [1, 2]
    Mirror(folder)
    assert steps(tmp_path / "gs/bucket/runs/x", "newest") == [1, 2]
    with pytest.raises(UserError, match=r"can't be written \(the bucket does not exist\)"):
        Mirror(place("gs://nowhere/x"))


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    use_machine(tmp_path, monkeypatch, "a")
    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://bucket/x can't be opened without s3fs; run: pip install s3fs"):
        pull(place("s3://bucket/x"))


def test_results_are_pushed_and_old_ones_deleted(buckets: Any, tmp_path: Path) -> None:
    folder, bucket = place(URL), tmp_path / "gs/bucket/runs/x"
    write(bucket, "n_best_val.json", "old")
    write(folder, "scores_val.json", "new")
    push(folder, ["scores_val.json", "n_best_val.json"])
    assert sorted(path.name for path in bucket.iterdir()) == ["scores_val.json"]
    push(tmp_path, ["scores_val.json"])  # no bucket


def test_folder_of_files_that_never_change(buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place("gs://bucket/data/scenes")
    write(folder, "1.0.0/records", "many")
    write(folder, "1.0.0/info.json", "{}")
    push_tree(folder / "1.0.0", "info.json")
    assert [Path(name).name for name in buckets.written] == ["records", "info.json"]
    push_tree(folder / "1.0.0", "info.json")
    assert len(buckets.written) == 2
    use_machine(tmp_path, monkeypatch, "b")
    other = place("gs://bucket/data/scenes")
    write(other, "1.0.0/records", "ma")  # an interrupted copy
    pull_tree(other, "info.json")
    assert (other / "1.0.0/records").read_text() == "many"
    use_machine(tmp_path, monkeypatch, "a")
    for name, text in {"records": "new!", "lock": "", "blocks/1.done": ""}.items():  # of the same size
        write(folder, f"1.0.0/{name}", text)
    write(folder, "1.0.0/info.json", "[]")
    push_tree(folder / "1.0.0", "info.json", ("lock", "blocks"))
    assert contents(tmp_path / "gs/bucket/data/scenes/1.0.0") == {"records": b"new!", "info.json": b"[]"}
    assert buckets.removed == ["bucket/data/scenes/1.0.0/info.json"]  # nobody reads a mixture
    write(folder, "1.0.0/info.json", "{}")
    write(folder, "1.0.0/records", "0000")  # of an unfinished feature store
    pull_tree(folder, "info.json")
    assert (folder / "1.0.0/records").read_text() == "new!"
    (tmp_path / "gs/bucket/data/scenes/1.0.0/info.json").unlink()
    use_machine(tmp_path, monkeypatch, "c")
    pull_tree(place("gs://bucket/data/scenes"), "info.json")
    assert not place("gs://bucket/data/scenes").exists()  # it is not complete


def test_interrupted_copy_of_a_dataset_continues(buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with digests that are already here are not read again."""
    bucket, folder = tmp_path / "gs/bucket/data", place("gs://bucket/data")
    for name in ("1.0.0/a", "1.0.0/b", "1.0.0/info.json"):
        write(bucket, name, name)
    write_digests(bucket / "1.0.0", ["a", "b"])
    write(folder, "1.0.0/a", "1.0.0/a")
    write(folder, "1.0.0/b", "damaged")
    read: list[str] = []
    get = buckets.get_file
    monkeypatch.setattr(buckets, "get_file", lambda self, name, path: (read.append(name), get(self, name, path)))
    pull_tree(folder, "info.json")
    assert contents(folder) == contents(bucket)
    assert [name.removeprefix("bucket/data/1.0.0/") for name in read] == ["SHA256SUMS", "b", "info.json"]


def test_features_in_a_bucket_are_computed_once(
    buckets: Any, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imgcap_jax.data.features import FeatureStore
    from imgcap_jax.data.regions import ReadyRegions, RegionFiles
    from imgcap_jax.data.sources import open_source

    source = open_source("scenes", "val", tiny_data)
    for place_, image_id in enumerate(source.image_ids()):
        (tmp_path / "files").mkdir(exist_ok=True)
        np.save(tmp_path / "files" / f"{image_id}.npy", np.full((1, 2), place_, np.float32))
    regions = ReadyRegions(RegionFiles(tmp_path / "files", region_size=2, max_regions=3), source)
    FeatureStore.of_regions(regions, root=place("gs://bucket/cache"), progress=False)
    assert Path(buckets.written[-1]).name == "manifest.json"
    assert not [name for name in buckets.written if name.endswith("/lock") or "/blocks/" in name]
    use_machine(tmp_path, monkeypatch, "b")
    monkeypatch.setattr(ReadyRegions, "read", lambda *_: pytest.fail("computed again"))
    store = FeatureStore.of_regions(regions, root=place("gs://bucket/cache"), progress=False)
    assert [store.read(i, 0)[0][0, 0] for i in range(8)] == list(range(8))


def test_names_that_lead_out_of_the_copy_are_not_read(
    buckets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hostile(buckets):  # type: ignore[misc]
        """A bucket with a file ../../x."""

        def find(self, path: str, *_: Any, **__: Any) -> dict[str, dict[str, Any]]:
            root = self._strip_protocol(path)
            return {f"{root}/{name}": {"size": 1, "type": "file"} for name in ("../../evil", "a//b", "info.json")}

        def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
            return b"x"

        def get_file(self, rpath: str, lpath: str, *_: Any, **__: Any) -> None:
            Path(lpath).write_text("x")

    monkeypatch.setattr(fsspec, "url_to_fs", lambda url: (Hostile(), Hostile._strip_protocol(url)))
    pull_tree(place("gs://bucket/data"), "info.json")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pull"] == ["info.json"]


def test_run_that_was_copied_into_a_bucket_is_loaded(
    buckets: Any, trained: Path, tiny_data: Path, tmp_path: Path
) -> None:
    from imgcap_jax.captioner import Captioner
    from imgcap_jax.data.sources import open_source
    from imgcap_jax.run.folder import Run

    bucket = tmp_path / "gs" / "bucket"
    shutil.copytree(trained, bucket / "runs" / "x")
    shutil.copytree(tiny_data / "scenes", bucket / "data" / "scenes")
    assert Captioner.load(URL).runs[0].folder == place(URL)
    assert Run.load(Path(URL)).experiment == Run.load(trained).experiment
    assert steps(place(URL), "best") == steps(trained, "best")
    assert not steps(place(URL), "newest")
    assert open_source("scenes", "test", Path("gs://bucket/data"))[0].captions
    with pytest.raises(UserError, match="gs://bucket/runs/y does not exist"):
        Run.load(Path("gs://bucket/runs/y"))


@pytest.mark.slow
def test_training_and_evaluating_in_a_bucket(
    buckets: Any,
    tiny_data: Path,
    tiny_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = tmp_path / "gs" / "bucket"
    shutil.copytree(tiny_data / "scenes", bucket / "data" / "scenes")
    experiment = [str(tiny_file), "--data.data-dir", "gs://bucket/data"]
    assert main(["train", *experiment, "--run", URL]) == 0
    out = capsys.readouterr().out
    assert f"done: {URL}, best" in out
    assert f"next: imgcap evaluate {URL} --split val" in out
    assert not list(cache_folder("remote").rglob(".cache"))
    assert steps(bucket / "runs/x", "best")
    assert json.loads((bucket / "runs/x/experiment.json").read_text())

    use_machine(tmp_path, monkeypatch, "b")
    assert main(["evaluate", URL, "--split", "test"]) == 0
    assert "scores_test.json" in [path.name for path in (bucket / "runs/x").iterdir()]
    assert not (place(URL) / "checkpoints" / "newest").exists()


def start(
    arguments: list[str], machine: Path, data: Path, devices: int = 4, kill_after: int = -1
) -> subprocess.Popen[str]:
    """``imgcap`` in another process, with the working copies of a machine."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import buckets; buckets.install();"
        "from imgcap_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    machine.mkdir(exist_ok=True)
    if METEOR.is_dir() and not (machine / "meteor").exists():
        (machine / "meteor").symlink_to(METEOR)  # compiling its tables takes seconds
    environment = {
        **os.environ,
        "IMGCAP_CACHE": str(machine),
        "TFDS_DATA_DIR": str(data),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "FAKE_BUCKETS_KILL": str(kill_after),
    }
    command = [sys.executable, "-c", code, str(TESTS), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    outputs = [process.communicate(timeout=480)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs


def state(run: Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    folder = run.absolute() / "checkpoints" / "newest" / str(STEPS) / "state"
    reader = ocp.StandardCheckpointer()
    template = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in reader.metadata(folder).item_metadata.items()}
    return reader.restore(folder, template)


@pytest.mark.slow
@pytest.mark.parametrize("kill_after", [7, 20, 30])
def test_run_that_is_killed_while_it_pushes_resumes_on_this_and_on_another_machine(
    buckets: Any, trained: Path, tiny_data: Path, tiny_file: Path, tmp_path: Path, kill_after: int
) -> None:
    bucket = tmp_path / "gs/bucket/runs/x"
    command = ["train", str(tiny_file), "--run", URL]
    killed = start(command, tmp_path / "a", tiny_data, kill_after=kill_after)
    output = killed.communicate(timeout=480)[0]
    assert killed.returncode == -9, output
    shutil.copytree(tmp_path / "gs", tmp_path / "copy")
    for machine in ("a", "b"):
        if machine == "b":
            shutil.rmtree(tmp_path / "gs")
            shutil.move(tmp_path / "copy", tmp_path / "gs")
        finish(start(command, tmp_path / machine, tiny_data))
        expected, got = state(trained), state(bucket)
        assert expected.keys() == got.keys()
        for name, leaf in expected.items():
            np.testing.assert_array_equal(got[name], leaf, err_msg=name)
        assert metrics(bucket) == metrics(trained)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    times = ("seconds", "captions_per_second", "images_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


@pytest.mark.slow
def test_two_hosts_without_a_common_disk_train_in_a_bucket(
    buckets: Any, trained: Path, tiny_data: Path, tiny_file: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def pair() -> list[subprocess.Popen[str]]:
        return [
            start(
                ["train", str(tiny_file), "--run", URL, "--distributed", f"127.0.0.1:{port},2,{index}"],
                tmp_path / f"host{index}",
                tiny_data,
                devices=2,
            )
            for index in (0, 1)
        ]

    processes = pair()
    bucket = tmp_path / "gs/bucket/runs/x"
    while not [step for step in steps(bucket, "newest") if step > 1]:
        assert all(process.poll() is None for process in processes), [one.communicate() for one in processes]
        time.sleep(0.05)
    processes[0].terminate()
    outputs = [process.communicate(timeout=480)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    shutil.rmtree(tmp_path / "host0")  # a new machine
    outputs = finish(*pair())
    assert f"resuming {URL}" in outputs[0]
    expected, got = state(trained), state(bucket)
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5, err_msg=name)

    finish(start(["evaluate", URL, "--split", "test"], tmp_path / "alone", tiny_data))
    alone = json.loads((bucket / "scores_test.json").read_text())
    outputs = finish(
        *[
            start(
                ["evaluate", URL, "--split", "test", "--distributed", f"127.0.0.1:{port},2,{index}"],
                tmp_path / f"host{index}",
                tiny_data,
                devices=2,
            )
            for index in (0, 1)
        ]
    )
    assert json.loads((bucket / "scores_test.json").read_text())["scores"] == alone["scores"]
    assert "BLEU-4" in outputs[0]
    assert "BLEU-4" not in outputs[1]
