import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant import writer
from cocoa_embed.integrations.qdrant.stores.base import Point
from cocoa_embed.integrations.qdrant.writer import Writer


class SharedStore:
    """Waits until ``parallel`` threads write at once, and fails at batch ``fails_at``."""

    def __init__(self, parallel: int = 1, fails_at: int | None = None) -> None:
        self.parallel = parallel
        self.batches: list[list[str]] = []
        self.active = 0
        self.most_active = 0
        self._fails_at = fails_at
        self._changed = threading.Condition()

    def upsert(self, points: Sequence[Point]) -> None:
        with self._changed:
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most_active >= self.parallel, timeout=60)
            self.active -= 1
            if len(self.batches) == self._fails_at:
                raise CocoaError("the disk is full")
            self.batches.append([point.id for point in points])


def write(store: SharedStore, count: int, then: Callable[[int], None] = lambda written: None) -> None:
    with Writer(store) as writer:  # type: ignore[arg-type]
        for number in range(count):
            writer.add(Point(str(number), np.zeros(2, np.float32), {}))
            then(number + 1)


@pytest.mark.parametrize("parallel", [1, 3])
def test_every_point_is_stored_once_by_as_many_threads_as_the_store_allows(
    parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BATCH_POINTS", 4)
    store = SharedStore(parallel)
    write(store, 50)
    assert sorted(map(len, store.batches)) == [2, *[4] * 12]
    assert sorted(int(id_) for batch in store.batches for id_ in batch) == list(range(50))
    assert store.most_active == parallel


def test_a_slow_store_delays_the_model_and_its_failure_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BATCH_POINTS", 1)
    store = SharedStore(fails_at=10)

    def check(written: int) -> None:
        assert written - len(store.batches) <= 5

    with pytest.raises(CocoaError, match="disk is full"):
        write(store, 50, check)
    assert 10 <= len(store.batches) <= 14
    with pytest.raises(CocoaError, match="disk is full"):
        write(SharedStore(fails_at=0), 1)


def test_an_exception_is_raised_and_nothing_more_is_stored() -> None:
    def fail(written: int) -> None:
        raise RuntimeError("the model broke")

    store = SharedStore()
    with pytest.raises(RuntimeError, match="the model broke"):
        write(store, 1, fail)
    assert store.batches == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cocoa-embed-writer")]
