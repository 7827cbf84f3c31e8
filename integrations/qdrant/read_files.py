"""Files read ahead of those who need them."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from cocoa_embed.errors import ImageError
from cocoa_embed.images.load import read_stable_file
from cocoa_embed.integrations.qdrant.points import Description, point_id

READERS = 4
"""Threads that read files; more than cores, as they mostly wait for disks and networks."""

Given = TypeVar("Given")
Made = TypeVar("Made")


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
