"""A folder of small copies of images, named by point id."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.folders import refuse_foreign_folder
from cocoa_embed.images.passed_over import THUMBNAILS_MARKER
from cocoa_embed.integrations.qdrant.points import Payload

THUMBNAIL_SIZE = 320
"""The maximum of width and height, in pixels."""


def check_folder(folder: Path) -> None:
    """Check that a folder can hold thumbnails.

    :raises CocoaError: If it holds something else, or cannot exist.
    """
    with readable_errors("folder for thumbnails", folder):
        refuse_foreign_folder(folder, marker=THUMBNAILS_MARKER)


class ThumbnailFolder:
    """A folder of JPEG files, one for each point."""

    def __init__(self, folder: str | Path) -> None:
        """Create the folder if needed, with the marker that makes the search for images pass it over.

        :raises CocoaError: If it cannot be created, or holds something else.
        """
        self.folder = Path(os.path.abspath(folder))
        check_folder(self.folder)
        with readable_errors("folder for thumbnails", folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / THUMBNAILS_MARKER).touch()

    def path(self, id_: str) -> Path:
        """Return the path of a point's thumbnail."""
        return self.folder / f"{id_}.jpg"

    def lacks(self, id_: str, payload: Payload) -> bool:
        """Return whether a point has no thumbnail in this folder, or its payload does not name it."""
        path = self.path(id_)
        return payload.get("thumbnail") != str(path) or not path.exists()

    def write(self, id_: str, jpeg: bytes) -> str:
        """Write the thumbnail of a point atomically and return its path.

        :raises CocoaError: If it cannot be written.
        """
        path = self.path(id_)
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
