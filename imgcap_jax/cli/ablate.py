"""``imgcap ablate``: trains the runs of a study and writes the table of differences."""

import argparse
import ctypes
import glob
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from imgcap_jax.cli.experiments import find_study
from imgcap_jax.errors import UserError, check_range, counted
from imgcap_jax.files import check_creatable
from imgcap_jax.remote import url_of
from imgcap_jax.user_code import load_all_code

_TOGETHER = 8  # runs per program on an accelerator
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")
_TABLES = "table.md, table.tex, table.csv, table.json"


def ablate(options: argparse.Namespace, folder: Path, cache: Path, keep_compiled: Callable[[], None]) -> int:
    """Runs the command.

    Args:
        options: those of the command line.
        folder: the folder of all runs.
        cache: folder of the features of frozen encoders.
        keep_compiled: makes JAX keep compiled programs.
    """
    load_all_code(options.code)
    study = find_study(options.study)
    check_range("--jobs", options.jobs, at_least=1)
    if options.together is not None:
        check_range("--together", options.together, at_least=1)
    if url_of(folder) is not None:
        raise UserError(f"{folder} is in a bucket; the folder of a study must be on a disk")
    shard, devices = _shard(options.shard), _devices(options)
    check_creatable(folder)
    if options.jobs > 1 and not options.dry_run:
        import jax

        jax.config.update("jax_platforms", "cpu")  # the accelerators and their memory are for the jobs
        from imgcap_jax.ablation.runner import check_study

        check_study(study, folder, options.init_from)  # once, rather than by each job
        code, stopped = _run_jobs(options, devices)
    else:
        if devices:
            os.environ.update(_visible(devices))
        keep_compiled()
        if options.dry_run:
            return _dry_run(options, study, folder, shard)
        code = _run(options, study, folder, cache, shard)
        stopped = code >= 128
    if stopped or options.worker:
        return code
    _write(study, folder)
    return code


def _run(options: argparse.Namespace, study: Any, folder: Path, cache: Path, shard: tuple[int, int]) -> int:
    import jax

    from imgcap_jax.ablation.runner import ablate as run
    from imgcap_jax.ablation.runs import runs_of

    together = options.together
    if together is None:
        together = 1 if jax.default_backend() == "cpu" else _TOGETHER
    settings, runs = study.settings(), runs_of(study)
    print(
        f"{counted(len(settings), 'setting')} with {counted(len(study.seeds), 'seed')} each: "
        f"{counted(len(runs), 'run')} in {folder}"
    )
    done = run(
        study,
        folder,
        cache=cache,
        init_from=options.init_from,
        together=together,
        processes=options.worker or 1,
        shard=shard,
    )
    parts = [f"{len(done.finished)} finished"]
    parts += [f"{len(done.failed)} failed"] if done.failed else []
    parts += [f"{len(done.elsewhere)} left to other processes"] if done.elsewhere else []
    print(f"{counted(len(runs), 'run')}: {', '.join(parts)}")
    if done.interrupted:
        print("stopped; the same command resumes")
        return 128 + done.interrupted
    return 2 if done.failed else 0


def _write(study: Any, folder: Path) -> None:
    """Writes and prints the table of the results so far."""
    from imgcap_jax.ablation.plot import write_plot
    from imgcap_jax.ablation.records import result_files
    from imgcap_jax.ablation.statistics import study_table
    from imgcap_jax.ablation.tables import lines, write_tables

    found = result_files(folder)
    if not found:
        print("there are no results yet, so there is no table")
        return
    while True:
        table = study_table(study, folder)
        write_tables(table, folder)
        write_plot(table, folder / "differences.png")
        # Another process can have finished the last run meanwhile, and written the whole table before this one.
        before, found = found, result_files(folder)
        if before == found:
            break
    print("\n" + "\n".join(lines(table)))
    print(f"\nwritten to {folder}: {_TABLES}, differences.png")


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(
            f"--shard is {text!r}; it must be I/N with I from 1 to N, as 1/2 on one machine and 2/2 on the other"
        )
    return int(found[1]), int(found[2])


def _devices(options: argparse.Namespace) -> list[str]:
    """The accelerators that the user names."""
    if options.devices is None:
        if options.jobs > 1 and glob.glob("/dev/nvidia[0-9]*"):
            raise UserError(
                "several jobs on GPUs need --devices, as --devices 0,1: two jobs cannot share the memory of one"
            )
        return []
    devices: list[str] = options.devices.split(",")
    if not all(device.isdigit() for device in devices) or len(set(devices)) < len(devices):
        raise UserError(f"--devices is {options.devices!r}; give numbers of accelerators, as 0,1")
    if len(devices) % options.jobs:
        raise UserError(
            f"{counted(len(devices), 'device')} cannot be divided among {options.jobs} jobs; change one of them"
        )
    return devices


def _visible(devices: Sequence[str]) -> dict[str, str]:
    """The environment in which JAX sees these accelerators only."""
    return dict.fromkeys(_VISIBLE, ",".join(devices))


def _dry_run(options: argparse.Namespace, study: Any, folder: Path, shard: tuple[int, int]) -> int:
    """Says what would run, and how long."""
    from imgcap_jax.ablation.estimate import time_runs
    from imgcap_jax.ablation.records import evaluated_source
    from imgcap_jax.ablation.runner import check_study, missing_results
    from imgcap_jax.ablation.runs import runs_of
    from imgcap_jax.report.columns import aligned
    from imgcap_jax.run.finder import is_run
    from imgcap_jax.terminal import duration

    check_study(study, folder, options.init_from)
    source, number, shards = evaluated_source(study), *shard
    runs = runs_of(study)[number - 1 :: shards]
    left = [run for run in runs if missing_results(run, folder, source)]
    started = sum(is_run(folder / run.name) for run in left)
    print(
        f"{counted(len(study.settings()), 'setting')}, {counted(len(runs), 'run')} in {folder}"
        f"{f' (shard {number} of {shards})' if shards > 1 else ''}: {len(runs) - len(left)} finished, {started} to "
        f"resume, {len(left) - started} to start"
    )
    if not left:
        return 0
    timed = time_runs(left, init_from=options.init_from, show=print)
    rows = [["settings", "runs", "start", "steps", "s per step", "validations", "s per validation", "per run"]]
    for run, count, time in timed:
        numbers = [f"{count}", duration(time.start_seconds), f"{time.steps:,}", f"{time.step_seconds:.3f}"]
        numbers += [f"{time.validations}", f"{time.validation_seconds:.1f}", duration(time.seconds)]
        rows.append(["; ".join(setting.name for setting in run.settings), *numbers])
    print("\n".join(aligned(rows, left=(0,))))
    total = sum(count * time.seconds for _, count, time in timed) / options.jobs
    jobs = f", in {options.jobs} jobs that do not slow each other down" if options.jobs > 1 else ""
    print(
        f"about {duration(total)} in all{jobs}, without the features of a frozen encoder and the evaluation of each "
        f"run. The start includes compilation, which later runs of a setting find in the cache. Runs that resume take "
        f"less, and so do runs that are trained together on an accelerator"
    )
    return 0


def _run_jobs(options: argparse.Namespace, devices: Sequence[str]) -> tuple[int, bool]:
    """Runs the command in several processes, each of which takes the next run that no other one trains.

    Returns:
        The exit code, and whether a signal has stopped the jobs.
    """
    command = [sys.executable, "-m", "imgcap_jax.cli.main", *options.given, "--jobs", "1"]
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    jobs: list[subprocess.Popen[str]] = []
    with _forwarding(jobs) as received:
        for number in range(options.jobs):
            own = devices[number :: options.jobs]
            jobs.append(
                subprocess.Popen(
                    [*_without_devices(command), "--worker", str(options.jobs)],
                    env=os.environ | (_visible(own) if own else {}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    preexec_fn=_of_job(cpus[number :: options.jobs] if len(cpus) >= options.jobs else []),
                )
            )
        threads = [threading.Thread(target=_show_lines, args=(job, number)) for number, job in enumerate(jobs, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = [job.wait() for job in jobs]
    if received:
        return 128 + received[0], True
    for number, code in enumerate(codes, 1):
        if code not in (0, 2):
            ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            print(f"job {number} {ended}; its last run is not finished. The same command resumes it", file=sys.stderr)
    return (2 if any(codes) else 0), False


def _without_devices(command: Sequence[str]) -> list[str]:
    """The command without --devices, which only its environment says."""
    found, skip = [], False
    for word in command:
        if not skip and word != "--devices" and not word.startswith("--devices="):
            found.append(word)
        skip = word == "--devices"
    return found


def _of_job(cpus: Sequence[int]) -> Callable[[], None]:
    """What a new job does first: it takes its CPU cores, and asks to be stopped if this process is killed."""
    system = ctypes.CDLL(None) if sys.platform == "linux" else None
    set_death_signal = 1  # PR_SET_PDEATHSIG

    def prepare() -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)
        if system is not None:
            system.prctl(set_death_signal, int(signal.SIGTERM), 0, 0, 0)

    return prepare


def _show_lines(job: "subprocess.Popen[str]", number: int) -> None:
    assert job.stdout is not None
    for line in job.stdout:
        print(f"{number}| {line}", end="", flush=True)


@contextmanager
def _forwarding(jobs: "Sequence[subprocess.Popen[str]]") -> Iterator[list[int]]:
    """While entered, SIGTERM and Ctrl-C end the jobs, which save their state. Yields the signals that were received."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for job in jobs:
            if job.poll() is None:
                job.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
