import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.stores.base import Point
from cocoa_embed.integrations.qdrant.writer import Writer


class SlowStore:
    """Takes a moment to store, notes what it was given, and fails at a group of the test's choice."""

    def __init__(self, parallel: int = 1, fails_at: int | None = None) -> None:
        self.parallel = parallel
        self.groups: list[list[str]] = []
        self.at_once = 0
        self.most_at_once = 0
        self._fails_at = fails_at
        self._lock = threading.Lock()

    def upsert(self, points: Sequence[Point]) -> None:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.01)
        with self._lock:
            self.at_once -= 1
            if len(self.groups) == self._fails_at:
                raise CocoaError("the disk is full")
            self.groups.append([point.id for point in points])


def points(count: int) -> list[Point]:
    return [Point(str(number), np.zeros(2, np.float32), {}) for number in range(count)]


@pytest.mark.parametrize("parallel", [1, 3])
def test_every_point_is_stored_once_by_as_many_threads_as_the_store_allows(parallel: int) -> None:
    store = SlowStore(parallel)
    with Writer(store, points_at_once=4) as writer:
        for point in points(50):
            writer.add(point)
    assert sorted(map(len, store.groups)) == [2, *[4] * 12]
    assert sorted((id_ for group in store.groups for id_ in group), key=int) == [str(number) for number in range(50)]
    assert store.most_at_once == parallel


def test_a_store_that_is_slower_than_the_model_holds_it_up() -> None:
    store = SlowStore()
    with Writer(store, points_at_once=1) as writer:
        for number, point in enumerate(points(20)):
            writer.add(point)
            assert number + 1 - len(store.groups) <= 4


def test_a_failure_stops_the_writing_and_is_raised() -> None:
    store = SlowStore(fails_at=2)

    def write() -> None:
        with Writer(store, points_at_once=1) as writer:
            for point in points(50):
                writer.add(point)

    with pytest.raises(CocoaError, match="disk is full"):
        write()
    assert 2 <= len(store.groups) <= 6


def test_a_failure_of_the_last_group_is_raised_on_leaving() -> None:
    with pytest.raises(CocoaError, match="disk is full"), Writer(SlowStore(fails_at=0)) as writer:
        writer.add(points(1)[0])


def test_an_error_on_its_way_is_not_hidden_and_nothing_more_is_stored() -> None:
    store = SlowStore()

    def write() -> None:
        with Writer(store) as writer:
            writer.add(points(1)[0])
            raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        write()
    assert store.groups == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cocoa-embed-writer")]
