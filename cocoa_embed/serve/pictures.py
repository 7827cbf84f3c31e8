"""The pictures of an index by point id: full, as stored, or small. Nothing else on the machine is read."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from cocoa_embed.errors import CocoaError, ImageError, printable
from cocoa_embed.images.load import decode_image, load_image
from cocoa_embed.images.to_rgb import draw_thumbnail
from cocoa_embed.integrations.qdrant.indexing.thumbnails import THUMBNAIL_SIZE
from cocoa_embed.integrations.qdrant.points import Payload, stored_locations
from cocoa_embed.integrations.qdrant.searching.searcher import NotIndexedError, as_id
from cocoa_embed.integrations.qdrant.stores.base import image_path
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.keys import read_key

SHOWN_BY_BROWSERS = frozenset({"image/jpeg", "image/png", "image/webp", "image/gif", "image/avif", "image/bmp"})
"""The media types that are served as they are stored; other pictures become JPEG."""

JPEG_SIDE = 65_500
"""The most pixels of a JPEG's side; a longer picture that becomes one is scaled down."""

CACHED_THUMBNAILS = 2000
"""Thumbnails that are kept in memory, about 20 KB each."""


class Pictures:
    """The pictures of a collection's points; threads may share it."""

    def __init__(self, store: Store) -> None:
        """Name the collection; nothing is read yet."""
        self._store = store
        self.thumbnail = lru_cache(CACHED_THUMBNAILS)(self._draw)

    def payload(self, id_: str) -> Payload:
        """Return the payload of a point.

        :raises NotIndexedError: If there is no such point.
        """
        point: Any = as_id(id_)
        found = {} if point is None else self._store.retrieve([point])
        if not found:
            raise NotIndexedError(f"{self._store.name} has no image with the id {printable(id_)}")
        return next(iter(found.values()))

    def full(self, id_: str) -> tuple[bytes, str]:
        """Return the file of a point's picture, and its media type; as JPEG if browsers do not show its type.

        :raises NotIndexedError: If there is no such point, or none of its files holds the picture any more.
        """
        data, image, media_type = read_picture(self.payload(id_))
        if media_type in SHOWN_BY_BROWSERS:
            return data, media_type
        return draw_thumbnail(image, min(max(image.size), JPEG_SIDE)), "image/jpeg"

    def _draw(self, id_: str, size: int) -> tuple[bytes, str]:
        """Return a JPEG of a point's picture, its longer side at most ``size`` pixels, and its media type.

        :raises NotIndexedError: If there is no such point, or neither its thumbnail nor one of its files can be read.
        """
        payload = self.payload(id_)
        stored = str(payload.get("thumbnail"))
        is_stored = os.path.isabs(stored) and Path(stored).name == f"{id_}.jpg"
        if is_stored and size <= THUMBNAIL_SIZE:
            with suppress(ImageError):
                return draw_thumbnail(load_image(stored), size), "image/jpeg"
        try:
            return draw_thumbnail(read_picture(payload)[1], size), "image/jpeg"
        except NotIndexedError:
            if not is_stored:
                raise
            return draw_thumbnail(load_image(stored), size), "image/jpeg"


def read_picture(payload: Payload) -> tuple[bytes, Image.Image, str]:
    """Read the first of a point's files that holds its picture; return its bytes, upright RGB, and the media type.

    :raises NotIndexedError: If there is none; the message gives the reason for the first.
    """
    paths = filter(None, dict.fromkeys((image_path(payload), *(str(each.path) for each in stored_locations(payload)))))
    reasons: list[CocoaError] = []
    for key in paths:
        try:
            if "://" in key or not os.path.isabs(key):
                reason = "is not on this machine; only its thumbnail can be shown, if it is indexed with --thumbnails"
                raise ImageError(printable(key), reason)
            data = read_key(key)
            check_content(data, key, payload)
            return data, *decode_image(data, printable(key))
        except CocoaError as error:
            reasons.append(error)
    raise NotIndexedError(str(reasons[0]) if reasons else "the point names no file")


def check_content(data: bytes, key: str, payload: Payload) -> None:
    """Check that a file is still what was indexed; a page or a frame, which is drawn again, may differ.

    :raises ImageError: If it is not.
    """
    is_drawn = payload.get("page") is not None or payload.get("seconds") is not None
    if not is_drawn and payload.get("sha256") not in (None, hashlib.sha256(data).hexdigest()):
        raise ImageError(printable(key), "has changed since it was indexed; run cocoa-embed index again")
