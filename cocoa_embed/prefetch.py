"""Images read, decoded and preprocessed by threads, ahead of the model.

The input is read lazily: a few hundred images, or :data:`MAX_BYTES_AHEAD`, are on their way at once. Their headers tell
their sizes, a window of them is cut into batches of similar sizes, every image of a batch is decoded by a task of its
own, and one more task preprocesses the batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from cocoa_embed.errors import ImageError, one_line, printable
from cocoa_embed.forward import Features
from cocoa_embed.images import decode_image, image_size, load_image, read_image_bytes
from cocoa_embed.pixels import draw_thumbnail
from cocoa_embed.visual_tokens import BatchLimits, CountTokens, ImageCost, plan_batches

StreamSource: TypeAlias = bytes | str | Path | Image.Image
Prepare: TypeAlias = Callable[[Sequence[Image.Image]], Features]

MAX_BYTES_AHEAD = 2**30
"""Of files in memory, and of the pixels that they hold, for all images on their way at once (1 GiB)."""

MAX_BYTES_OF_BATCH = MAX_BYTES_AHEAD // 4

WINDOW_BATCHES = 4
"""Batches' worth of images that are sorted by size together."""

READERS = 8
"""Threads that read files and headers, so that slow storage is not waited for file by file."""

REFUSALS = (ValueError, RuntimeError, ArithmeticError, MemoryError)
"""What image processors and models raise for an image, or a batch, that they cannot take."""


@dataclass(frozen=True)
class EmbeddedImage:
    """What the stream gives for an image that could be used."""

    vector: np.ndarray
    """Shape ``(dimension,)``, float32."""
    width: int
    """In pixels, upright, before any resizing; so is ``height``."""
    height: int
    mime: str
    thumbnail: bytes | None
    """A JPEG, if asked for."""


@dataclass(frozen=True)
class Examined:
    """The bytes of a file, or a PIL image as given, with the upright size that its header tells."""

    content: bytes | Image.Image
    width: int
    height: int


@dataclass(frozen=True)
class Decoded:
    """An upright RGB image, and what its file was."""

    image: Image.Image
    mime: str
    thumbnail: bytes | None
    seconds: float
    """The time of one core that decoding took."""


@dataclass(eq=False)
class Passenger:
    """An image on its way through the stream."""

    key: Any
    name: str
    """What errors call it."""
    bytes_held: int
    """Of its file and its pixels, until there is an outcome."""
    tokens: int = 0
    """Known when its header is read."""
    outcome: EmbeddedImage | ImageError | None = None


Member: TypeAlias = tuple[Passenger, Decoded]


@dataclass(eq=False)
class Piece:
    """Images that go through the model at once."""

    members: list[Member]
    features: Features

    @property
    def tokens(self) -> int:
        """Visual tokens, with those that pad shorter images to the longest."""
        return len(self.members) * max(passenger.tokens for passenger, _ in self.members)


@dataclass(eq=False)
class Batch:
    """What became of a planned batch: one piece, or more where the processor refused it as a whole, and the refused."""

    pieces: list[Piece] = field(default_factory=list)
    refused: list[tuple[Passenger, ImageError]] = field(default_factory=list)
    seconds: float = 0.0
    """The time of one core that decoding and preprocessing took."""


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
        self.ahead: deque[Future[Batch]] = deque()
        self.fault: Exception | None = None
        """What the input raised; all that came before it is embedded first."""
        self._images = iter(images)
        self._prepare = prepare
        self._count_tokens = count_tokens
        self._batch_size = batch_size
        self._window_size = WINDOW_BATCHES * batch_size
        self._max_images = batches_ahead * batch_size + 2 * self._window_size
        self._thumbnail_size = thumbnail_size
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="cocoa-reader")
        self._line: deque[Passenger] = deque()
        self._examining: deque[tuple[Passenger, Future[Examined]]] = deque()
        self._window: list[tuple[Passenger, Examined]] = []
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
        :param wait: Wait for files that are being read even if a batch is on its way already. The batches are then
            prepared so that all are ready soonest, otherwise so that the first is.
        """
        self._gather()
        while len(self.ahead) < self.batches_ahead:
            is_last_window = not self._examining and (self._is_at_end or not self.ahead)
            if self._is_window_full() or (self._window and is_last_window):
                self._plan(workers, all_at_once=wait)
            elif self._examining and (wait or not self.ahead):
                self._collect(*self._examining.popleft())
            else:
                return
            self._gather()

    def settle(self, passenger: Passenger, outcome: EmbeddedImage | ImageError) -> None:
        """Set what becomes of an image, and let go of its bytes."""
        passenger.outcome = outcome
        self._hold(passenger, -passenger.bytes_held)

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
                name = printable(source if isinstance(source, str | Path) else str(key))
                passenger = Passenger(key, name, bytes_held=0)
                self._hold(passenger, len(source) if isinstance(source, bytes) else 0)
                self._line.append(passenger)
                self._examining.append((passenger, self._readers.submit(examine, source, name)))

    def _has_room(self) -> bool:
        return len(self._line) < self._max_images and self._bytes_held < MAX_BYTES_AHEAD

    def _hold(self, passenger: Passenger, change: int) -> None:
        passenger.bytes_held += change
        self._bytes_held += change

    def _gather(self) -> None:
        """Read, and collect images into the window whose sizes are known by now."""
        self._read()
        while self._examining and self._examining[0][1].done() and not self._is_window_full():
            self._collect(*self._examining.popleft())
            self._read()

    def _collect(self, passenger: Passenger, examining: Future[Examined]) -> None:
        """Put an image whose size is known into the window; wait for the size, if need be."""
        try:
            examined = examining.result()
            tokens = self._count_tokens(examined.width, examined.height)
        except ImageError as error:
            self.settle(passenger, error)
        except REFUSALS as error:
            self.settle(passenger, refusal(passenger.name, error))
        else:
            passenger.tokens = tokens
            content = len(examined.content) if isinstance(examined.content, bytes) else 0
            self._hold(passenger, content + cost(passenger, examined).decoded_bytes - passenger.bytes_held)
            self._window.append((passenger, examined))

    def _is_window_full(self) -> bool:
        held = sum(passenger.bytes_held for passenger, _ in self._window)
        return len(self._window) >= self._window_size or held >= MAX_BYTES_OF_BATCH

    def _plan(self, workers: Executor, *, all_at_once: bool) -> None:
        """Cut the window into batches and have them decoded and preprocessed."""
        window, self._window = self._window, []
        limits = BatchLimits(self._batch_size, self.batch_tokens, MAX_BYTES_OF_BATCH)
        plan = plan_batches([cost(*waiting) for waiting in window], limits)
        batches = [[window[place] for place in places] for places in plan]
        decoding = ([self._decode(workers, *waiting) for waiting in batch] for batch in batches)
        for batch, images in zip(batches, list(decoding) if all_at_once else decoding, strict=True):
            passengers = [passenger for passenger, _ in batch]
            self.ahead.append(workers.submit(prepare_batch, passengers, images, self._prepare))

    def _decode(self, workers: Executor, passenger: Passenger, examined: Examined) -> Future[Decoded | ImageError]:
        return workers.submit(decode, examined, passenger.name, self._thumbnail_size)


def cost(passenger: Passenger, examined: Examined) -> ImageCost:
    """Return what a batch has to know of an image."""
    return ImageCost(passenger.tokens, examined.width, examined.height)


def examine(source: StreamSource, name: str) -> Examined:
    """Read a file's bytes, and the size of the image that its header tells.

    :raises ImageError: If it cannot be read, is no image, or is above the limits.
    """
    if isinstance(source, Image.Image):
        return Examined(source, source.width, source.height)
    data = source if isinstance(source, bytes) else read_image_bytes(source)
    return Examined(data, *image_size(data, name))


def decode(examined: Examined, name: str, thumbnail_size: int | None) -> Decoded | ImageError:
    """Decode an image, and draw its thumbnail, if ``thumbnail_size`` says how long its longest side is to be."""
    started = time.thread_time()
    content = examined.content
    try:
        if isinstance(content, Image.Image):
            image, mime = load_image(content), Image.MIME.get(content.format or "")
        else:
            image, mime = decode_image(content, name)
    except ImageError as error:
        return error
    thumbnail = None if thumbnail_size is None else draw_thumbnail(image, thumbnail_size)
    return Decoded(image, mime or "application/octet-stream", thumbnail, time.thread_time() - started)


def prepare_batch(
    passengers: Sequence[Passenger], decoding: Sequence[Future[Decoded | ImageError]], prepare: Prepare
) -> Batch:
    """Preprocess the images of a batch, when they are decoded, without those that turn out to be broken."""
    batch = Batch()
    members: list[Member] = []
    for passenger, future in zip(passengers, decoding, strict=True):
        # Tasks begin in the order of their submission: what is waited for here has begun.
        decoded = future.result()
        if isinstance(decoded, ImageError):
            batch.refused.append((passenger, decoded))
        else:
            members.append((passenger, decoded))
            batch.seconds += decoded.seconds
    started = time.thread_time()
    prepare_members(members, prepare, batch)
    batch.seconds += time.thread_time() - started
    return batch


def prepare_members(members: list[Member], prepare: Prepare, batch: Batch) -> None:
    """Preprocess images together; if the processor refuses them, in halves, until it is known which ones it refuses."""
    if not members:
        return
    try:
        batch.pieces.append(Piece(members, prepare([decoded.image for _, decoded in members])))
        return
    except REFUSALS as error:
        reason = refusal(members[0][0].name, error)
    if len(members) == 1:
        batch.refused.append((members[0][0], reason))
    for half in halves(members):
        prepare_members(half, prepare, batch)


def halves(members: list[Member]) -> list[list[Member]]:
    """Return the two halves of a list; nothing of a list of one."""
    middle = len(members) // 2
    return [members[:middle], members[middle:]] if middle else []


def refusal(name: str, error: Exception) -> ImageError:
    """Return the error of an image that the model does not take."""
    return ImageError(name, f"cannot be embedded ({one_line(error)})")
