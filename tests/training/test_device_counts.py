"""Twenty steps on any number of devices and processes give the parameters of one device, to rounding."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPT = Path(__file__).parent / "device_counts.py"


class Ended(NamedTuple):
    """A process that has ended, and the file of the parameters of one device."""

    expected: Path
    code: int
    output: str
    errors: str


def run(expected: Path, processes: Sequence[tuple[int, Sequence[str]]]) -> list[Ended]:
    """Runs processes at the same time, each with this number of devices and these arguments."""
    started = []
    for devices, arguments in processes:
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, str(SCRIPT), str(expected), *arguments]
        started.append(
            subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    outputs = [process.communicate(timeout=1500) for process in started]
    return [Ended(expected, one.returncode, *texts) for one, texts in zip(started, outputs, strict=True)]


def two_processes(expected: Path, *arguments: str) -> list[Ended]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run(expected, [(2, [f"127.0.0.1:{port},2,{index}", *arguments]) for index in (0, 1)])


def check(ended: Ended, combinations: Sequence[tuple[str, int]]) -> None:
    """All parameters and losses of a process equal the expected ones, and training has changed them.

    ``combinations``: the number of combinations of modes, devices and feeds of each objective.
    """
    assert ended.code == 0, ended.errors[-2000:]
    lines = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    for objective, count in combinations:
        of = [line for line in lines if line["objective"] == objective]
        assert len({(line["mode"], line["devices"], line["feed"]) for line in of}) == count, of
    for line in lines:
        assert line["moved"] > 0.1, line
        assert line["difference"] < 2e-6, line
        assert line["losses"] < 5e-6, line


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One process, which compares 1, 2, 4 and 8 devices."""
    return run(tmp_path_factory.mktemp("devices") / "expected.npz", [(8, [])])[0]


def test_one_two_four_and_eight_devices(one_process: Ended) -> None:
    check(one_process, [("cross-entropy", 5), ("self-critical", 1)])


def test_two_processes_with_two_devices_each(one_process: Ended) -> None:
    assert one_process.code == 0, one_process.errors[-2000:]
    for ended in two_processes(one_process.expected):
        check(ended, [("cross-entropy", 2), ("self-critical", 1)])


@pytest.mark.slow
def test_self_critical_steps_in_both_modes_with_both_feeds(one_process: Ended, tmp_path: Path) -> None:
    (ended,) = run(tmp_path / "expected.npz", [(8, ["self-critical"])])
    check(ended, [("self-critical", 7)])
    assert one_process.code == 0, one_process.errors[-2000:]
    for ended in two_processes(one_process.expected, "self-critical"):
        check(ended, [("self-critical", 4)])
