"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from imgcap_jax.errors import Terminated, printable
from imgcap_jax.signal_thread import SignalThread
from imgcap_jax.terminal import Say

PATIENCE_SECONDS = 5.0
"""How long work that can be repeated may delay the end; a Google Cloud machine stops 30 seconds after SIGTERM."""
_PATIENCE_OF_SEVERAL = 15.0  # with several processes, which first try to stop together
_GRACE_SECONDS = 27.0  # after the signal, for what is saved to reach the disk and the bucket


class Stopped(Exception):
    """Ends a validation, because a signal asks for it. number: that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopRequest:
    """A context manager in which SIGINT and SIGTERM only set ``signal``, and say so. Ctrl-C after one of them stops
    training without another checkpoint. SIGTERM decides the exit code if both are received.
    """

    def __init__(
        self,
        say: Say,
        *,
        agree: Callable[[int], tuple[int, ...]] = lambda number: (number,),
        processes: int = 1,
        drain: Callable[[float], BaseException | None] = lambda seconds: None,
        again: str = "the same command resumes",
    ) -> None:
        """Nothing is changed before it is entered.

        Args:
            say: receives the lines for the user.
            agree: returns the largest number of all processes.
            processes: their number.
            drain: called in another thread. Waits until everything is on disk, and at most this number of seconds until
                it is in the bucket. Returns the error if that failed.
            again: how to continue.
        """
        self.signal: int | None = None
        self._say, self._agree, self._drain, self._again = say, agree, drain, again
        self._patience = PATIENCE_SECONDS if processes == 1 else _PATIENCE_OF_SEVERAL
        self._repeatable = False
        self._step: int | None = None  # whose state is saved, during repeatable work
        self._at_once = False  # Ctrl-C after another signal
        self._deciding = threading.Lock()  # held while the process ends, so that repeatable work is not left meanwhile
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
        self._thread.end(wait=not self._at_once)  # it can wait for the bucket

    @contextmanager
    def repeatable(self, step: int | None = None) -> Iterator[None]:
        """For work that a resumed run repeats without loss, because the state of this step is saved.

        If it does not end soon after a signal, as a compilation, the process ends once all checkpoints are on disk and
        in the bucket.

        Args:
            step: the number of the step, for the user; None: not known.
        """
        self._step = step
        self._repeatable = True
        try:
            yield
        finally:
            if not self._at_once:
                with self._deciding:  # which Ctrl-C can interrupt too
                    self._repeatable = False

    def check(self) -> None:
        """Raises Stopped if a process has received a signal. All processes must call it equally often."""
        (number,) = self._agree(self.signal or 0)
        if number:
            raise Stopped(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            self._at_once = True  # from here on, the other thread does not end the process
            raise Terminated if self.signal == signal.SIGTERM else KeyboardInterrupt
        self.signal = number

    def _announce(self, number: int) -> None:
        if self._repeatable:
            step = "this step" if self._step is None else f"step {self._step}"
            self._say(f"stopping; everything up to {step} is saved")
            return
        again = "; Ctrl-C again stops without one" if number == signal.SIGINT else ""
        self._say(f"stopping after this step, with a checkpoint{again}")

    def _end_if_repeatable(self, number: int, seconds: float) -> None:
        if seconds < self._patience:
            return
        with self._deciding:
            if self._at_once or not self._repeatable:
                return
            error: BaseException | None
            try:
                error = self._drain(_GRACE_SECONDS - seconds)
            except BaseException as failure:  # the process must end all the same
                error = failure
            if self._at_once:
                return
            if error is None:
                at = "" if self._step is None else f" at step {self._step}"
                self._say(f"stopped{at}; {self._again}")
            else:
                print(f"imgcap: {printable(str(error))}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            # Python has not seen signals since it was blocked.
            terminated = signal.SIGTERM in self._thread.all_received()
            os._exit(128 + (signal.SIGTERM if terminated else number) if error is None else 2)
