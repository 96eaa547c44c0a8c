"""Twenty steps on any number of devices and processes give the parameters of one device, to rounding."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "device_counts.py"


def start(devices: int, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def check(process: subprocess.Popen[str], combinations: int) -> None:
    """All parameters and losses of a process equal the expected ones, and training has changed them."""
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-2000:]
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == combinations
    for line in lines:
        assert line["moved"] > 0.1, line
        assert line["difference"] < 2e-6, line
        assert line["losses"] < 5e-6, line


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parameters of one device, written after those of 2, 4 and 8 devices were compared with them."""
    path = tmp_path_factory.mktemp("devices") / "expected.npz"
    check(start(8, str(path)), 6)
    return path


def test_one_two_four_and_eight_devices(expected: Path) -> None:
    assert expected.is_file()


def test_two_processes_with_two_devices_each(expected: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(2, str(expected), f"127.0.0.1:{port},2,{index}") for index in (0, 1)]
    for process in processes:
        check(process, 3)
