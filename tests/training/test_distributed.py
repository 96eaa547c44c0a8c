"""Two processes with one device each, compared with one process with two devices."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

STEPS = 10


def start(experiment: Path, run: Path, data: Path, devices: int, *options: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "TFDS_DATA_DIR": str(data),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "imgcap_jax.cli.main", "train", str(experiment), "--run", str(run), *options]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def pair(experiment: Path, run: Path, data: Path, *options: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        start(experiment, run, data, 1, "--distributed", f"127.0.0.1:{port},2,{index}", *options) for index in (0, 1)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs


def state(run: Path) -> dict[str, np.ndarray]:
    folder = run.absolute() / "checkpoints" / "newest" / str(STEPS) / "state"
    reader = ocp.StandardCheckpointer()
    # Restored as NumPy arrays, because the devices of the other processes do not exist here.
    template = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in reader.metadata(folder).item_metadata.items()}
    return reader.restore(folder, template)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_two_processes_equal_one_with_two_devices_and_stop_together(
    tiny_data: Path, tiny_file: Path, tmp_path: Path, mode: str
) -> None:
    options = ("--training.parallel", mode)
    finish([start(tiny_file, tmp_path / "one", tiny_data, 2, *options)])
    run = tmp_path / "two"
    processes = pair(tiny_file, run, tiny_data, *options)
    while not list((run / "checkpoints" / "newest").glob("[1-9]")):
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)  # only one receives the signal, but both stop
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, "\n".join(outputs)
    assert not (run / "checkpoints" / "newest" / str(STEPS)).exists()

    outputs = finish(pair(tiny_file, run, tiny_data, *options))
    assert "resuming" in outputs[0]
    assert "step" not in outputs[1]  # only the first process prints
    assert "done" not in outputs[1]
    expected, got = state(tmp_path / "one"), state(run)
    assert expected.keys() == got.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5, err_msg=name)
    lines = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (tmp_path / "one", run)]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_run_continues_with_another_number_of_processes(tiny_data: Path, tiny_file: Path, tmp_path: Path) -> None:
    """One process with one device, then two processes, then one process with four devices."""
    finish([start(tiny_file, tmp_path / "one", tiny_data, 1)])
    run = tmp_path / "run"
    commands = [
        lambda: [start(tiny_file, run, tiny_data, 1)],
        lambda: pair(tiny_file, run, tiny_data),
        lambda: [start(tiny_file, run, tiny_data, 4)],
    ]
    for number, begin in enumerate(commands):
        processes = begin()
        if number < 2:
            newest = run / "checkpoints" / "newest"
            while not any(int(path.name) > 3 * number for path in newest.glob("[0-9]")):
                assert processes[0].poll() is None, processes[0].communicate()
                time.sleep(0.005)
            for process in processes:
                process.send_signal(signal.SIGTERM)
            outputs = [process.communicate(timeout=240)[0] for process in processes]
            assert {process.returncode for process in processes} == {128 + signal.SIGTERM}, "\n".join(outputs)
            assert not (newest / str(STEPS)).exists()
        else:
            outputs = finish(processes)
        assert ("resuming" in outputs[0]) == (number > 0)
    expected, got = state(tmp_path / "one"), state(run)
    assert expected.keys() == got.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5, err_msg=name)
    lines = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (tmp_path / "one", run)]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_different_settings_or_folders_are_an_error_in_all_processes(
    tiny_data: Path, tiny_file: Path, tmp_path: Path
) -> None:
    port = free_port()
    same = ["--distributed", f"127.0.0.1:{port},2,"]
    processes = [
        start(tiny_file, tmp_path / "run", tiny_data, 1, same[0], f"{same[1]}{i}", "--optimizer.learning-rate", rate)
        for i, rate in enumerate(("1e-3", "2e-3"))
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "different experiments" in outputs[0]
    port = free_port()
    processes = [
        start(tiny_file, tmp_path / f"run{i}", tiny_data, 1, "--distributed", f"127.0.0.1:{port},2,{i}") for i in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "not the same folder" in outputs[0]


@pytest.mark.slow
def test_two_processes_start_from_another_run(tiny_data: Path, tiny_file: Path, tmp_path: Path) -> None:
    finish([start(tiny_file, tmp_path / "first", tiny_data, 1)])
    outputs = finish(pair(tiny_file, tmp_path / "second", tiny_data, "--init-from", str(tmp_path / "first")))
    assert "starting from" in outputs[0]


@pytest.mark.slow
def test_two_processes_draw_the_same_samples_as_one(tiny_data: Path, tiny_file: Path, tmp_path: Path) -> None:
    finish([start(tiny_file, tmp_path / "first", tiny_data, 1)])
    critical = tmp_path / "critical.py"
    critical.write_text(
        tiny_file.read_text()
        + "\nfrom dataclasses import replace\n"
        + "from imgcap_jax.training.self_critical import SelfCritical\n"
        + "experiment = replace(experiment, objective=SelfCritical(samples=3, kl=0.1))\n"
    )
    options = ("--init-from", str(tmp_path / "first"))
    finish([start(critical, tmp_path / "one", tiny_data, 2, *options)])
    outputs = finish(pair(critical, tmp_path / "two", tiny_data, *options))
    assert "self-critical" in outputs[0]
    expected, got = state(tmp_path / "one"), state(tmp_path / "two")
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-5, err_msg=name)


FULL = """
import errno, os, sys
from imgcap_jax.cli.main import main
from imgcap_jax.training import checkpoints

write = checkpoints.write_digests

def fail(folder):
    if int(folder.name) >= 3:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(folder)

checkpoints.write_digests = fail
sys.exit(main())
"""


@pytest.mark.slow
def test_error_of_the_first_process_ends_all_of_them_with_the_same_line(
    tiny_data: Path, tiny_file: Path, tmp_path: Path
) -> None:
    """Its disk is full in training, and then its checkpoints are damaged."""
    run = tmp_path / "run"

    def lines() -> list[str]:
        port = free_port()
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", FULL, "train", str(tiny_file), "--run", str(run)),
                    *("--distributed", f"127.0.0.1:{port},2,{index}"),
                ],
                env={**os.environ, "TFDS_DATA_DIR": str(tiny_data), "XLA_FLAGS": ""},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for index in (0, 1)
        ]
        errors = [process.communicate(timeout=240)[1] for process in processes]
        assert [process.returncode for process in processes] == [2, 2], "\n".join(errors)
        return [next(line for line in error.splitlines() if line.startswith("imgcap: ")) for error in errors]

    first, second = lines()
    assert first == second
    assert f"saving a checkpoint to {run / 'checkpoints'} (earlier checkpoints are intact): the disk is full" in first
    for path in (run / "checkpoints" / "newest").glob("[0-9]*/state/d/*"):
        path.write_bytes(b"x")
    first, second = lines()
    assert first == second
    assert "is damaged" in first
