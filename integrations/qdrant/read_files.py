"""Read and hash image files, and find out which files no longer exist."""

import hashlib
import os
import re
import stat
from typing import NamedTuple

from cocoa_embed.errors import ImageError
from cocoa_embed.images.load import read_stable_file
from cocoa_embed.integrations.qdrant.points import ImageFile, point_id


class ReadFile(NamedTuple):
    """The content of a file."""

    id: str
    """The id of its point."""
    sha256: str
    data: bytes
    mtime: float


def read_file(file: ImageFile) -> ReadFile | ImageError:
    """Read and hash a file; an error is returned instead of raised."""
    try:
        content = read_stable_file(file.path)
    except ImageError as error:
        return error
    sha256 = hashlib.sha256(content.data).hexdigest()
    return ReadFile(point_id(sha256), sha256, content.data, content.mtime)


def is_deleted(path: str) -> bool:
    r"""Return whether there is certainly no file at a path.

    A path that cannot be checked, for lack of permission or of a network, is not deleted.

    :param path: As a payload has it: with ``\udcNN`` for undecodable bytes.
    """
    undecoded = re.sub(r"\\udc([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), path)
    for spelling in {path, undecoded}:
        try:
            if stat.S_ISREG(os.stat(spelling).st_mode):
                return False
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return False
    return True
