"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """A context manager in which SIGINT and SIGTERM only set ``signal``. A second Ctrl-C stops immediately."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
