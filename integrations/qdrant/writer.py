"""Write points to a store in background threads, while the model embeds the next images."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from cocoa_embed.integrations.qdrant.stores.base import Point
from cocoa_embed.integrations.qdrant.stores.store import Store

BATCH_POINTS = 64


class Writer:
    """A context manager that writes points in batches, ``store.parallel`` of them at once.

    At the end of the context, all points are stored, unless there was an exception.
    """

    def __init__(self, store: Store) -> None:
        """Start no thread yet."""
        self._store = store
        self._batch: list[Point] = []
        self._pool = ThreadPoolExecutor(store.parallel, thread_name_prefix="cocoa-embed-writer")
        self._writes: deque[Future[None]] = deque()

    def add(self, point: Point) -> None:
        """Take a point; waits while as many batches are queued as are being written.

        :raises CocoaError: If an earlier write has failed.
        """
        self._batch.append(point)
        if len(self._batch) >= BATCH_POINTS:
            self._submit()

    def _submit(self) -> None:
        self._writes.append(self._pool.submit(self._store.upsert, self._batch))
        self._batch = []
        while len(self._writes) > 2 * self._store.parallel or (self._writes and self._writes[0].done()):
            self._writes.popleft().result()

    def __enter__(self) -> Writer:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Store the remaining points and wait for all writes, unless there was an exception."""
        try:
            if kind is None:
                if self._batch:
                    self._submit()
                for write in self._writes:
                    write.result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
