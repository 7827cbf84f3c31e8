"""A search's hits as one HTML page that needs no other file."""

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from cocoa_embed.errors import CocoaError, require
from cocoa_embed.images import ImageError, load_image
from cocoa_embed.integrations.qdrant import Hit

THUMBNAIL_SIZE = (320, 320)
_TEMPLATE = Path(__file__).with_name("hits.html.jinja")


def write_hits_page(file: Path, title: str, hits: Sequence[Hit]) -> None:
    """Write a page that shows the images found, best first, with thumbnails inside.

    :raises CocoaError: If Jinja2 is missing or the file cannot be written.
    """
    environment = require("jinja2", "report").Environment(autoescape=True)
    cards = [
        {"path": hit.path, "score": hit.score, "caption": hit.payload.get("caption"), "thumbnail": thumbnail(hit.path)}
        for hit in hits
    ]
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(title=title, cards=cards)
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CocoaError(f"{file} cannot be written ({error.strerror})") from error


def thumbnail(path: str) -> str | None:
    """Return a small JPEG of an image file as a ``data:`` address; None if the file cannot be used any more."""
    try:
        image = load_image(path)
    except ImageError:
        return None
    image.thumbnail(THUMBNAIL_SIZE)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
