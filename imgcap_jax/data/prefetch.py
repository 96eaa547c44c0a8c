"""Work in the background: transfers of batches to the device while it computes, and functions in threads."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

Batch = TypeVar("Batch")
DeviceBatch = TypeVar("DeviceBatch")
Item = TypeVar("Item")
Result = TypeVar("Result")


class _End(NamedTuple):
    """The last item in the queue: the error that ended the iterator, or None if it ended normally."""

    error: BaseException | None


class DevicePrefetch(Generic[Batch, DeviceBatch]):
    """Iterator of (batch on the device, state right after that batch). See `device_prefetch`."""

    def __init__(self, iterator: Iterator[Batch], put: Callable[[Batch], DeviceBatch], depth: int) -> None:
        self._iterator = iterator
        self._put = put
        self._ready: queue.Queue[tuple[DeviceBatch, Any] | _End] = queue.Queue(maxsize=depth)
        self._closing = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._produce, name="device-prefetch", daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        get_state: Callable[[], Any] = getattr(self._iterator, "get_state", lambda: None)
        try:
            for batch in self._iterator:
                state = get_state()
                self._ready.put((self._put(batch), state))
                if self._closing.is_set():
                    return
        except BaseException as error:
            self._ready.put(_End(error))
        else:
            self._ready.put(_End(None))

    def __iter__(self) -> "DevicePrefetch[Batch, DeviceBatch]":
        return self

    def __next__(self) -> tuple[DeviceBatch, Any]:
        if self._ended:
            raise StopIteration
        item = self._ready.get()
        if not isinstance(item, _End):
            return item
        self._ended = True
        self._thread.join()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stops the thread, waits for it, drops the batches that were not consumed, and closes the iterator."""
        self._ended = True
        self._closing.set()
        # The thread may be waiting for space in the queue. After this loop it puts at most one more item, then sees
        # the flag.
        while True:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                break
        self._thread.join()
        getattr(self._iterator, "close", lambda: None)()

    def __enter__(self) -> "DevicePrefetch[Batch, DeviceBatch]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def device_prefetch(
    iterator: Iterator[Batch], put: Callable[[Batch], DeviceBatch], depth: int = 2
) -> DevicePrefetch[Batch, DeviceBatch]:
    """Draws batches and transfers them to the device in a background thread.

    Each batch comes with the iterator's state right after it was drawn. A checkpoint with the state of the last
    consumed batch therefore resumes with exactly the next one, however many were prefetched.

    Args:
        iterator: yields batches. Its `get_state`, if it has one, is called after each batch.
        put: host batch -> device batch, e.g. `jax.device_put` with a sharding.
        depth: number of batches kept ready. One more may be on the device, waiting for space in the queue.

    Returns:
        Iterator over (device batch, state). An error in the iterator or in `put` is raised by `__next__` after
        the batches that precede it. `close()`, or leaving the `with` block, stops the thread.
    """
    return DevicePrefetch(iterator, put, depth)


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item | None],
    *,
    threads: int,
    ahead: int,
    at_once: bool = True,
) -> Iterator[Result | None]:
    """The results of a function in the order of the items, computed in threads.

    Items are drawn by the caller's thread. If it stops early, the items that are not begun are dropped, and it does not
    wait for the others.

    Args:
        function: called in several threads at the same time.
        items: can be endless. None stands for no item: nothing is computed, and results that are done are yielded.
        threads: the number of threads.
        ahead: the number of items that are begun, or wait for a thread, while the caller uses a result.
        at_once: whether results that are done are yielded before the next item is drawn, even if fewer items are begun.

    Returns:
        Iterator over results, and None for each None. An error of the function is raised in place of its result.
    """
    pool = ThreadPoolExecutor(threads)
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            if item is not None:
                begun.append(pool.submit(function, item))
            while begun and (len(begun) > ahead or (at_once and begun[0].done())):
                yield begun.popleft().result()
            if item is None:
                yield None
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
