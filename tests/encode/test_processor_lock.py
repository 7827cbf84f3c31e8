import threading
from contextlib import AbstractContextManager

import pytest

from cocoa_embed.encode.processor_lock import ProcessorLock


class Visit:
    """A thread's stay in a section, of at most ten seconds."""

    def __init__(self, section: AbstractContextManager[None]) -> None:
        self._inside, self._leave = threading.Event(), threading.Event()
        threading.Thread(target=self._stay, args=(section,), daemon=True).start()

    def _stay(self, section: AbstractContextManager[None]) -> None:
        with section:
            self._inside.set()
            self._leave.wait(10)

    def is_inside(self, seconds: float = 5.0) -> bool:
        return self._inside.wait(seconds)

    def end(self) -> None:
        self._leave.set()


@pytest.fixture
def lock() -> ProcessorLock:
    """A lock whose processor is set for documents."""
    lock = ProcessorLock()
    with lock.use(for_documents=True):
        pass
    return lock


def test_documents_run_together_after_the_first() -> None:
    lock = ProcessorLock()
    first = Visit(lock.use(for_documents=True))
    assert first.is_inside()
    second, third = Visit(lock.use(for_documents=True)), Visit(lock.use(for_documents=True))
    assert not second.is_inside(0.05)
    first.end()
    assert second.is_inside()
    assert third.is_inside()


def test_queries_run_alone_in_turn_with_documents(lock: ProcessorLock) -> None:
    document = Visit(lock.use(for_documents=True))
    assert document.is_inside()
    query = Visit(lock.use(for_documents=False))
    assert not query.is_inside(0.05)
    late = Visit(lock.use(for_documents=True))
    assert not late.is_inside(0.05), "documents do not overtake a waiting query"
    document.end()
    assert query.is_inside()
    assert not late.is_inside(0.05)
    query.end()
    assert late.is_inside()
    assert not Visit(lock.use(for_documents=True)).is_inside(0.05), "the first documents after a query run alone"


def test_queries_run_one_at_a_time(lock: ProcessorLock) -> None:
    assert Visit(lock.use(for_documents=False)).is_inside()
    assert not Visit(lock.use(for_documents=False)).is_inside(0.05)


def test_documents_that_are_refused_leave_the_processor_unset() -> None:
    lock = ProcessorLock()
    with pytest.raises(KeyError), lock.use(for_documents=True):
        raise KeyError
    assert Visit(lock.use(for_documents=True)).is_inside()
    assert not Visit(lock.use(for_documents=True)).is_inside(0.05)
