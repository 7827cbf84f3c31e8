"""Images read, decoded and preprocessed by threads, ahead of the model.

The input is read lazily, some batches ahead. Threads of their own read files and headers, so that slow storage is not
waited for file by file; a window of images whose sizes are known is cut into batches of similar sizes; a worker decodes
and preprocesses a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cocoa_embed.encode.batches import BatchLimits, CountTokens, plan_batches
from cocoa_embed.encode.prepare import (
    REFUSALS,
    Batch,
    EmbeddedImage,
    Passenger,
    Prepare,
    StreamSource,
    examine,
    prepare_batch,
    refusal,
)
from cocoa_embed.errors import ImageError, printable

READERS = 8

MAX_BYTES_OF_BATCH = 128 * 2**20
"""Of the files of a batch, or of their pixels as RGB, whichever is more (128 MiB)."""

FIRST_WINDOW_BATCHES, WINDOW_BATCHES = 2, 4
"""Batches' worth of images that are sorted by size together; at first fewer, so that the workers soon have work."""


class Prefetcher:
    """Keeps some batches ready ahead of the model, and the images in the order of the input."""

    def __init__(
        self,
        images: Iterable[tuple[Any, StreamSource]],
        prepare: Prepare,
        count_tokens: CountTokens,
        *,
        batches_ahead: int,
        batch_size: int,
        batch_tokens: int,
        thumbnail_size: int | None,
    ) -> None:
        """Read nothing yet.

        :param prepare: Makes a model's inputs of images; several threads call it.
        :param batches_ahead: How many batches are to be ready, or on the way to it, besides the one in the model.
        :param thumbnail_size: The longest side of thumbnails, in pixels; None for no thumbnails.
        """
        self.batches_ahead = batches_ahead
        self.batch_tokens = batch_tokens
        self.prepare = prepare
        self.thumbnail_size = thumbnail_size
        self.ahead: deque[Future[Batch]] = deque()
        self.fault: Exception | None = None
        """What the input raised; all that came before it is embedded first."""
        self._images = iter(images)
        self._count_tokens = count_tokens
        self._batch_size = batch_size
        self._window_size = FIRST_WINDOW_BATCHES * batch_size
        self._max_images = (batches_ahead + 2 * WINDOW_BATCHES) * batch_size
        self._max_bytes = (batches_ahead + 2 * FIRST_WINDOW_BATCHES) * MAX_BYTES_OF_BATCH
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="cocoa-reader")
        self._line: deque[Passenger] = deque()
        self._examining: deque[tuple[Passenger, Future[None]]] = deque()
        self._window: list[Passenger] = []
        self._bytes_held = 0
        self._is_at_end = False

    @property
    def is_exhausted(self) -> bool:
        """Whether every image of the input has been given out."""
        return self._is_at_end and not self._line

    @property
    def is_all_prepared(self) -> bool:
        """Whether every image of the input is in a batch that is ready."""
        return self._is_at_end and not self._examining and not self._window and all(map(Future.done, self.ahead))

    def close(self) -> None:
        """End the readers."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    def advance(self, workers: Executor, *, wait: bool) -> None:
        """Read and plan until ``batches_ahead`` batches are on their way.

        :param workers: What decodes and preprocesses them.
        :param wait: Wait for files that are being read even if a batch is on its way already.
        """
        self.gather()
        while len(self.ahead) < self.batches_ahead:
            if self._is_time_to_plan():
                self._plan(workers)
            elif self._examining and (wait or not self.ahead):
                self._collect(*self._examining.popleft())
            else:
                return
            self.gather()

    def gather(self) -> None:
        """Read, and collect into the window the images whose sizes are known by now."""
        self._read()
        while self._examining and self._examining[0][1].done() and not self._is_window_full():
            self._collect(*self._examining.popleft())
            self._read()

    def settle(self, passenger: Passenger, outcome: EmbeddedImage | ImageError) -> None:
        """Set what becomes of an image, and let go of its bytes."""
        passenger.outcome = outcome
        passenger.source = None
        self._hold(passenger, 0)

    def finished(self) -> Iterator[tuple[Any, EmbeddedImage | ImageError]]:
        """Yield outcomes in the order of the input, up to the first image that has none yet."""
        while self._line and (outcome := self._line[0].outcome) is not None:
            yield self._line.popleft().key, outcome

    def _read(self) -> None:
        """Take images from the input while there is room, and have their sizes read."""
        while not self._is_at_end and len(self._examining) < 2 * self._batch_size and self._has_room():
            try:
                key, source = next(self._images)
            except StopIteration:
                self._is_at_end = True
            except Exception as error:  # noqa: BLE001 - raised again by the stream
                self._is_at_end, self.fault = True, error
            else:
                passenger = Passenger(key, printable(source if isinstance(source, str | Path) else str(key)), source)
                self._hold(passenger, len(source) if isinstance(source, bytes) else 0)
                self._line.append(passenger)
                self._examining.append((passenger, self._readers.submit(examine, passenger)))

    def _has_room(self) -> bool:
        return len(self._line) < self._max_images and self._bytes_held < self._max_bytes

    def _hold(self, passenger: Passenger, count: int) -> None:
        self._bytes_held += count - passenger.bytes_held
        passenger.bytes_held = count

    def _collect(self, passenger: Passenger, examining: Future[None]) -> None:
        """Put an image whose size is known into the window; wait for the size, if need be."""
        try:
            examining.result()
            passenger.tokens = self._count_tokens(passenger.width, passenger.height)
        except ImageError as error:
            self.settle(passenger, error)
        except REFUSALS as error:
            self.settle(passenger, refusal(passenger, error))
        else:
            content = len(passenger.source) if isinstance(passenger.source, bytes) else 0
            self._hold(passenger, max(content, passenger.cost.decoded_bytes))
            self._window.append(passenger)

    def _is_window_full(self) -> bool:
        held = sum(passenger.bytes_held for passenger in self._window)
        return len(self._window) >= self._window_size or held >= FIRST_WINDOW_BATCHES * MAX_BYTES_OF_BATCH

    def _is_time_to_plan(self) -> bool:
        """Tell whether the window is full, or cannot become so, or the workers would idle till it is."""
        if self._is_window_full():
            return True
        are_idle = all(map(Future.done, self.ahead))
        if self._examining:
            return are_idle and len(self._window) >= FIRST_WINDOW_BATCHES * self._batch_size
        return bool(self._window) and (are_idle or self._is_at_end)

    def _plan(self, workers: Executor) -> None:
        """Cut the window into batches and have them prepared."""
        window, self._window = self._window, []
        limits = BatchLimits(self._batch_size, self.batch_tokens, MAX_BYTES_OF_BATCH)
        for places in plan_batches([passenger.cost for passenger in window], limits):
            batch = [window[place] for place in places]
            self.ahead.append(workers.submit(prepare_batch, batch, self.prepare, self.thumbnail_size))
            if len(self.ahead) >= WINDOW_BATCHES:
                self._window_size = WINDOW_BATCHES * self._batch_size
