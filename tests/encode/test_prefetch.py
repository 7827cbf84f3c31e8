import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import colour_image
from PIL import Image

from cocoa_embed.encode import prefetch
from cocoa_embed.encode.prefetch import WINDOW_BATCHES, Prefetcher
from cocoa_embed.encode.prepare import EmbeddedImage, Passenger, StreamSource
from cocoa_embed.images.load import ImageError


def prepare(images: Sequence[Image.Image]) -> dict[str, Any]:
    return {"sizes": [image.size for image in images]}


def area(width: int, height: int) -> int:
    if width > 200 * height:
        raise ValueError("too long")
    return width * height


class Counted(Iterator[tuple[int, StreamSource]]):
    """An endless input that counts what was read of it; its images are of three sizes."""

    def __init__(self, side: int = 8) -> None:
        self.read = 0
        self.images = [colour_image("red", (side + grown, side)) for grown in range(3)]

    def __next__(self) -> tuple[int, StreamSource]:
        self.read += 1
        return self.read - 1, self.images[self.read % 3]


@pytest.fixture
def workers() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def prefetcher(images: Iterable[tuple[Any, StreamSource]], **changes: Any) -> Prefetcher:
    settings: dict[str, Any] = {"batches_ahead": 3, "batch_size": 4, "batch_tokens": 10_000, "thumbnail_size": None}
    return Prefetcher(images, prepare, area, **{**settings, **changes})


def settle_next(ahead: Prefetcher) -> list[Passenger]:
    """Let the next batch be embedded, and return its images."""
    batch = ahead.ahead.popleft().result()
    passengers = [passenger for piece in batch.pieces for passenger in piece.passengers]
    for passenger in passengers:
        ahead.settle(passenger, EmbeddedImage(np.zeros(1), passenger.width, passenger.height, passenger.mime, None))
    for passenger, error in batch.refused:
        ahead.settle(passenger, error)
    return passengers


def run(ahead: Prefetcher, workers: Executor, *, wait_for_files: bool = True) -> list[tuple[Any, Any]]:
    outcomes = []
    while not ahead.is_exhausted:
        ahead.advance(workers, wait=wait_for_files)
        if ahead.ahead:
            settle_next(ahead)
        outcomes += ahead.finished()
    ahead.close()
    return outcomes


@pytest.mark.parametrize("wait_for_files", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 50, 201])
def test_every_image_comes_out_once_in_the_order_of_the_input(
    workers: Executor, count: int, wait_for_files: bool
) -> None:
    counted = Counted()
    images = [next(counted) for _ in range(count)]
    outcomes = run(prefetcher(images), workers, wait_for_files=wait_for_files)
    assert [key for key, _ in outcomes] == list(range(count))
    assert [outcome.width for _, outcome in outcomes] == [source.width for _, source in images]


def test_nothing_is_read_before_it_is_asked_for() -> None:
    counted = Counted()
    prefetcher(counted)
    assert counted.read == 0


def test_an_endless_input_is_read_a_bounded_way_ahead(workers: Executor) -> None:
    counted, given = Counted(), 0
    ahead = prefetcher(counted)
    limit = (3 + 2 * WINDOW_BATCHES) * 4
    for _ in range(100):
        ahead.advance(workers, wait=True)
        assert 3 <= len(ahead.ahead) < 3 + WINDOW_BATCHES
        settle_next(ahead)
        given += sum(1 for _ in ahead.finished())
        assert counted.read - given <= limit
    assert given > 300
    ahead.close()


def test_the_bytes_on_their_way_are_bounded(workers: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few images that are; here a batch may hold two of them."""
    image = 3 * 102 * 100
    monkeypatch.setattr(prefetch, "MAX_BYTES_OF_BATCH", 2 * image)
    counted, given = Counted(side=100), 0
    ahead = prefetcher(counted, batch_tokens=10**6)
    for _ in range(50):
        ahead.advance(workers, wait=True)
        assert 1 <= len(settle_next(ahead)) <= 2
        given += sum(1 for _ in ahead.finished())
        being_examined = 2 * 4
        assert counted.read - given <= (3 + 4) * 2 + being_examined
    assert given > 50
    ahead.close()


def test_an_image_above_the_bound_goes_by_itself(workers: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "MAX_BYTES_OF_BATCH", 100)
    outcomes = run(prefetcher([(number, colour_image("red")) for number in range(9)]), workers)
    assert [key for key, _ in outcomes] == list(range(9))


def test_files_in_memory_count_where_they_are_larger_than_their_pixels(
    workers: Executor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    colour_image("red", (4, 4)).save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes() + bytes(10_000)
    monkeypatch.setattr(prefetch, "MAX_BYTES_OF_BATCH", 25_000)
    read = []

    def images() -> Iterator[tuple[int, bytes]]:
        for number in range(1000):
            read.append(number)
            yield number, data

    ahead = prefetcher(images())
    ahead.advance(workers, wait=True)
    assert len(read) <= 7 * 25_000 // 10_000 + 1
    ahead.close()


def test_images_of_similar_sizes_share_a_batch(workers: Executor) -> None:
    ahead = prefetcher(Counted())
    ahead.advance(workers, wait=True)
    while ahead.ahead:
        passengers = settle_next(ahead)
        assert max(p.width for p in passengers) - min(p.width for p in passengers) <= 1
    ahead.close()


def test_batches_are_bounded_by_tokens(workers: Executor) -> None:
    ahead = prefetcher(Counted(), batch_tokens=150)
    ahead.advance(workers, wait=True)
    while ahead.ahead:
        assert len(settle_next(ahead)) <= 2
    ahead.close()


def test_what_is_broken_or_of_a_size_that_is_refused_has_its_error_in_its_place(
    workers: Executor, tmp_path: Path
) -> None:
    images = [
        ("a", colour_image("red")),
        ("b", b"no image"),
        ("c", colour_image("red", (900, 2))),
        (7, tmp_path / "missing\n.png"),
        ("e", colour_image("red")),
    ]
    outcomes = dict(run(prefetcher(images), workers))
    assert list(outcomes) == ["a", "b", "c", 7, "e"]
    assert isinstance(outcomes["a"], EmbeddedImage)
    assert isinstance(outcomes["e"], EmbeddedImage)
    assert outcomes["b"].source == "b"
    assert "is not an image" in outcomes["b"].reason
    assert str(outcomes["c"]) == "c: cannot be embedded (too long)"
    assert "missing\\n.png" in outcomes[7].source
    assert outcomes[7].reason == "does not exist"


def test_an_input_of_nothing_but_errors_ends(workers: Executor) -> None:
    outcomes = run(prefetcher((number, b"no image") for number in range(500)), workers)
    assert len(outcomes) == 500
    assert all(isinstance(outcome, ImageError) for _, outcome in outcomes)


def test_what_the_input_raises_is_kept_until_the_rest_is_out(workers: Executor) -> None:
    def images() -> Iterator[tuple[int, Image.Image]]:
        yield from ((number, colour_image("red")) for number in range(10))
        raise OSError("the disk is gone")

    ahead = prefetcher(images())
    assert len(run(ahead, workers)) == 10
    assert str(ahead.fault) == "the disk is gone"


def test_files_are_not_waited_for_while_a_batch_is_ready(workers: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, examine = threading.Event(), prefetch.examine

    def examine_slowly(passenger: Passenger) -> None:
        if passenger.key >= 8:
            assert slow.wait(10)
        examine(passenger)

    monkeypatch.setattr(prefetch, "examine", examine_slowly)
    ahead = prefetcher(Counted())
    ahead.advance(workers, wait=False)
    assert 1 <= len(ahead.ahead) <= 2
    settle_next(ahead)
    if ahead.ahead:
        ahead.advance(workers, wait=False)
        assert len(ahead.ahead) == 1
    slow.set()
    ahead.advance(workers, wait=True)
    assert len(ahead.ahead) >= 3
    ahead.close()


def test_a_window_that_is_slow_to_fill_is_planned_only_when_the_workers_would_idle(
    workers: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, examine, go = threading.Event(), prefetch.examine, threading.Event()

    def examine_slowly(passenger: Passenger) -> None:
        assert passenger.key < 26 or slow.wait(10)
        examine(passenger)

    def prepare_slowly(images: Sequence[Image.Image]) -> dict[str, Any]:
        assert go.wait(10)
        return prepare(images)

    monkeypatch.setattr(prefetch, "examine", examine_slowly)
    ahead = prefetcher(Counted(), batches_ahead=9)
    ahead.prepare = prepare_slowly
    for _ in range(20):
        ahead.advance(workers, wait=False)
        time.sleep(0.01)
    assert len(ahead.ahead) == 4  # two windows of two batches; the third, of four, has ten images of sixteen
    go.set()
    wait(ahead.ahead)
    ahead.advance(workers, wait=False)
    assert len(ahead.ahead) == 4 + 3
    slow.set()
    ahead.close()


def test_images_that_are_all_broken_are_not_read_without_end(workers: Executor) -> None:
    read = []

    def images() -> Iterator[tuple[int, StreamSource]]:
        yield from ((number, colour_image("red")) for number in range(8))
        for number in range(100_000):
            read.append(number)
            yield number, b"no image"

    ahead = prefetcher(images())
    for _ in range(20):
        ahead.advance(workers, wait=False)
        time.sleep(0.01)
    assert len(read) < 100
    ahead.close()


def test_when_all_is_prepared_it_says_so(workers: Executor) -> None:
    ahead = prefetcher([(number, colour_image("red")) for number in range(6)])
    assert not ahead.is_all_prepared
    ahead.advance(workers, wait=True)
    wait(ahead.ahead)
    assert ahead.is_all_prepared
    assert not ahead.is_exhausted


def test_what_an_image_held_is_dropped_with_its_outcome(workers: Executor) -> None:
    ahead = prefetcher(Counted())
    ahead.advance(workers, wait=True)
    for passenger in settle_next(ahead):
        assert passenger.source is None
        assert passenger.bytes_held == 0
    ahead.close()
