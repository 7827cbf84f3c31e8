"""Points on their way to a store: collected, and written by threads of their own while the model goes on."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from cocoa_embed.integrations.qdrant.stores.base import Point, Store

POINTS_AT_ONCE = 64


class Writer:
    """Writes points to a store in the background, ``store.parallel`` groups of them at once.

    A context manager: leaving it waits until everything is stored, unless an error is on its way.
    """

    def __init__(self, store: Store, points_at_once: int | None = None) -> None:
        """Write groups of ``points_at_once`` points; of ``POINTS_AT_ONCE`` if None."""
        self._store = store
        self._points_at_once = points_at_once or POINTS_AT_ONCE
        self._collected: list[Point] = []
        self._pool = ThreadPoolExecutor(store.parallel, thread_name_prefix="cocoa-embed-writer")
        self._at_work: deque[Future[None]] = deque()

    def add(self, point: Point) -> None:
        """Take a point to be written; waits while as many groups are waiting as are being written.

        :raises CocoaError: If writing an earlier one has failed.
        """
        self._collected.append(point)
        if len(self._collected) >= self._points_at_once:
            self._send()

    def flush(self) -> None:
        """Wait until every point so far is stored.

        :raises CocoaError: If writing one has failed.
        """
        if self._collected:
            self._send()
        while self._at_work:
            self._at_work.popleft().result()

    def _send(self) -> None:
        points, self._collected = self._collected, []
        self._at_work.append(self._pool.submit(self._store.upsert, points))
        while len(self._at_work) > 2 * self._store.parallel or (self._at_work and self._at_work[0].done()):
            self._at_work.popleft().result()

    def __enter__(self) -> Writer:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait for what is being written; store the rest too, unless an error is on its way."""
        try:
            if kind is None:
                self.flush()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
