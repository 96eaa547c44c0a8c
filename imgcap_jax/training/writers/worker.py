"""A thread that gives metrics to a service, so that training never waits for a network."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

MOST_WAITING = 100  # jobs, some of which keep several megabytes of pictures

_Writer = TypeVar("_Writer")


class Worker(Generic[_Writer]):
    """Opens a writer in a thread of its own and runs jobs with it, in their order.

    After a job has failed, the waiting jobs are dropped, and later ones are not taken. The thread does not keep the
    process alive.
    """

    def __init__(self, name: str, open_writer: Callable[[], _Writer], failed: Callable[[Exception], None]) -> None:
        """Starts the thread.

        Args:
            name: of the thread.
            open_writer: makes the writer. It is called in the thread.
            failed: receives the first error, in the thread.
        """
        self._jobs: deque[Callable[[_Writer], None]] = deque()
        self._ended = False  # whether no more jobs are taken
        self._changed = threading.Condition()
        self._failed = failed
        self._thread = threading.Thread(target=self._run, args=(open_writer,), name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[_Writer], None], *, instead: Callable[[_Writer], None] | None = None) -> bool:
        """Runs a job after those before it. Returns at once.

        If ``MOST_WAITING`` jobs wait already, they and this one are dropped.

        Args:
            job: it is called with the writer, in the thread.
            instead: is run in place of dropped jobs.

        Returns:
            Whether no job was dropped.
        """
        with self._changed:
            if self._ended:
                return True
            fits = len(self._jobs) < MOST_WAITING
            if not fits:
                self._jobs.clear()
            next_job = job if fits else instead
            if next_job is not None:
                self._jobs.append(next_job)
                self._changed.notify()
            return fits

    def end(self, last: Callable[[_Writer], None] | None = None) -> None:
        """Ends the thread after the waiting jobs and ``last``. Returns at once."""
        with self._changed:
            if last is not None and not self._ended:
                self._jobs.append(last)
            self._ended = True
            self._changed.notify()

    def wait(self, until: float) -> bool:
        """Waits for the end of the thread until a time of ``time.monotonic``. Returns whether it has ended."""
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self, open_writer: Callable[[], _Writer]) -> None:
        try:
            writer = open_writer()
            while (job := self._next()) is not None:
                job(writer)
                del job  # frees its pictures while the thread waits for the next one
        except (Exception, SystemExit) as error:  # foreign code
            with self._changed:
                self._ended = True
                self._jobs.clear()
            self._failed(error if isinstance(error, Exception) else RuntimeError(str(error)))

    def _next(self) -> Callable[[_Writer], None] | None:
        """Waits for the next job. None: there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ended)
            return self._jobs.popleft() if self._jobs else None
