import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant import writer
from cocoa_embed.integrations.qdrant.stores.base import Point


class SharedStore:
    """Waits until ``parallel`` threads write at once, and fails at batch ``fails_at``."""

    def __init__(self, parallel: int = 1, fails_at: int | None = None) -> None:
        self.parallel = parallel
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self._fails_at = fails_at
        self._barrier = threading.Barrier(parallel)

    def upsert(self, points: Sequence[Point]) -> None:
        self.threads.add(threading.get_ident())
        self._barrier.wait(60)
        if len(self.batches) == self._fails_at:
            raise CocoaError("the disk is full")
        self.batches.append([point.id for point in points])


def points(count: int, store: SharedStore) -> Iterator[Point]:
    """Yield points, which must not be far ahead of those stored."""
    for number in range(count):
        yield Point(str(number), np.zeros(2, np.float32), {})
        assert number - sum(map(len, store.batches)) < 5 * writer.BATCH_POINTS * store.parallel


@pytest.mark.parametrize("parallel", [1, 3])
def test_every_point_is_stored_once_by_as_many_threads_as_the_store_allows(
    parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BATCH_POINTS", 4)
    store = SharedStore(parallel)
    writer.write_points(store, points(46, store))
    assert sorted(map(len, store.batches)) == [2, *[4] * 11]
    assert sorted(int(id_) for batch in store.batches for id_ in batch) == list(range(46))
    assert len(store.threads) == parallel


@pytest.mark.parametrize(("fails_at", "count"), [(10, 50), (0, 1)])
def test_a_failure_of_the_store_is_raised_soon(fails_at: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BATCH_POINTS", 1)
    store = SharedStore(fails_at=fails_at)
    with pytest.raises(CocoaError, match="disk is full"):
        writer.write_points(store, points(count, store))
    assert fails_at <= len(store.batches) <= fails_at + 4


def test_an_exception_is_raised_and_nothing_more_is_stored() -> None:
    def broken() -> Iterator[Point]:
        yield from points(1, store)
        raise RuntimeError("the model broke")

    store = SharedStore()
    with pytest.raises(RuntimeError, match="the model broke"):
        writer.write_points(store, broken())
    assert store.batches == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cocoa-embed-writer")]
