"""SIGTERM ends a command, whatever it does."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from imgcap_jax.errors import Terminated
from imgcap_jax.files import reason
from imgcap_jax.signal_thread import SignalThread

# After SIGTERM, before the process ends in any case; Google Cloud stops a machine after 30 seconds.
REACTION_SECONDS = 5.0  # if Python could not react to it, as during a compilation
CLEANING_SECONDS = 20.0  # if it could, and has closed files since
_AGAIN_SECONDS = 0.05
# In the message of JAX's error, by Gloo (CPU), NCCL (GPU) and the service that connects the processes.
_LOST = re.compile(r"Gloo .* failed|NCCL|Socket closed|Connection (closed|reset)|heartbeat|UNAVAILABLE", re.IGNORECASE)


@contextmanager
def sigterm_interrupts(line: str, *, may_exit: bool) -> Iterator[None]:
    """While entered, SIGTERM raises Terminated, unless the program has its own handler. The training loop has one.

    If Python cannot react, as during the compilation of an encoder, a thread ends the process soon after.

    Args:
        line: what the thread prints.
        may_exit: whether the thread may end the process.
    """
    reacted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal reacted
        reacted = True
        raise Terminated

    def end(number: int, seconds: float) -> None:
        taken_over = signal.getsignal(signal.SIGTERM) is not interrupt
        if not taken_over and seconds >= (CLEANING_SECONDS if reacted else REACTION_SECONDS):
            print(line, file=sys.stderr, flush=True)
            os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with _never_ignored():
            if may_exit:
                with SignalThread((signal.SIGTERM,), lambda number: None, end):
                    yield
            else:
                yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _never_ignored() -> Iterator[None]:
    """While entered, sends a signal again if Python ignores the exception of its handler.

    Python ignores exceptions in callbacks of the garbage collector, of which JAX has one.
    """
    before = sys.unraisablehook

    def hook(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            number = signal.SIGTERM if issubclass(ignored.exc_type, Terminated) else signal.SIGINT
            threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def lost_process(error: BaseException) -> str:
    """A line about an error of JAX because another process has ended or cannot be reached; "" for another error."""
    jax = sys.modules.get("jax")
    if jax is None or not _LOST.search(str(error)):
        return ""
    # Calling a compiled function for the first time raises the error as a ValueError, which begins with XLA's status.
    of_xla = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error))
    if not (of_xla or isinstance(error, jax.errors.JaxRuntimeError)):
        return ""
    return f"another process has ended, or can't be reached ({reason(error)})"
