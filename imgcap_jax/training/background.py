"""Jobs that one thread runs in the order in which they are given, while training goes on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundJobs:
    """A thread for jobs. After a job has failed, later jobs are not run.

    The error of a job is raised, once, by the next call of ``check`` or ``wait``.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pending: list[tuple[str, Future[None]]] = []
        self._failed = False
        self._ended = time.monotonic()

    def start(self, kind: str, job: Callable[[], None]) -> None:
        """Starts a job when the ones before it have ended. First waits for the last one of the same kind.

        Raises:
            Exception: an earlier job failed.
        """
        self.wait(kind)

        def run() -> None:
            if self._failed:
                return
            try:
                job()
            except BaseException:
                self._failed = True
                raise
            finally:
                self._ended = time.monotonic()

        self._pending.append((kind, self._thread.submit(run)))

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last job ended, or since the start; 0 while a job runs or waits."""
        if any(not job.done() for _, job in self._pending):
            return 0.0
        return time.monotonic() - self._ended

    def check(self) -> None:
        """Returns at once. Raises the error of a job that has failed."""
        while self._pending and self._pending[0][1].done():
            self._pending.pop(0)[1].result()

    def wait(self, kind: str | None = None) -> None:
        """Waits for all jobs, or until the last one of a kind has ended. Raises the error of a job that has failed."""
        self.check()
        while (kind is None and self._pending) or kind in [one for one, _ in self._pending]:
            self._pending.pop(0)[1].result()

    def drain(self) -> BaseException | None:
        """Waits for all jobs, in any thread; returns the first error, and raises none."""
        jobs = [job for _, job in list(self._pending)]
        return next((error for error in [job.exception() for job in jobs] if error is not None), None)

    def close(self) -> None:
        """Ends the thread after the jobs that were started."""
        self._thread.shutdown()
