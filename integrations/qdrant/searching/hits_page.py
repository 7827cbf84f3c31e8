"""Write the hits of a search as one HTML page that needs no other file."""

import base64
import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from cocoa_embed.errors import CocoaError, ImageError, printable
from cocoa_embed.images.load import load_image
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.indexing.thumbnails import THUMBNAIL_SIZE
from cocoa_embed.integrations.qdrant.points import stored_locations
from cocoa_embed.integrations.qdrant.stores.base import Hit
from cocoa_embed.report.html import render

WORD_ENDS = re.compile(r"(?<=[/\\])")
"""Where a line may break in a path."""


def write_hits_page(file: Path, title: str, hits: Sequence[Hit], query: Image | None = None) -> None:
    """Write a page with the images of the hits, best first, as embedded thumbnails.

    :param query: The image that was searched for; the page shows it above the hits.
    :raises CocoaError: If Jinja2 is not installed or the file cannot be written.
    """
    template, shown = Path(__file__).with_name("hits.html.jinja"), None if query is None else thumbnail_uri(query)
    page = render(template, "report", title=printable(title), query=shown, cards=[card(hit) for hit in hits])
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CocoaError(f"{printable(file)} cannot be written ({error.strerror})") from error


def card(hit: Hit) -> dict[str, object]:
    """Return what the page shows of a hit: score, caption, the first of its files that exists, and a thumbnail.

    The thumbnail made when the image was indexed comes first: it shows what was embedded.
    """
    paths = [path for path in (hit.path, *(each.path for each in stored_locations(hit.payload))) if path]
    sources = (source for source in (hit.payload.get("thumbnail"), *paths) if isinstance(source, str) and source)
    path = printable(next(filter(os.path.exists, paths), hit.path))
    return {
        "path": path,
        "path_parts": WORD_ENDS.split(path),
        "score": hit.score,
        "caption": hit.caption,
        "thumbnail": next(filter(None, map(data_uri, sources)), None),
    }


def data_uri(source: str) -> str | None:
    """Return a small JPEG of an image file as a ``data:`` URI; None if the file cannot be used."""
    try:
        return thumbnail_uri(load_image(source))
    except ImageError:
        return None


def thumbnail_uri(image: Image) -> str:
    """Return a small JPEG of an image as a ``data:`` URI."""
    return "data:image/jpeg;base64," + base64.b64encode(draw_thumbnail(image, THUMBNAIL_SIZE)).decode("ascii")
