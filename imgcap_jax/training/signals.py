"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from imgcap_jax.terminal import Say


class StopRequest:
    """A context manager in which SIGINT and SIGTERM only set ``signal``, and say so. A second Ctrl-C stops training
    without another checkpoint.

    Python calls a signal handler only between two of its own instructions, which a compilation can delay by minutes. A
    thread writes the line at once.
    """

    def __init__(self, say: Say) -> None:
        self.signal: int | None = None
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)  # as Python demands
        self._thread = threading.Thread(target=self._announce, args=(reader,), daemon=True)
        self._thread.start()
        self._fd_before = signal.set_wakeup_fd(self._writer)  # Python writes the number of each signal to it
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)
        self._thread.join()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def _announce(self, reader: int) -> None:
        announced = False
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if announced or number[0] not in (signal.SIGINT, signal.SIGTERM):
                    continue
                announced = True
                again = "; Ctrl-C again stops without one" if number[0] == signal.SIGINT else ""
                self._say(f"stopping after this step, with a checkpoint{again}")
