"""How a command ends that is stopped, runs out of memory, or cannot create its folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from imgcap_jax.cli import main as cli
from imgcap_jax.cli.main import main
from imgcap_jax.data.builders.archives import check_space
from imgcap_jax.errors import UserError

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 35491601944 bytes."),
            "not enough memory on the device (35.5 GB needed at once); ",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm"),
            "not enough memory on the device; ",
        ),
        (MemoryError("Unable to allocate 3.5 GiB"), "not enough memory; "),
    ],
)
def test_too_little_memory_is_one_line(
    error: Exception, said: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("imgcap_jax.train.train", fail)
    assert refused(["train", "scenes_demo"]) == f"imgcap: {said}use a smaller --data.batch-size"
    monkeypatch.setitem(cli._COMMANDS, "evaluate", fail)
    assert refused(["evaluate", "run"]) == f"imgcap: {said}a smaller beam, or fewer samples, helps"


@pytest.mark.parametrize(
    "message",
    [
        "UNKNOWN: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:30123",
        "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)",
    ],
)
def test_end_of_another_process_is_one_line(
    message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is that of SIGTERM, after which scripts resume a run."""

    def fail(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError(message)

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("imgcap_jax.train.train", fail)
    monkeypatch.setattr("imgcap_jax.training.parallel.join_processes", lambda where: None)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        main(["train", "scenes_demo", "--distributed", "host:1,2,0"])
    assert ended.value.code == 143
    line = f"imgcap: another process has ended, or can't be reached ({message}); the same command resumes\n"
    assert capsys.readouterr().err == line
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["train", "scenes_demo"])


def test_other_errors_of_jax_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr("imgcap_jax.train.train", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main(["train", "scenes_demo"])


def test_sigterm_ends_a_command_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("imgcap_jax.train.train", terminated)
    assert main(["train", "scenes_demo"]) == 143
    assert capsys.readouterr().err == "imgcap: interrupted; the same command resumes\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


BLOCKED = """
import hashlib, sys
from imgcap_jax.cli import interruption, main

def block(options):
    print("started", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # as a compilation, it lets no signal handler run

main._COMMANDS["features"] = block
interruption.REACTION_SECONDS = 0.5
sys.argv = ["imgcap", "features", "flickr8k"]
sys.exit(main.main())
"""


def test_sigterm_ends_a_command_that_python_cannot_interrupt() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "imgcap: interrupted; the same command resumes\n")


IGNORED = """
import gc, signal, sys, time
from imgcap_jax.cli import main

def collect(options):
    def terminate(*_):
        gc.callbacks.remove(terminate)
        signal.raise_signal(NUMBER)  # Python ignores the exception of its handler here

    gc.callbacks.append(terminate)
    gc.collect()
    time.sleep(60)

main._COMMANDS["features"] = collect
sys.argv = ["imgcap", "features", "flickr8k"]
sys.exit(main.main())
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_during_a_garbage_collection_is_not_ignored(name: str) -> None:
    code = IGNORED.replace("NUMBER", f"signal.{name}")
    ended = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)
    assert ended.returncode == 128 + getattr(signal, name)
    assert ended.stderr == "imgcap: interrupted; the same command resumes\n"


@pytest.mark.slow
def test_sigterm_before_the_first_step_leaves_no_lock(tiny_data: Path, tiny_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "imgcap_jax.cli.main", "train", str(tiny_file), "--run", str(run)],
        env={**os.environ, "TFDS_DATA_DIR": str(tiny_data), "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / ".lock").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert errors.endswith("imgcap: interrupted; the same command resumes\n")
    assert not (run / ".lock").exists()


def test_folder_that_cannot_be_created_is_one_line(tiny_file: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "README.md"
    file.write_text("mine")
    command = ["train", str(tiny_file), "--run"]
    assert "/proc/x can't be created (No such file or directory)" in refused([*command, "/proc/x"])
    for folder in (file, file / "runs" / "run"):
        assert f"{folder} can't be created ({file} is not a folder)" in refused([*command, str(folder)])
    assert "/proc/x/scenes can't be created" in refused(["data", "prepare", "scenes", "--data-dir", "/proc/x"])
    with pytest.raises(UserError, match="/proc/x can't be created"):
        check_space((Path("/proc/x"), 10, "--data-dir"))
    assert list(tmp_path.iterdir()) == [file]
