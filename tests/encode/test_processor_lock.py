import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from cocoa_embed.encode.processor_lock import ProcessorLock


class Visit:
    """A thread's stay in a section."""

    def __init__(self, section: AbstractContextManager[None]) -> None:
        self._inside, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._stay, args=(section,))
        self._thread.start()

    def _stay(self, section: AbstractContextManager[None]) -> None:
        with section:
            self._inside.set()
            assert self._leave.wait(10)

    def is_inside(self, seconds: float = 5.0) -> bool:
        return self._inside.wait(seconds)

    def end(self) -> None:
        self._leave.set()
        self._thread.join()


@pytest.fixture
def visit() -> Iterator[Callable[[AbstractContextManager[None]], Visit]]:
    visits: list[Visit] = []

    def begin(section: AbstractContextManager[None]) -> Visit:
        visits.append(Visit(section))
        return visits[-1]

    yield begin
    for each in visits:
        each.end()


@pytest.fixture
def lock() -> ProcessorLock:
    """A lock whose processor is set for documents."""
    lock = ProcessorLock()
    with lock.for_documents():
        pass
    return lock


def test_documents_run_together_after_the_first(visit: Callable[..., Visit]) -> None:
    lock = ProcessorLock()
    first = visit(lock.for_documents())
    assert first.is_inside()
    second, third = visit(lock.for_documents()), visit(lock.for_documents())
    assert not second.is_inside(0.05)
    first.end()
    assert second.is_inside()
    assert third.is_inside()


def test_a_query_runs_alone_after_the_documents_before_it(lock: ProcessorLock, visit: Callable[..., Visit]) -> None:
    document = visit(lock.for_documents())
    assert document.is_inside()
    query = visit(lock.alone())
    assert not query.is_inside(0.05)
    late = visit(lock.for_documents())
    assert not late.is_inside(0.05), "documents do not overtake a waiting query"
    document.end()
    assert query.is_inside()
    assert not late.is_inside(0.05)
    query.end()
    assert late.is_inside()
    assert not visit(lock.for_documents()).is_inside(0.05), "the first documents after a query run alone"


def test_queries_run_one_at_a_time(lock: ProcessorLock, visit: Callable[..., Visit]) -> None:
    first = visit(lock.alone())
    assert first.is_inside()
    second = visit(lock.alone())
    assert not second.is_inside(0.05)
    first.end()
    assert second.is_inside()


def test_documents_that_are_refused_leave_the_processor_unset(visit: Callable[..., Visit]) -> None:
    lock = ProcessorLock()
    with pytest.raises(KeyError), lock.for_documents():
        raise KeyError
    assert visit(lock.for_documents()).is_inside()
    assert not visit(lock.for_documents()).is_inside(0.05)
