"""Read and hash image files."""

import hashlib
from typing import NamedTuple

from cocoa_embed.errors import ImageError
from cocoa_embed.images.load import read_stable_file
from cocoa_embed.integrations.qdrant.points import Description, point_id


class ReadFile(NamedTuple):
    """A file's content and what is known of it."""

    id: str
    """Of the point that stands for this content."""
    sha256: str
    data: bytes
    mtime: float


def read_file(file: Description) -> ReadFile | ImageError:
    """Read and hash a file; an error is returned, not raised, so that it stays in its place among others."""
    try:
        content = read_stable_file(file.path)
    except ImageError as error:
        return error
    sha256 = hashlib.sha256(content.data).hexdigest()
    return ReadFile(point_id(sha256), sha256, content.data, content.mtime)
