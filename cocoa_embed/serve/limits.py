"""The limits of requests, and the error for a request that has to wait too long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cocoa_embed.errors import CocoaError


class BusyError(CocoaError):
    """The server has too much to do, or is stopping; the same request may succeed later."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a server; the size of a single picture is that of ``load_image``."""

    body_bytes: int = 32 * 2**20
    seconds: float = 30.0
    """The time for a body to arrive, and again for the answer."""
    waiting: int = 1024
    """The maximum number of requests at once, including those that wait; further ones get status 503."""
    waiting_bytes: int = 2**29
    """The maximum size of the bodies of all requests at once: 512 MiB."""
    threads: int = 32
    """Requests that are searched or embedded at once."""
    pixels: int = 2**28
    """The maximum number of pixels of all pictures that wait for the model: 768 MiB decoded. A search holds its picture
    twice, or nine times with any orientation; a picture above the maximum waits until it is alone."""


class PixelBudget:
    """Lets threads decode pictures as long as all of them together do not exceed a number of pixels."""

    def __init__(self, pixels: int, seconds: float) -> None:
        """Set the number of pixels, and how long a thread waits for them."""
        self._most = self._free = pixels
        self._seconds = seconds
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until ``pixels`` of the budget are free, or all of it if it is smaller, and hold them.

        :raises BusyError: If they are not free in time.
        """
        pixels = min(pixels, self._most)
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= pixels, self._seconds):
                raise BusyError(
                    f"other pictures left no memory for this one within {self._seconds:g} seconds; try again"
                )
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
