"""A killed and resumed run ends with the same result as an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

STEPS = 10


class Command:
    """Runs `imgcap train` on the tiny experiment in processes that a test can kill."""

    def __init__(self, experiment: Path, data: Path, folder: Path) -> None:
        self.run = folder / "run"
        self._words = [
            *(sys.executable, "-m", "imgcap_jax.cli.main", "train", str(experiment), "--run", str(self.run)),
            *("--cache", str(folder / "cache")),
        ]
        self._environment = {**os.environ, "TFDS_DATA_DIR": str(data), "XLA_FLAGS": ""}

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._words, env=self._environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def checkpointed(self) -> int:
        steps = [int(path.name) for path in (self.run / "checkpoints" / "newest").glob("*") if path.name.isdigit()]
        return max(steps, default=0)

    def finish(self) -> str:
        process = self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def state(self) -> dict[str, np.ndarray]:
        folder = self.run / "checkpoints" / "newest" / str(STEPS) / "state"
        return ocp.StandardCheckpointer().restore(folder)

    def lines(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl without the times."""
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        times = ("seconds", "captions_per_second", "images_per_second")
        return [{name: value for name, value in line.items() if name not in times} for line in lines]

    def seconds(self) -> list[float]:
        """The seconds of training at each step."""
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [line["seconds"] for line in lines]

    def samples(self) -> bytes:
        return (self.run / "samples.jsonl").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tiny_data: Path, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    command = Command(tiny_file, tiny_data, tmp_path_factory.mktemp("uninterrupted"))
    command.finish()
    return command


def test_run_killed_three_times_ends_bit_identical(
    uninterrupted: Command, tiny_data: Path, tiny_file: Path, tmp_path: Path
) -> None:
    command = Command(tiny_file, tiny_data, tmp_path)
    chance = random.Random()  # not seeded: each run of the tests kills at other moments
    for earliest in (1, 4, 7):
        process = command.start()
        while command.checkpointed() < earliest and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was killed before it finished
    output = command.finish()
    assert "resuming" in output
    expected, got = uninterrupted.state(), command.state()
    assert expected.keys() == got.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    assert command.lines() == uninterrupted.lines()  # no line is missing or repeated
    assert command.samples() == uninterrupted.samples()
    assert command.seconds() == sorted(command.seconds())  # the time continues


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(
    uninterrupted: Command, tiny_data: Path, tiny_file: Path, tmp_path: Path
) -> None:
    command = Command(tiny_file, tiny_data, tmp_path)
    process = command.start()
    while command.checkpointed() < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command resumes" in output
    stopped = command.checkpointed()
    assert 2 <= stopped < STEPS
    assert f"resuming {command.run} at step {stopped} of {STEPS}" in command.finish()
    for name, leaf in uninterrupted.state().items():
        np.testing.assert_array_equal(command.state()[name], leaf, err_msg=name)


def test_training_a_finished_run_changes_nothing(uninterrupted: Command) -> None:
    before = (uninterrupted.run / "metrics.jsonl").read_bytes()
    uninterrupted.finish()
    assert (uninterrupted.run / "metrics.jsonl").read_bytes() == before
