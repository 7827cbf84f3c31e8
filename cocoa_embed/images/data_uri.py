"""Write an image as a ``data:`` URI, for pages and records that are one file."""

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

LARGEST_SIDE = 384
"""Longest side in pixels; larger images are scaled down."""

LOSSLESS_PIXELS = 128 * 128
"""Images of at most this many pixels keep their exact colours."""


def data_uri(image: "Image.Image", largest_side: int = LARGEST_SIDE) -> str:
    """Return ``image`` as a ``data:`` URI of WebP, lossless for small images."""
    image = image.convert("RGB")
    image.thumbnail((largest_side, largest_side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=image.width * image.height <= LOSSLESS_PIXELS, quality=88)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
