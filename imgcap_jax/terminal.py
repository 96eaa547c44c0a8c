"""Progress of long work: bars while the output is a terminal, otherwise a line from time to time.

All long work uses ``working``, so that several kinds of work that run inside each other (a validation inside training)
share one display.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

FIRST_LINE_SECONDS = 10.0
LINE_SECONDS = 30.0
"""Where the output is no terminal: the time of the first line, and between two lines."""
_REFRESHES_PER_SECOND = 2.0  # of the bars; each takes about a millisecond of the interpreter's time
_BAR_WIDTHS = 6, 20  # characters, smallest and largest; a sixth of the terminal in between

Say = Callable[[str], None]


class Work:
    """One piece of long work that is shown. Made by ``working``."""

    def __init__(self, title: str, total: int | None, unit: str, done: int, say: Say) -> None:
        self.title, self.total, self.done = title, total, done
        self._unit, self._first, self._say = unit, done, say
        self._parts: Sequence[str] | None = None
        self._began = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Records that ``count`` more units are done."""
        self.update(self.done + count)

    def update(self, done: int, parts: Sequence[str] | None = None) -> None:
        """Records that ``done`` units are done.

        Args:
            done: the number of units.
            parts: texts to show, the most important first; None: the number of units, the rate and the time left.
        """
        self.done, self._parts = done, parts

    def restart(self, done: int) -> None:
        """Records that ``done`` units are done, and measures the rate from here on, as after a compilation."""
        self._began, self.done, self._first = time.monotonic(), done, done

    def parts(self) -> Sequence[str]:
        """The texts to show. A narrow terminal shows only the first ones."""
        if self._parts is not None:
            return self._parts
        seconds = time.monotonic() - self._began
        if self.total is None:
            return [f"{duration(seconds)} so far"]
        rate = (self.done - self._first) / seconds if seconds > 0 else 0.0
        count = f"{self.done:,}/{self.total:,} {self._unit}"
        if not rate:
            return [count]
        return [count, f"{_number(rate)} {self._unit}/s", f"{duration((self.total - self.done) / rate)} left"]

    def line(self) -> str:
        """Title and texts in one line."""
        title = f"{self.title}: " if self.title else ""
        return title + "  ".join(self.parts())

    @contextlib.contextmanager
    def lines(self, announced: bool) -> Iterator[None]:
        """Shows lines while entered, except while work inside this one shows its own.

        A thread writes them, so that stalled work and work of unknown length, which never call ``update``, are shown
        too.
        """
        if announced:
            self._say(f"{self.title} ...")
        ended = threading.Event()

        def remind() -> None:
            seconds = FIRST_LINE_SECONDS
            while not ended.wait(seconds):
                if _in_lines[-1:] == [self] and self.done != self.total:
                    self._say(self.line())
                seconds = LINE_SECONDS

        thread = threading.Thread(target=remind, daemon=True)
        _in_lines.append(self)
        thread.start()
        try:
            yield
        finally:
            _in_lines.remove(self)
            ended.set()
            thread.join()


_in_lines: list[Work] = []  # the work that shows lines, the innermost last


class _Console(Console):
    """A console that does not hide the cursor, which a killed process could not show again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Display:
    """The bars of all work in progress, below whatever is printed meanwhile. They vanish when their work ends."""

    def __init__(self) -> None:
        self._works: list[Work] = []
        self._live: Live | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def showing(self, work: Work) -> Iterator[None]:
        with self._lock:
            self._works.append(work)
            if self._live is None:
                self._console = _Console(file=sys.stderr)
                self._live = Live(
                    console=self._console,
                    get_renderable=self._rows,
                    refresh_per_second=_REFRESHES_PER_SECOND,
                    transient=True,
                )
                self._live.start(refresh=True)
        try:
            yield
        finally:
            with self._lock:
                self._works.remove(work)
                if not self._works:
                    self._live.stop()
                    self._live = None

    def _rows(self) -> Table:
        table = Table.grid(padding=(0, 1))
        width = min(max(self._console.width // 6, _BAR_WIDTHS[0]), _BAR_WIDTHS[1])
        room = self._console.width - width - 2
        for work in list(self._works):
            bar = ProgressBar(work.total, work.done, width=width, pulse=work.total is None)
            parts = [work.title, *work.parts()] if work.title else work.parts()
            table.add_row(bar, Text(_fitting(parts, room), no_wrap=True))
        return table


_display = _Display()


def on_terminal() -> bool:
    """Whether bars can be drawn: the output and the errors both go to a terminal that can move its cursor."""
    return sys.stdout.isatty() and sys.stderr.isatty() and not Console(file=sys.stderr).is_dumb_terminal


@contextlib.contextmanager
def working(
    title: str,
    total: int | None = None,
    unit: str = "",
    *,
    done: int = 0,
    shown: bool = True,
    say: Say | None = None,
    announced: bool = False,
) -> Iterator[Work]:
    """Shows progress while entered: a bar on a terminal, otherwise a line after 10 seconds and then every 30.

    Args:
        title: what is done, as "decoding"; "" if the texts given to ``Work.update`` say it.
        total: the number of units; None: unknown, only the time is shown.
        unit: what is counted, as "images".
        done: the number of units done before.
        shown: False shows nothing.
        say: receives the lines; None: they go to the standard error.
        announced: where the output is no terminal, also write a line at the start.

    Yields:
        The work, whose ``update`` or ``advance`` is called as units are done.
    """
    work = Work(title, total, unit, done, say or _to_standard_error)
    with contextlib.ExitStack() as stack:
        if shown:
            stack.enter_context(_display.showing(work) if on_terminal() else work.lines(announced))
        yield work


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss; "-" if they are not finite."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _fitting(parts: Sequence[str], room: int) -> str:
    """As many of the parts as fit, at least the first."""
    text = "".join(parts[:1])
    for part in parts[1:]:
        if len(text) + 2 + len(part) > room:
            break
        text += f"  {part}"
    return text


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
