"""A folder of small copies of images, named by point id."""

import os
from pathlib import Path

from cocoa_embed.errors import CocoaError, one_line, printable

THUMBNAIL_SIZE = 320
"""The maximum of width and height, in pixels."""


class ThumbnailFolder:
    """A folder of JPEG files, one for each point."""

    def __init__(self, folder: str | Path) -> None:
        """Create the folder if needed.

        :raises CocoaError: If it cannot be created.
        """
        self.folder = Path(os.path.abspath(folder))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CocoaError(
                f"the folder for thumbnails {printable(folder)} cannot be made ({one_line(error)})"
            ) from error

    def path(self, id_: str) -> Path:
        """Return the path of a point's thumbnail."""
        return self.folder / f"{id_}.jpg"

    def write(self, id_: str, jpeg: bytes) -> str:
        """Write the thumbnail of a point atomically and return its path.

        :raises CocoaError: If it cannot be written.
        """
        path = self.path(id_)
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(jpeg)
            os.replace(partial, path)
        except OSError as error:
            raise CocoaError(f"the thumbnail {printable(path)} cannot be written ({one_line(error)})") from error
        return str(path)


def remove_thumbnail(id_: str, path: str | None) -> None:
    """Remove the thumbnail of a deleted point, if ``path`` has its name.

    :raises CocoaError: If it cannot be removed.
    """
    if not isinstance(path, str) or Path(path).name != f"{id_}.jpg":
        return
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise CocoaError(f"the thumbnail {printable(path)} cannot be removed ({one_line(error)})") from error
