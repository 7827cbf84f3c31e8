"""Decide which uses of a model's processor may run at the same time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ProcessorLock:
    """Lets threads prepare batches of documents together, and anything else use the processor only by itself.

    A fast tokenizer keeps truncation and padding as its own state, which every call sets to what it needs. A query that
    needs other settings would change them while a batch of documents is in work: the batch fails or, worse, is
    truncated. All documents need the same settings, so they run together once the first after such a query has set
    them.
    """

    def __init__(self) -> None:
        # Whoever comes next holds the queue while it waits, so that neither kind overtakes the other for ever.
        self._queue = threading.Lock()
        self._changed = threading.Condition()
        self._users = 0
        self._is_set_for_documents = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody uses the processor, and keep everybody else out."""
        with self._queue, self._changed:
            self._changed.wait_for(lambda: self._users == 0)
            self._users = 1
            self._is_set_for_documents = False
        with self._leaving():
            yield

    @contextmanager
    def for_documents(self) -> Iterator[None]:
        """Wait until the processor is set for documents, or unused."""
        with self._queue, self._changed:
            self._changed.wait_for(lambda: self._is_set_for_documents or self._users == 0)
            self._users += 1
        with self._leaving():
            yield
            self._is_set_for_documents = True

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()
