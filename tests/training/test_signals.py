"""Signals during training."""

import hashlib
import os
import signal
import threading
import time

import pytest

from imgcap_jax.training.signals import StopRequest


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
