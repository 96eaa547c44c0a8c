"""A small version of scripts/kill_test.py."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_test.py"


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_runs_that_are_killed_end_as_one_that_is_not(tmp_path: Path, processes: str) -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--kills-per-run", "3", "--epochs", "4"]
    command += ["--processes", processes, "--folder", str(tmp_path)]
    ended = subprocess.run(command, text=True, capture_output=True, timeout=1200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 kills in " in ended.stdout
    assert ended.stdout.endswith("0 failures\n")
