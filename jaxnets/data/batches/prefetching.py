"""Prefetching: a background thread puts batches on the device ahead of time."""

from __future__ import annotations

import atexit
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxnets.checks import check_source
from jaxnets.core import Batch, BatchSource
from jaxnets.data.batches.rows import part_of
from jaxnets.data.batches.wrapping import AroundSource

_JOIN_SECONDS = 5.0  # longest wait for a blocked source, so that closing never hangs


@dataclasses.dataclass(frozen=True, eq=False)
class PrefetchedBatches(AroundSource):
    """A source with a queue of batches on the device; see `prefetch`."""

    size: int
    device_put: Callable[[Batch], Any]

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from `first_step`; the thread starts with the first `next`."""
        producer = _Producer(self, first_step)
        try:
            producer.start()
            while (item := producer.take()) is not None:
                yield item
        finally:
            producer.stop()

    def part(self, index: int, count: int) -> PrefetchedBatches:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return dataclasses.replace(self, source=part_of(self.source, index, count))


class _Producer:
    """The thread of one iterator, at most `size` batches ahead of the consumer."""

    def __init__(self, batches: PrefetchedBatches, first_step: int) -> None:
        self._batches = batches
        self._first_step = first_step
        self._slots = threading.Semaphore(batches.size)
        self._ready: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        self._stopped = False
        # A daemon: Python joins other threads before `atexit` could stop them.
        self._thread = threading.Thread(target=self._run, name="jaxnets-prefetch", daemon=True)

    def start(self) -> None:
        # A thread inside the device runtime while Python shuts down can crash the process.
        atexit.register(self.stop)
        self._thread.start()

    def take(self) -> Batch | None:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        self._slots.release()
        return item

    def stop(self) -> None:
        if self._stopped:  # by `atexit`, before the iterator is dropped at shutdown
            return
        atexit.unregister(self.stop)
        self._stopped = True
        self._slots.release()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        try:
            for batch in self._batches.source(self._first_step):
                self._slots.acquire()
                if self._stopped:
                    return
                self._ready.put(self._batches.device_put(batch))
            self._ready.put(None)
        except BaseException as error:  # raised in the consumer, with its traceback
            self._ready.put(error)


def prefetch(
    source: BatchSource, *, size: int = 2, device_put: Callable[[Batch], Any] = jax.device_put
) -> PrefetchedBatches:
    """Produce batches and transfer them to the device while the current step runs.

    The order is that of the source. An exception in the thread is raised by `next` in the
    consumer, with the thread's traceback. The thread ends when the iterator is exhausted, closed
    or garbage-collected, and when the interpreter exits.

    Args:
        source: any batch source; each iterator runs it in its own thread.
        size: batches that may be queued on the device.
        device_put: batch -> batch on the device, for example with a sharding:
            `lambda batch: jax.device_put(batch, sharding)`.

    Returns:
        A source of the same batches, with the `steps_per_batch` of `source`.

    Raises:
        ValueError: `size` below 1.
        TypeError: `source` is no source, such as a list of batches.

    Example:
        >>> from jaxnets.data.batches.sources import index_batches
        >>> source = prefetch(index_batches(8, 4, seed=0))
        >>> next(source(0))["indices"].shape
        (4,)
    """
    check_source(source)
    if size < 1:
        raise ValueError(f"size {size} leaves no room for a batch; give a size of 1 or more")
    return PrefetchedBatches(source, size, device_put)
