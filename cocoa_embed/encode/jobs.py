"""One image of a stream: read, measured, decoded, and finished with an embedding or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from cocoa_embed.encode.batches import CountTokens, ImageCost
from cocoa_embed.errors import ImageError, TransientImageError, one_line
from cocoa_embed.images.load import decode_image, image_size, load_image, read_stable_file
from cocoa_embed.images.to_rgb import draw_thumbnail

ModelInput: TypeAlias = Mapping[str, "str | Image.Image"]
"""A ``text``, an ``image``, or both."""


class CaptionedImage(NamedTuple):
    """An image file that is embedded together with a text."""

    data: bytes
    text: str


StreamSource: TypeAlias = bytes | str | Path | Image.Image | CaptionedImage

BYTES_PER_TOKEN = 3
"""UTF-8 bytes per token of a text: a low estimate, so that the tokens of a batch are not underestimated."""

REFUSALS = (ValueError, RuntimeError, ArithmeticError, MemoryError)
"""The errors of image processors and models for an image, or a batch, that they cannot take."""

UNMEASURED = ImageCost(0, 0, 0)

UNKNOWN_MIME = "application/octet-stream"


@dataclass(frozen=True)
class EmbeddedImage:
    """An image that was embedded."""

    vector: np.ndarray
    """Shape ``(dimension,)``, or ``(vectors, dimension)`` from an encoder that returns several; float32."""
    width: int
    """In pixels, of the upright image before any resizing; so is ``height``."""
    height: int
    mime: str
    thumbnail: bytes | None
    """A JPEG, if the caller asked for one."""


@dataclass(eq=False)
class ImageJob:
    """An image to embed. Each step of the stream sets the fields that it knows."""

    key: Any
    name: str
    """The name of the image in errors."""
    source: bytes | str | Path | Image.Image | None
    """As given; a file's bytes once it is measured; None once there is an outcome."""
    text: str | None = None
    cost: ImageCost = UNMEASURED
    mime: str = UNKNOWN_MIME
    thumbnail: bytes | None = None
    outcome: EmbeddedImage | ImageError | None = None

    @property
    def bytes_held(self) -> int:
        """The bytes of the file in memory or of the decoded image: the larger of the two."""
        return max(len(self.source) if isinstance(self.source, bytes) else 0, self.cost.decoded_bytes)

    def finish(self, outcome: EmbeddedImage | ImageError) -> None:
        """Set the outcome and release the image's bytes."""
        self.outcome = outcome
        self.source = None

    def refuse(self, error: Exception) -> None:
        """Finish with the error of a processor or a model that does not accept the image."""
        is_lasting = isinstance(error, (ValueError, ArithmeticError))
        kind = ImageError if is_lasting else TransientImageError
        self.finish(kind(self.name, f"cannot be embedded ({one_line(error)})"))


def measure(job: ImageJob, count_tokens: CountTokens) -> None:
    """Read a job's file and the size of its image from the header; finish the job if the image cannot be used."""
    source = job.source
    try:
        if isinstance(source, Image.Image):
            width, height = source.size
        else:
            assert source is not None, "a job is measured before it is finished"
            job.source = source if isinstance(source, bytes) else read_stable_file(source)
            width, height = image_size(job.source, job.name)
        text_tokens = len(job.text.encode()) // BYTES_PER_TOKEN if job.text else 0
        job.cost = ImageCost(count_tokens(width, height) + text_tokens, width, height)
    except ImageError as error:
        job.finish(error)
    except REFUSALS as error:
        job.refuse(error)


def decode(job: ImageJob, thumbnail_size: int | None) -> Image.Image:
    """Return a measured job's image as upright RGB; set its media type, thumbnail and exact size.

    :param thumbnail_size: The longest side of the thumbnail, in pixels; None for no thumbnail.
    :raises ImageError: If the image is broken.
    """
    source = job.source
    if isinstance(source, Image.Image):
        image, job.mime = load_image(source), Image.MIME.get(source.format or "", UNKNOWN_MIME)
    else:
        assert isinstance(source, bytes), "a job is measured before it is decoded"
        image, job.mime = decode_image(source, job.name)
    job.cost = job.cost._replace(width=image.width, height=image.height)
    if thumbnail_size is not None:
        job.thumbnail = draw_thumbnail(image, thumbnail_size)
    return image
