"""Captions the photos of concurrent requests in common batches, in one thread."""

import asyncio
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from imgcap_jax.captioner import Caption, Captioner

_LARGEST = 32  # photos per batch, as in ``Captioner``
_ALONE = 2  # so many photos are captioned one by one: a batch of eight takes longer
_ROWS = 2**30
_WAIT = 0.01  # seconds that the first photo of a batch waits for others


class BusyError(Exception):
    """Too many photos are waiting."""


@dataclass
class _Job:
    """A photo that waits. answer: gets its captions, best first, on the event loop ``loop``."""

    style: str
    pixels: Sequence[np.ndarray]
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[list[Caption]]"
    arrived: float = field(default_factory=time.monotonic)


class Batches:
    """A queue of photos, and the thread that captions them."""

    def __init__(self, captioners: Mapping[str, Captioner], waiting: int) -> None:
        """Starts the thread.

        Args:
            captioners: one per style of search.
            waiting: the number of photos that can wait.
        """
        self._captioners = captioners
        self._jobs: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._held: _Job | None = None  # drawn from the queue, for the next batch
        self._thread = threading.Thread(target=self._run, name="captions", daemon=True)
        self._thread.start()

    async def captions(self, style: str, pixels: Sequence[np.ndarray]) -> list[Caption]:
        """The captions of a photo, best first.

        Args:
            style: one of the captioners.
            pixels: what ``Captioner.pixels`` returns.

        Raises:
            BusyError: too many photos are waiting.
        """
        loop = asyncio.get_running_loop()
        job = _Job(style, pixels, loop, loop.create_future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full as error:
            raise BusyError from error
        return await job.answer

    def close(self) -> None:
        """Ends the thread, after the photos that are waiting."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            batch = [job for job in batch if not job.answer.cancelled()]
            if not batch:
                continue
            captioner = self._captioners[batch[0].style]
            size = 1 if len(batch) <= _ALONE else len(batch)
            for start in range(0, len(batch), size):
                part = batch[start : start + size]
                try:
                    # Of samples: otherwise a photo that is sent again would get the same ones.
                    row = secrets.randbelow(_ROWS)
                    found = [one for group in captioner.stream([job.pixels for job in part], row) for one in group]
                except Exception as error:  # of the model or of memory: those who wait must hear of it
                    for job in part:
                        job.loop.call_soon_threadsafe(_fail, job.answer, error)
                else:
                    for job, captions in zip(part, found, strict=True):
                        job.loop.call_soon_threadsafe(_answer, job.answer, captions)

    def _next(self) -> list[_Job] | None:
        """The next photos of one style, which arrived within a moment; None: the end."""
        first, self._held = self._held, None
        first = first or self._jobs.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < _LARGEST:
            left = first.arrived + _WAIT - time.monotonic()
            try:
                job = self._jobs.get(timeout=max(left, 0)) if left > 0 else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None or job.style != first.style:
                if job is None:
                    self._jobs.put(None)
                else:
                    self._held = job
                break
            batch.append(job)
        return batch


def _answer(future: "asyncio.Future[list[Caption]]", captions: list[Caption]) -> None:
    if not future.done():
        future.set_result(captions)


def _fail(future: "asyncio.Future[list[Caption]]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
