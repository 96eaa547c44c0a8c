"""A thread that gives metrics to a service, so that training never waits for a network."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_Writer = TypeVar("_Writer")


class Worker(Generic[_Writer]):
    """Opens a writer in a thread of its own and runs jobs with it, in their order.

    After a job has failed, later ones are not run. The thread does not keep the process alive.
    """

    def __init__(self, name: str, open_writer: Callable[[], _Writer], failed: Callable[[Exception], None]) -> None:
        """Starts the thread.

        Args:
            name: of the thread.
            open_writer: makes the writer. It is called in the thread.
            failed: receives the first error, in the thread.
        """
        self._jobs: queue.SimpleQueue[Callable[[_Writer], None] | None] = queue.SimpleQueue()
        self._failed = failed
        self._thread = threading.Thread(target=self._run, args=(open_writer,), name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[_Writer], None]) -> None:
        """Runs a job after those before it. Returns at once."""
        self._jobs.put(job)

    def end(self) -> None:
        """Ends the thread after the jobs that were put. Returns at once."""
        self._jobs.put(None)

    def wait(self, until: float) -> bool:
        """Waits for the end of the thread until a time of ``time.monotonic``. Returns whether it has ended."""
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self, open_writer: Callable[[], _Writer]) -> None:
        try:
            writer = open_writer()
            while (job := self._jobs.get()) is not None:
                job(writer)
        except (Exception, SystemExit) as error:  # foreign code
            self._failed(error if isinstance(error, Exception) else RuntimeError(str(error)))
