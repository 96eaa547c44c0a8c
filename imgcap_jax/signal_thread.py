"""A thread that reacts to signals while Python cannot, as during a compilation."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Collection

_TICK_SECONDS = 0.25


class SignalThread:
    """A context manager in which a thread reacts to the first of some signals.

    Python calls a signal handler only between two of its own instructions, which a compilation can delay by minutes.
    Python writes the number of each signal that has a handler to a pipe at once, and this thread reads it.
    """

    def __init__(
        self, numbers: Collection[int], received: Callable[[int], None], waiting: Callable[[int, float], None]
    ) -> None:
        """Can only be entered by the main thread.

        Args:
            numbers: the signals.
            received: called with the first one.
            waiting: called from then on, several times per second, with the first one and the seconds since it. It can
                call ``all_received``.
        """
        self._numbers, self._received, self._waiting = numbers, received, waiting

    def __enter__(self) -> "SignalThread":
        reader, self._writer = os.pipe()
        self._reader = open(reader, "rb", buffering=0)  # the thread closes it
        self._received_numbers: set[int] = set()
        os.set_blocking(self._writer, False)  # as Python demands
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()
        self._before = signal.set_wakeup_fd(self._writer)
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self, *, wait: bool = True) -> None:
        """Ends the thread. wait: whether ``waiting`` is not called, or has returned, afterwards."""
        signal.set_wakeup_fd(self._before)
        os.close(self._writer)
        if wait:
            self._thread.join()

    def all_received(self) -> set[int]:
        """All of the signals that were received up to now. Only for ``waiting``."""
        while select.select([self._reader], [], [], 0)[0] and (number := self._reader.read(1)):
            self._received_numbers.add(number[0])
        return self._received_numbers & {*self._numbers}

    def _run(self) -> None:
        first, since = 0, 0.0
        with self._reader as numbers:
            while True:
                if select.select([numbers], [], [], _TICK_SECONDS if first else None)[0]:
                    number = numbers.read(1)
                    if not number:
                        return
                    self._received_numbers.add(number[0])
                    if not first and number[0] in self._numbers:
                        first, since = number[0], time.monotonic()
                        self._received(first)
                if first:
                    self._waiting(first, time.monotonic() - since)
