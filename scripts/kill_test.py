"""Kills training at random moments, resumes it, and compares the result with a run that nothing interrupts.

    python scripts/kill_test.py                       50 kills
    python scripts/kill_test.py --kills 5 --seed 3    five, at moments drawn from this seed
    python scripts/kill_test.py --processes 2         two processes train each run, and one of them is killed

A tiny model is trained on drawn scenes, with a checkpoint after each step. Each kill waits for a phase: the start of
the process, a step, a checkpoint that is being written, or a validation. It then waits a random time, and sends SIGKILL
or SIGTERM. By default every third run is trained by two processes. The phase that a kill has met is read from the run's
folder afterwards, because a process can be faster than this script.

After at most --kills-per-run kills, a run ends. Its last state, its best parameters, its metrics (except times) and its
samples must then equal those of an uninterrupted run bit for bit. The exit code is 1 if one does not, if a run cannot
be resumed, if SIGTERM loses a step, or if the process that receives it takes more than 30 seconds to end. The other
process receives no signal. If training has begun, it must end by itself.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

EXPERIMENT = """
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.encoders.small_cnn import SmallCNN

experiment = Experiment(
    data=CaptionData(dataset="scenes", image_size=32, batch_size=8, captions_per_image=3, min_count=1),
    encoder=SmallCNN(widths=(8, 8), blocks=(0, 0)),
    decoder=ShowAttendTell(hidden_size=8, embedding_size=8, attention_size=4, region_size=None, dropout=0.3),
    training=Training(epochs=EPOCHS, ema_decay=0.9, checkpoint_minutes=0.0, log_steps=1),
    decoding=Decoding(beam=2),
)
"""
TIMES = ("seconds", "captions_per_second", "images_per_second")  # in metrics, and different in each run
PHASES = ("start", "step", "checkpoint", "validation")
GRACE_SECONDS = 30.0  # of Google Cloud, after SIGTERM
START_SECONDS = 12.0  # the longest random wait in the phase "start"
LIMIT_SECONDS = 600.0  # for a process to end or to reach a phase
OTHER_SECONDS = 20.0  # for the other process to end by itself
FOUND = ("start", "step", "checkpoint", "validation")


@dataclass
class Kill:
    """One kill. phase: what it has met. lost: steps that it had done and are repeated. seconds: until it ended."""

    signal: str
    processes: int
    phase: str
    lost: int
    seconds: float


@dataclass
class Test:
    """The runs of one test, in a folder, and what went wrong."""

    folder: Path
    chance: random.Random
    kills: list[Kill] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def fail(self, line: str) -> None:
        self.failures.append(line)
        print(f"FAILED: {line}", flush=True)

    def start(self, run: Path, processes: int) -> list[subprocess.Popen[bytes]]:
        """The processes that train a run. Their output is appended to ``<run>.<index>.log``."""
        words = [sys.executable, "-m", "imgcap_jax.cli.main", "train", str(self.folder / "tiny.py"), "--run", str(run)]
        environment = {
            **os.environ,
            "TFDS_DATA_DIR": str(self.folder / "data"),
            "IMGCAP_CACHE": str(self.folder / "cache"),
            "XLA_FLAGS": "",
            "JAX_PLATFORMS": "cpu",
        }
        started = []
        place = f"127.0.0.1:{_free_port()},{processes}"
        for index in range(processes):
            distributed = ["--distributed", f"{place},{index}"] if processes > 1 else []
            with _log(run, index).open("ab") as log:
                started.append(
                    subprocess.Popen([*words, *distributed], env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        return started

    def finish(self, run: Path, processes: int) -> bool:
        """Trains a run to its end; returns whether that worked."""
        ended = [_wait(process, LIMIT_SECONDS) for process in self.start(run, processes)]
        if any(ended):
            self.fail(f"{run.name} ended with exit codes {ended}: {_log(run, 0)}")
        return not any(ended)

    def kill(self, run: Path, processes: int) -> bool:
        """Trains a run and kills it. False: it was finished before."""
        number = self.chance.choice((signal.SIGKILL, signal.SIGTERM))
        wanted = self.chance.choice(PHASES)
        victim = self.chance.randrange(processes)
        delay = self.chance.uniform(0.0, START_SECONDS if wanted == "start" else 0.2)
        more = self.chance.randrange(1, 8)  # steps before the phase
        before, logged = _newest(run), [log.stat().st_size if log.exists() else 0 for log in _logs(run, processes)]

        def said(index: int = 0) -> str:
            return _log(run, index).read_bytes()[logged[index] :].decode(errors="replace")

        def began() -> bool:  # the metrics of a killed run stay until then
            return any(begin in said() for begin in ("resuming", " training images"))

        all_processes = self.start(run, processes)
        running = all_processes[victim]
        if wanted != "start":
            step = (before or 0) + more
            reached = {"step": lambda: _last_step(run) >= step, "checkpoint": lambda: _writing(run, step)}
            _poll(began, running)
            _poll(reached.get(wanted, lambda: _validating(run, step)), running)
        _poll(lambda: False, running, delay)
        if running.poll() is not None:
            self._check_end([_wait(process, LIMIT_SECONDS) for process in all_processes], run)
            return False
        steps = _last_step(run)
        start = time.monotonic()
        running.send_signal(number)
        code = _wait(running, LIMIT_SECONDS)
        seconds = time.monotonic() - start
        for other in all_processes:
            if other is not running and _wait(other, OTHER_SECONDS) is None:
                if began():  # before, it waits minutes for the killed one to join
                    self.fail(f"{run.name}: the other process does not end: {_log(run, all_processes.index(other))}")
                other.kill()
                other.wait()
        kind = signal.Signals(number).name
        if code == 0:
            self._check_end([process.returncode for process in all_processes], run)
            return False
        phase = _phase(run) if began() else FOUND[0]
        resumes = _newest(run) if (_intact(run) is None) else _intact(run)
        lost = max(0, max(steps, _last_step(run)) - (resumes or 0)) if began() else 0
        self.kills.append(Kill(kind, processes, phase, lost, seconds))
        print(
            f"{len(self.kills):3}  {run.name}  {kind}, waited for {wanted}, met {phase}: ended after {seconds:.1f} s "
            f"at step {max(steps, 0)}, resumes at {resumes or 0}",
            flush=True,
        )
        if number == signal.SIGTERM:
            # Before Python runs the program, SIGTERM has its default action.
            if code != 128 + signal.SIGTERM and (began() or code != -signal.SIGTERM):
                self.fail(f"{run.name}: exit code {code} after SIGTERM: {_log(run, victim)}")
            if seconds > GRACE_SECONDS:
                self.fail(f"{run.name}: SIGTERM took {seconds:.1f} s")
            if lost:
                self.fail(f"{run.name}: SIGTERM lost {lost} steps")
        if any("Traceback" in said(index) for index in range(processes)):
            self.fail(f"{run.name}: a traceback in one of {[str(log) for log in _logs(run, processes)]}")
        return True

    def _check_end(self, codes: list[int | None], run: Path) -> None:
        if any(codes):
            self.fail(f"{run.name} ended by itself with exit codes {codes}: {_log(run, 0)}")

    def compare(self, run: Path, reference: Path) -> None:
        """Compares a finished run with one that was not interrupted."""
        for kind, item in (("newest", "state"), ("best", "default")):
            steps = [_steps(folder / "checkpoints" / kind)[-1:] for folder in (run, reference)]
            if steps[0] != steps[1] or not steps[0]:
                self.fail(f"{run.name}: {kind} is of step {steps[0]}, not {steps[1]}")
                continue
            ours, theirs = (
                _arrays(folder / "checkpoints" / kind / str(steps[0][0]) / item) for folder in (run, reference)
            )
            if ours.keys() != theirs.keys():
                self.fail(f"{run.name}: {kind} has other arrays")
            elif different := [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]:
                self.fail(f"{run.name}: {len(different)} arrays of {kind} differ, first {different[0]}")
        if _metrics(run) != _metrics(reference):
            self.fail(f"{run.name}: the lines of metrics.jsonl differ")
        if (run / "samples.jsonl").read_bytes() != (reference / "samples.jsonl").read_bytes():
            self.fail(f"{run.name}: samples.jsonl differs")

    def table(self) -> str:
        """Kills by signal and phase."""
        lines = [f"{'signal':8}  {'processes':9}  {'met':28}  kills  steps lost: mean, most  longest end"]
        for name in ("SIGKILL", "SIGTERM"):
            for processes in (1, 2):
                for phase in FOUND:
                    of = [k for k in self.kills if (k.signal, k.processes, k.phase) == (name, processes, phase)]
                    if of:
                        lost = [kill.lost for kill in of]
                        lines.append(
                            f"{name:8}  {processes:9}  {phase:28}  {len(of):5}  {np.mean(lost):16.1f}, {max(lost):4}  "
                            f"{max(kill.seconds for kill in of):9.1f} s"
                        )
        return "\n".join(lines)


def main() -> None:
    """Parses the command line and runs the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--kills-per-run", type=int, default=10, help="after these, a run is finished and compared")
    parser.add_argument("--epochs", type=int, default=10, help="of five steps and a validation")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="of all runs (default: 1, of every third run 2)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 20), help="of the moments (default: random)")
    parser.add_argument("--folder", type=Path, help="keeps all files in this folder (default: a temporary one)")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="imgcap_kills_") as temporary:
        test = kill_often(options, (options.folder or Path(temporary)).absolute())
        if test.failures and options.folder is None:
            print("repeat it with --seed and --folder to keep the files")
    sys.exit(bool(test.failures))


def kill_often(options: argparse.Namespace, folder: Path) -> Test:
    """Runs the test in a folder, and prints its report."""
    from imgcap_jax.data.prepare import prepare
    from imgcap_jax.data.scenes.builder import SceneSplits

    jax.config.update("jax_platforms", "cpu")  # as in the processes that train
    folder.mkdir(parents=True, exist_ok=True)
    test = Test(folder, random.Random(options.seed))
    splits = SceneSplits(train=40, val=8, test=8, test_compositional=8, image_size=32)
    prepare("scenes", data_dir=folder / "data", scenes=splits, progress=False)
    (folder / "tiny.py").write_text(EXPERIMENT.replace("EPOCHS", f"{options.epochs}.0"))
    references: dict[int, Path] = {}
    runs = 0
    while len(test.kills) < options.kills:
        processes = options.processes or (2 if runs % 3 == 2 else 1)
        if processes not in references:
            references[processes] = folder / f"uninterrupted_{processes}"
            print(f"training {references[processes].name}", flush=True)
            if not test.finish(references[processes], processes):
                return test
        run = folder / f"run_{runs}"
        runs += 1
        first = len(test.kills)
        going = True
        while going and len(test.kills) < min(first + options.kills_per_run, options.kills):
            going = test.kill(run, processes)
        if test.finish(run, processes):
            test.compare(run, references[processes])
            done = sum("resuming" in line for line in _log(run, 0).read_text(errors="replace").splitlines())
            print(f"     {run.name}  finished after {len(test.kills) - first} kills; resumed {done} times", flush=True)
    print(f"\n{test.table()}\n")
    notes = sum(
        len(re.findall(r"note: the checkpoint .* is damaged", log.read_text(errors="replace")))
        for log in folder.glob("run_*.log")
    )
    print(
        f"{len(test.kills)} kills in {runs} runs; {notes} times the newest checkpoint was incomplete and the one "
        f"before it was used; {len(test.failures)} failures"
    )
    return test


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _log(run: Path, index: int) -> Path:
    return run.with_name(f"{run.name}.{index}.log")


def _logs(run: Path, processes: int) -> list[Path]:
    return [_log(run, index) for index in range(processes)]


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a process; None if it does not end in time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _poll(reached: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = LIMIT_SECONDS) -> None:
    """Waits until something is reached, a process ends, or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not reached():
        time.sleep(0.005)


def _steps(folder: Path) -> list[int]:
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _newest(run: Path) -> int | None:
    return max(_steps(run / "checkpoints" / "newest"), default=None)


def _intact(run: Path) -> int | None:
    """The newest checkpoint that is complete."""
    newest = run / "checkpoints" / "newest"
    return max((step for step in _steps(newest) if (newest / str(step) / "SHA256SUMS").exists()), default=None)


def _is_writing(kind: Path) -> bool:
    names = os.listdir(kind) if kind.is_dir() else []
    partial = [name for name in names if not name.isdecimal()]
    return bool(partial) or any(not (kind / str(step) / "SHA256SUMS").exists() for step in _steps(kind))


def _writing(run: Path, step: int) -> bool:
    """Whether a checkpoint is being written, after a step."""
    return (_newest(run) or 0) >= step and any(_is_writing(run / "checkpoints" / kind) for kind in ("newest", "best"))


def _due(run: Path) -> bool:
    """Whether the newest complete checkpoint waits for its validation."""
    step = _intact(run)
    if step is None:
        return False
    folder = run / "checkpoints" / "newest" / str(step)
    try:
        progress: dict[str, Any] = json.loads(json.loads((folder / "progress" / "metadata").read_text())["json"])
        return bool(progress["validation_due"]) and "validated.json" not in (folder / "SHA256SUMS").read_text()
    except (OSError, ValueError, KeyError):  # it is being deleted or written
        return False


def _validating(run: Path, step: int) -> bool:
    return (_newest(run) or 0) >= step and _due(run)


def _phase(run: Path) -> str:
    """What a killed process was doing, by the files that it has left."""
    if any(_is_writing(run / "checkpoints" / kind) for kind in ("newest", "best")):
        return "checkpoint"
    return "validation" if _due(run) else "step"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines."""
    text = path.read_text(errors="replace") if path.exists() else ""
    found = []
    for line in text.split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _last_step(run: Path) -> int:
    """The last step that is in the metrics; 0 if there is none."""
    return max((line["step"] for line in _lines(run / "metrics.jsonl")), default=0)


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = _lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    found = ocp.StandardCheckpointer().restore(folder)
    return {name: np.asarray(leaf) for name, leaf in found.items()}


if __name__ == "__main__":
    main()
