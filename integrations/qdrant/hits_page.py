"""A search's hits as one HTML page that needs no other file."""

import base64
from collections.abc import Sequence
from pathlib import Path

from cocoa_embed.errors import CocoaError, ImageError, printable, require
from cocoa_embed.images.load import load_image
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.points import stored_locations
from cocoa_embed.integrations.qdrant.stores.base import Hit
from cocoa_embed.integrations.qdrant.thumbnails import THUMBNAIL_SIZE

_TEMPLATE = Path(__file__).with_name("hits.html.jinja")


def write_hits_page(file: Path, title: str, hits: Sequence[Hit]) -> None:
    """Write a page that shows the images found, best first, with thumbnails inside.

    :raises CocoaError: If Jinja2 is missing or the file cannot be written.
    """
    environment = require("jinja2", "report").Environment(autoescape=True)
    cards = [
        {"path": hit.path, "score": hit.score, "caption": hit.caption, "thumbnail": thumbnail(hit)} for hit in hits
    ]
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(title=printable(title), cards=cards)
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CocoaError(f"{printable(file)} cannot be written ({error.strerror})") from error


def thumbnail(hit: Hit) -> str | None:
    """Return a small JPEG of a hit as a ``data:`` address; None if neither its thumbnail nor a file of it can be used.

    The thumbnail that was made when the image was indexed comes first: it shows what was embedded.
    """
    for path in (hit.payload.get("thumbnail"), hit.path, *(each.path for each in stored_locations(hit.payload))):
        if not path or not isinstance(path, str):
            continue
        try:
            image = load_image(path)
        except ImageError:
            continue
        return "data:image/jpeg;base64," + base64.b64encode(draw_thumbnail(image, THUMBNAIL_SIZE)).decode("ascii")
    return None
