"""Read and hash files ahead of their consumer, and find out which files no longer exist."""

import hashlib
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from cocoa_embed.errors import ImageError
from cocoa_embed.images.load import read_stable_file
from cocoa_embed.integrations.qdrant.points import ImageFile, point_id

READERS = 4
"""Threads that read files; they mostly wait for disks and networks."""

Given = TypeVar("Given")
Made = TypeVar("Made")


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


def ahead(
    make: Callable[[Given], Made], given: Iterable[Given], workers: int = READERS
) -> Iterator[tuple[Given, Made]]:
    """Yield each given thing with what ``make`` makes of it, in order; a few are made ahead, in threads.

    What is given is asked for in the calling thread, at most ``2 * workers`` ahead.
    """
    waiting: deque[tuple[Given, Future[Made]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="cocoa-embed-reader") as pool:
        for thing in given:
            waiting.append((thing, pool.submit(make, thing)))
            if len(waiting) >= 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
