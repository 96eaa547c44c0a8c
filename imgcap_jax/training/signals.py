"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from imgcap_jax.errors import printable
from imgcap_jax.signal_thread import SignalThread
from imgcap_jax.terminal import Say

PATIENCE_SECONDS = 5.0
"""How long work that can be repeated may delay the end; a Google Cloud machine stops 30 seconds after SIGTERM."""
_PATIENCE_OF_SEVERAL = 15.0  # with several processes, which first try to stop together


class Stopped(Exception):
    """Ends a validation, because a signal asks for it. number: that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopRequest:
    """A context manager in which SIGINT and SIGTERM only set ``signal``, and say so. A second Ctrl-C stops training
    without another checkpoint.
    """

    def __init__(
        self,
        say: Say,
        *,
        agree: Callable[[int], tuple[int, ...]] = lambda number: (number,),
        processes: int = 1,
        drain: Callable[[], BaseException | None] = lambda: None,
        again: str = "the same command resumes",
    ) -> None:
        """Nothing is changed before it is entered.

        Args:
            say: receives the lines for the user.
            agree: returns the largest number of all processes.
            processes: their number.
            drain: waits until everything is on disk; returns the error if that failed.
            again: how to continue.
        """
        self.signal: int | None = None
        self._say, self._agree, self._drain, self._again = say, agree, drain, again
        self._patience = PATIENCE_SECONDS if processes == 1 else _PATIENCE_OF_SEVERAL
        self._repeatable = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._thread = SignalThread((signal.SIGINT, signal.SIGTERM), self._announce, self._end_if_repeatable)
        self._thread.__enter__()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._thread.__exit__()

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """For work that a resumed run repeats without loss, because the state of this step is saved.

        If it does not end soon after a signal, as a compilation, the process ends once all checkpoints are on disk.
        """
        self._repeatable = True
        try:
            yield
        finally:
            self._repeatable = False

    def check(self) -> None:
        """Raises Stopped if a process has received a signal. All processes must call it equally often."""
        (number,) = self._agree(self.signal or 0)
        if number:
            raise Stopped(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def _announce(self, number: int) -> None:
        if self._repeatable:
            self._say("stopping; everything up to this step is saved")
            return
        again = "; Ctrl-C again stops without one" if number == signal.SIGINT else ""
        self._say(f"stopping after this step, with a checkpoint{again}")

    def _end_if_repeatable(self, number: int, seconds: float) -> None:
        if not self._repeatable or seconds < self._patience:
            return
        error = self._drain()
        if error is None:
            self._say(f"stopped; {self._again}")
        else:
            print(f"imgcap: {printable(str(error))}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + number if error is None else 2)
