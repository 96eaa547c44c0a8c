"""Signals during training."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from imgcap_jax.errors import Terminated
from imgcap_jax.training.signals import Stopped, StopRequest


def raise_later(number: int) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()


def test_ctrl_c_is_answered_while_the_interpreter_waits_for_a_compilation() -> None:
    said: list[tuple[str, float]] = []
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(lambda line: said.append((line, time.monotonic()))) as stop:
        raise_later(signal.SIGINT)
        start = time.monotonic()
        while time.monotonic() < start + 0.2:  # a call that signals do not interrupt; Python handles them afterwards
            hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
        ended = time.monotonic()
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    ((line, when),) = said
    assert line == "stopping after this step, with a checkpoint; Ctrl-C again stops without one"
    assert when < ended - 0.1
    assert signal.getsignal(signal.SIGINT) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_sigterm_is_answered_too() -> None:
    said: list[str] = []
    with StopRequest(said.append) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert said == ["stopping after this step, with a checkpoint"]


def test_ctrl_c_after_sigterm_stops_with_the_exit_code_of_sigterm() -> None:
    with StopRequest(print) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # schedulers repeat it
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGTERM
    with StopRequest(print) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM


def test_signal_ends_a_validation_in_all_processes() -> None:
    others = [0]
    with StopRequest(print, agree=lambda number: (max(number, *others),)) as stop:
        stop.check()
        others.append(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            stop.check()
        assert stopped.value.number == signal.SIGTERM


BLOCKED = """
import hashlib, time
from imgcap_jax.training import signals

def drain(seconds):
    assert 20 < seconds < 27
    time.sleep(0.5)
    print("written", flush=True)

signals.PATIENCE_SECONDS = 0.5
stop = signals.StopRequest(print, drain=drain)
with stop, stop.repeatable(7):
    print("started", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # no signal interrupts it
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_what_can_be_repeated_after_the_checkpoints(number: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert output.splitlines() == [
        "stopping; everything up to step 7 is saved",
        "written",
        "stopped at step 7; the same command resumes",
    ]


def test_sigterm_decides_the_exit_code_while_python_is_blocked() -> None:
    code = BLOCKED.replace("time.sleep(0.5)", "time.sleep(1.5)")
    for pause in (0.1, 1.0):  # before and while the checkpoints are written
        process = subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        process.terminate()
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 128 + signal.SIGTERM


INSISTING = """
import os, signal, sys, threading, time
from imgcap_jax.training import signals

draining = threading.Event()

def drain(seconds):
    draining.set()
    time.sleep(600)

signals.PATIENCE_SECONDS = 0.1
stop = signals.StopRequest(print, drain=drain)
try:
    with stop, stop.repeatable():
        signal.raise_signal(signal.SIGINT)
        draining.wait()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_ends_the_wait_for_the_checkpoints() -> None:
    ended = subprocess.run([sys.executable, "-c", INSISTING], text=True, capture_output=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (130, "stopping; everything up to this step is saved\n")


FAILING = """
import signal, time
from imgcap_jax.training import signals

def drain(seconds):
    raise RuntimeError("broken")

signals.PATIENCE_SECONDS = 0.1
stop = signals.StopRequest(print, drain=drain)
with stop, stop.repeatable():
    signal.raise_signal(signal.SIGTERM)
    time.sleep(60)
"""


def test_process_ends_even_if_waiting_for_the_checkpoints_fails() -> None:
    ended = subprocess.run([sys.executable, "-c", FAILING], text=True, capture_output=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (2, "imgcap: broken\n")


LEAVING = """
import signal, threading, time
from imgcap_jax.training import signals

draining = threading.Event()

def drain(seconds):
    draining.set()
    time.sleep(1)

signals.PATIENCE_SECONDS = 0.1
stop = signals.StopRequest(print, drain=drain)
with stop:
    with stop.repeatable():
        signal.raise_signal(signal.SIGTERM)
        draining.wait()
    print("the next step")  # its results would be lost
"""


def test_repeatable_work_is_not_left_while_the_process_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVING], text=True, capture_output=True, timeout=60)
    assert ended.returncode == 143
    assert ended.stdout.splitlines() == [
        "stopping; everything up to this step is saved",
        "stopped; the same command resumes",
    ]
