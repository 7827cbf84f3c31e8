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
    with lock.for_documents():
        pass
    return lock


def test_documents_run_together_after_the_first() -> None:
    lock = ProcessorLock()
    first = Visit(lock.for_documents())
    assert first.is_inside()
    second, third = Visit(lock.for_documents()), Visit(lock.for_documents())
    assert not second.is_inside(0.05)
    first.end()
    assert second.is_inside()
    assert third.is_inside()


def test_queries_run_alone_in_turn_with_documents(lock: ProcessorLock) -> None:
    document = Visit(lock.for_documents())
    assert document.is_inside()
    query = Visit(lock.alone())
    assert not query.is_inside(0.05)
    late = Visit(lock.for_documents())
    assert not late.is_inside(0.05), "documents do not overtake a waiting query"
    document.end()
    assert query.is_inside()
    assert not late.is_inside(0.05)
    query.end()
    assert late.is_inside()
    assert not Visit(lock.for_documents()).is_inside(0.05), "the first documents after a query run alone"


def test_queries_run_one_at_a_time(lock: ProcessorLock) -> None:
    assert Visit(lock.alone()).is_inside()
    assert not Visit(lock.alone()).is_inside(0.05)


def test_documents_that_are_refused_leave_the_processor_unset() -> None:
    lock = ProcessorLock()
    with pytest.raises(KeyError), lock.for_documents():
        raise KeyError
    assert Visit(lock.for_documents()).is_inside()
    assert not Visit(lock.for_documents()).is_inside(0.05)
