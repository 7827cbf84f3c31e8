"""What a request may take, and the error of one that has to wait too long for it."""

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
    """For a body to arrive, and again for the answer."""
    waiting: int = 1024
    """Requests at once, those included that wait; another one gets status 503."""
    waiting_bytes: int = 2**29
    """Of the bodies of all requests at once: 512 MiB."""
    threads: int = 32
    """Requests that are searched or embedded at once."""
    pixels: int = 2**28
    """Of all pictures that wait for the model, decoded: 768 MiB. A search holds its picture twice, or nine
    times in any orientation; what is larger than all waits until it is alone."""


class PixelBudget:
    """Lets threads decode pictures as long as all of them together have at most so many pixels."""

    def __init__(self, pixels: int, seconds: float) -> None:
        """Set the number of pixels, and how long a thread waits for them."""
        self._most = self._free = pixels
        self._seconds = seconds
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait for room for so many pixels, or for all of it, and hold it.

        :raises BusyError: If it is not free in time.
        """
        pixels = min(pixels, self._most)
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= pixels, self._seconds):
                raise BusyError(f"other pictures took all the room for {self._seconds:g} seconds; try again")
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
