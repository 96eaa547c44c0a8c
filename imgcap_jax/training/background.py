"""Jobs that one thread runs in the order in which they are given, while training goes on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundJobs:
    """A thread for jobs. After a job has failed, later jobs are not run."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._last: dict[str, Future[None]] = {}  # of each kind
        self._error: BaseException | None = None  # of the job that failed
        self._raised = False  # whether it was raised
        self._ended = time.monotonic()

    def start(self, kind: str, job: Callable[[], None]) -> None:
        """Starts a job when the ones before it have ended. First waits for the last one of the same kind."""

        def run() -> None:
            if self._error is not None:
                return
            try:
                job()
            except BaseException as error:
                self.fail(error)
            finally:
                self._ended = time.monotonic()

        self.drain(kind)
        self._last[kind] = self._thread.submit(run)

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last job ended, or since the start; 0 while a job runs or waits."""
        if any(not job.done() for job in self._last.values()):
            return 0.0
        return time.monotonic() - self._ended

    @property
    def failed(self) -> bool:
        """Whether a job has failed."""
        return self._error is not None

    def fail(self, error: BaseException) -> None:
        """Treats an error from elsewhere as that of a job: later jobs are not run."""
        self._error = self._error or error

    def check(self) -> None:
        """Raises the error of the job that has failed, once. Returns at once."""
        if self._error is not None and not self._raised:
            self._raised = True
            raise self._error

    def wait(self) -> None:
        """Waits for all jobs. Raises as ``check`` does."""
        self.drain()
        self.check()

    def drain(self, kind: str | None = None) -> BaseException | None:
        """Waits, in any thread, for all jobs or those of a kind. Returns the error of a failed job, and raises none."""
        for one, job in list(self._last.items()):
            if kind in (None, one):
                job.result()
        return self._error

    def close(self) -> None:
        """Ends the thread after the jobs that were started."""
        self._thread.shutdown()
