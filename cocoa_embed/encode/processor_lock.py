"""A lock that lets some uses of a model's processor run at the same time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ProcessorLock:
    """Lets threads prepare batches of documents together, and queries only one at a time.

    A fast tokenizer keeps truncation and padding as state, which every call sets. A query with other settings would
    change them while a batch of documents is being tokenized: the batch fails or, worse, is truncated. All documents
    need the same settings, so they run together once the first one after a query has set them.
    """

    def __init__(self) -> None:
        # The next thread holds the queue while it waits, so that neither kind overtakes the other for ever.
        self._queue = threading.Lock()
        self._changed = threading.Condition()
        self._users = 0
        self._is_set_for_documents = False

    @contextmanager
    def use(self, *, for_documents: bool) -> Iterator[None]:
        """Wait until the processor is unused or, for documents, set for documents; use it."""
        with self._queue, self._changed:
            self._changed.wait_for(lambda: self._users == 0 or (for_documents and self._is_set_for_documents))
            self._users += 1
            self._is_set_for_documents &= for_documents
        try:
            yield
            self._is_set_for_documents = for_documents
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()
