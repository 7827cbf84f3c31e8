"""Write the hits of a search as one HTML page that needs no other file."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from cocoa_embed.errors import CocoaError, ImageError, printable
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.indexing.thumbnails import THUMBNAIL_SIZE
from cocoa_embed.integrations.qdrant.points import stored_locations
from cocoa_embed.integrations.qdrant.stores.base import Hit
from cocoa_embed.report.html import render
from cocoa_embed.sources.files import is_deleted
from cocoa_embed.sources.keys import load_key

WORD_ENDS = re.compile(r"(?<=[/\\])")
"""Where a line may break in a path."""


def write_hits_page(
    file: Path, title: str, hits: Sequence[Hit], query: Image | None = None, allowed_hosts: Sequence[str] = ()
) -> None:
    """Write a page with the images of the hits, best first, as embedded thumbnails.

    :param query: The image that was searched for; the page shows it above the hits.
    :param allowed_hosts: The hosts from which images on the web may be fetched.
    :raises CocoaError: If Jinja2 is not installed or the file cannot be written.
    """
    template, shown = Path(__file__).with_name("hits.html.jinja"), None if query is None else thumbnail_uri(query)
    cards = [card(hit, allowed_hosts) for hit in hits]
    page = render(template, "report", title=printable(title), query=shown, cards=cards)
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CocoaError(f"{printable(file)} cannot be written ({error.strerror})") from error


def card(hit: Hit, allowed_hosts: Sequence[str]) -> dict[str, object]:
    """Return what the page shows of a hit: score, caption, the first of its files that exists, and a thumbnail.

    The thumbnail made when the image was indexed comes first: it shows what was embedded.
    """
    paths = [path for path in (hit.path, *(each.path for each in stored_locations(hit.payload))) if path]
    sources = (source for source in (hit.payload.get("thumbnail"), *paths) if isinstance(source, str) and source)
    path = printable(next((path for path in paths if not is_deleted(path)), hit.path))
    return {
        "path": path,
        "path_parts": WORD_ENDS.split(path),
        "score": hit.score,
        "caption": hit.caption,
        "thumbnail": next(filter(None, (data_uri(source, allowed_hosts) for source in sources)), None),
    }


def data_uri(source: str, allowed_hosts: Sequence[str]) -> str | None:
    """Return a small JPEG of an image, wherever it is, as a ``data:`` URI; None if it cannot be used."""
    try:
        return thumbnail_uri(load_key(source, allowed_hosts))
    except ImageError:
        return None


def thumbnail_uri(image: Image) -> str:
    """Return a small JPEG of an image as a ``data:`` URI."""
    return "data:image/jpeg;base64," + base64.b64encode(draw_thumbnail(image, THUMBNAIL_SIZE)).decode("ascii")
