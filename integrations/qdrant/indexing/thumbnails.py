"""A folder of small copies of images, named by point id, in a subfolder for each collection."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.folders import refuse_foreign_folder
from cocoa_embed.images.passed_over import THUMBNAILS_MARKER
from cocoa_embed.integrations.qdrant.points import Payload
from cocoa_embed.sources.base import is_below

THUMBNAIL_SIZE = 320
"""The maximum of width and height, in pixels."""


def check_folder(folder: Path) -> None:
    """Check that a folder can hold thumbnails.

    :raises CocoaError: If it holds something else, or cannot exist.
    """
    with readable_errors("folder for thumbnails", folder):
        refuse_foreign_folder(folder, marker=THUMBNAILS_MARKER)


class ThumbnailFolder:
    """A folder of JPEG files, one for each point.

    Each collection has its own subfolder: the points of several have the same ids, and each removes its thumbnails.
    """

    def __init__(self, folder: str | Path, collection: str) -> None:
        """Create the folder if needed, with the marker that makes the search for images pass it over.

        :param collection: Names the collection and where it is.
        :raises CocoaError: If it cannot be created, or holds something else.
        """
        self.folder = Path(os.path.abspath(folder))
        name = hashlib.blake2b(collection.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
        self._own_folder = self.folder / name
        check_folder(self.folder)
        with readable_errors("folder for thumbnails", folder):
            self._own_folder.mkdir(parents=True, exist_ok=True)
            for each in (self.folder, self._own_folder):
                (each / THUMBNAILS_MARKER).touch()

    def lacks(self, payload: Payload) -> bool:
        """Return whether the payload of a point names no thumbnail in this folder, or one that is gone.

        It may be in another subfolder: that of the place from which the collection was moved.
        """
        path = payload.get("thumbnail")
        return not (isinstance(path, str) and is_below(path, str(self.folder)) and os.path.exists(path))

    def write(self, id_: str, jpeg: bytes) -> str:
        """Write the thumbnail of a point atomically and return its path.

        :raises CocoaError: If it cannot be written.
        """
        path = self._own_folder / f"{id_}.jpg"
        with readable_errors("thumbnail", path):
            path.with_suffix(".partial").write_bytes(jpeg)
            os.replace(path.with_suffix(".partial"), path)
        return str(path)


def remove_thumbnail(id_: str, path: str | None) -> None:
    """Remove the thumbnail of a deleted point, if ``path`` has its name.

    :raises CocoaError: If it cannot be removed.
    """
    if isinstance(path, str) and Path(path).name == f"{id_}.jpg":
        with readable_errors("thumbnail", path):
            Path(path).unlink(missing_ok=True)


@contextmanager
def readable_errors(kind: str, path: str | Path) -> Iterator[None]:
    """Turn errors of the file system into ``CocoaError``."""
    try:
        yield
    except OSError as error:
        raise CocoaError(f"the {kind} {printable(path)} cannot be written or removed ({one_line(error)})") from error
