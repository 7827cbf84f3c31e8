"""What is done to an image before the model sees it: read, measured, decoded, preprocessed with others of its size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from cocoa_embed.encode.batches import ImageCost
from cocoa_embed.encode.document_model import Features
from cocoa_embed.errors import ImageError, one_line
from cocoa_embed.images.load import decode_image, image_size, load_image, read_image_bytes
from cocoa_embed.images.to_rgb import draw_thumbnail

StreamSource: TypeAlias = bytes | str | Path | Image.Image
Prepare: TypeAlias = Callable[[Sequence[Image.Image]], Features]

REFUSALS = (ValueError, RuntimeError, ArithmeticError, MemoryError)
"""What image processors and models raise for an image, or a batch, that they cannot take."""

UNKNOWN_MIME = "application/octet-stream"


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


@dataclass(eq=False)
class Passenger:
    """An image on its way through the stream; every step fills in what it learns."""

    key: Any
    name: str
    """What errors call it."""
    source: StreamSource | None
    """As given; when it is examined, the bytes of a file; None when there is an outcome."""
    bytes_held: int = 0
    """Of the file and of the pixels."""
    width: int = 0
    height: int = 0
    tokens: int = 0
    mime: str = UNKNOWN_MIME
    thumbnail: bytes | None = None
    outcome: EmbeddedImage | ImageError | None = None

    @property
    def cost(self) -> ImageCost:
        """What a batch has to know of it."""
        return ImageCost(self.tokens, self.width, self.height)


@dataclass(frozen=True, eq=False)
class Piece:
    """Images that go through the model at once."""

    passengers: Sequence[Passenger]
    features: Features

    @property
    def tokens(self) -> int:
        """Visual tokens, with those that pad shorter images to the longest."""
        return len(self.passengers) * max(passenger.tokens for passenger in self.passengers)


@dataclass(eq=False)
class Batch:
    """What became of a planned batch: one piece, or more where the processor refused it as a whole, and the refused."""

    pieces: list[Piece] = field(default_factory=list)
    refused: list[tuple[Passenger, ImageError]] = field(default_factory=list)
    seconds: float = 0.0
    """The time of one core that it took."""


def examine(passenger: Passenger) -> None:
    """Read a file, and the size of the image from its header.

    :raises ImageError: If it cannot be read, is no image, or is above the limits.
    """
    source = passenger.source
    if isinstance(source, Image.Image):
        passenger.width, passenger.height = source.size
    elif source is not None:
        passenger.source = source if isinstance(source, bytes) else read_image_bytes(source)
        passenger.width, passenger.height = image_size(passenger.source, passenger.name)


def prepare_batch(passengers: Sequence[Passenger], prepare: Prepare, thumbnail_size: int | None) -> Batch:
    """Decode and preprocess images, all of them but those that turn out to be broken.

    :param prepare: Makes a model's inputs of images.
    :param thumbnail_size: The longest side of thumbnails, in pixels; None for no thumbnails.
    """
    started = time.thread_time()
    batch = Batch()
    decoded: list[tuple[Passenger, Image.Image]] = []
    for passenger in passengers:
        try:
            decoded.append((passenger, decode(passenger, thumbnail_size)))
        except ImageError as error:
            batch.refused.append((passenger, error))
    if decoded:
        preprocess(decoded, prepare, batch)
    batch.seconds = time.thread_time() - started
    return batch


def decode(passenger: Passenger, thumbnail_size: int | None) -> Image.Image:
    """Return an image as upright RGB; note its size, its media type and its thumbnail.

    :raises ImageError: If it is broken.
    """
    source = passenger.source
    if isinstance(source, Image.Image):
        image, mime = load_image(source), Image.MIME.get(source.format or "", UNKNOWN_MIME)
    else:
        assert isinstance(source, bytes), "an image is decoded before it was examined"
        image, mime = decode_image(source, passenger.name)
    passenger.width, passenger.height = image.size
    passenger.mime = mime
    if thumbnail_size is not None:
        passenger.thumbnail = draw_thumbnail(image, thumbnail_size)
    return image


def preprocess(decoded: Sequence[tuple[Passenger, Image.Image]], prepare: Prepare, batch: Batch) -> None:
    """Preprocess images together; if the processor refuses them, in halves, until it is known which ones it refuses."""
    try:
        features = prepare([image for _, image in decoded])
    except REFUSALS as error:
        if len(decoded) == 1:
            batch.refused.append((decoded[0][0], refusal(decoded[0][0], error)))
    else:
        batch.pieces.append(Piece([passenger for passenger, _ in decoded], features))
        return
    if len(decoded) > 1:
        middle = len(decoded) // 2
        preprocess(decoded[:middle], prepare, batch)
        preprocess(decoded[middle:], prepare, batch)


def refusal(passenger: Passenger, error: Exception) -> ImageError:
    """Return the error of an image that the model does not take."""
    return ImageError(passenger.name, f"cannot be embedded ({one_line(error)})")
