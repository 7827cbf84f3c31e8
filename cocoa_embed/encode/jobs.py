"""One image of a stream: its source, what is known of it, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from cocoa_embed.encode.batches import CountTokens, ImageCost
from cocoa_embed.errors import ImageError, one_line
from cocoa_embed.images.load import image_size, read_stable_file

StreamSource: TypeAlias = bytes | str | Path | Image.Image

REFUSALS = (ValueError, RuntimeError, ArithmeticError, MemoryError)
"""What image processors and models raise for an image, or a batch, that they cannot take."""

UNMEASURED = ImageCost(0, 0, 0)

UNKNOWN_MIME = "application/octet-stream"


@dataclass(frozen=True)
class EmbeddedImage:
    """An image that was embedded."""

    vector: np.ndarray
    """Shape ``(dimension,)``, float32."""
    width: int
    """In pixels, upright, before any resizing; so is ``height``."""
    height: int
    mime: str
    thumbnail: bytes | None
    """A JPEG, if the caller wants one."""


@dataclass(eq=False)
class ImageJob:
    """An image to embed. Each step of the stream fills in what it finds out."""

    key: Any
    name: str
    """The name of the image in errors."""
    source: StreamSource | None
    """As given; a file's bytes once it is measured; None once there is an outcome."""
    cost: ImageCost = UNMEASURED
    mime: str = UNKNOWN_MIME
    thumbnail: bytes | None = None
    outcome: EmbeddedImage | ImageError | None = None

    @property
    def bytes_held(self) -> int:
        """The bytes of the file in memory or of the decoded image, whichever is more."""
        return max(len(self.source) if isinstance(self.source, bytes) else 0, self.cost.decoded_bytes)

    def finish(self, outcome: EmbeddedImage | ImageError) -> None:
        """Set the outcome and release the image's bytes."""
        self.outcome = outcome
        self.source = None

    def refuse(self, error: Exception) -> None:
        """Finish with the error of a processor or a model that does not take the image."""
        self.finish(ImageError(self.name, f"cannot be embedded ({one_line(error)})"))


def measure(job: ImageJob, count_tokens: CountTokens) -> None:
    """Read a job's file and the size of its image from the header; finish the job if the image cannot be used."""
    source = job.source
    try:
        if isinstance(source, Image.Image):
            width, height = source.size
        else:
            assert source is not None, "a job is measured before it is finished"
            job.source = source if isinstance(source, bytes) else read_stable_file(source).data
            width, height = image_size(job.source, job.name)
        job.cost = ImageCost(count_tokens(width, height), width, height)
    except ImageError as error:
        job.finish(error)
    except REFUSALS as error:
        job.refuse(error)
