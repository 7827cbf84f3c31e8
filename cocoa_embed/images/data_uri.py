"""Write an image as a ``data:`` URI, for pages and records that consist of a single file."""

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

LARGEST_SIDE = 384
"""Longest side in pixels; larger images are scaled down."""

LOSSLESS_PIXELS = 128 * 128
"""Images of at most this many pixels are always PNG."""

JPEG_QUALITY = 88


def data_uri(image: "Image.Image") -> str:
    """Return ``image`` as a ``data:`` URI: PNG, or JPEG for larger images where that is smaller, as for photographs."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    encoded: dict[str, bytes] = {}
    for kind in ("png", "jpeg") if image.width * image.height > LOSSLESS_PIXELS else ("png",):
        buffer = io.BytesIO()
        image.save(buffer, kind, optimize=True, quality=JPEG_QUALITY)
        encoded[kind] = buffer.getvalue()
    smallest = min(encoded, key=lambda kind: len(encoded[kind]))
    return f"data:image/{smallest};base64,{base64.b64encode(encoded[smallest]).decode('ascii')}"
