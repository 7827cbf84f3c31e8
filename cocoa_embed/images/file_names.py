"""Find a file whose name is written with other code points, as é is one or two of them."""

import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from unicodedata import normalize

from cocoa_embed.errors import CocoaError, printable

Names = TypeVar("Names")

SETTLED_NS = 2 * 10**9
"""Nanoseconds after which a folder's mtime tells its states apart, on any file system."""


def as_on_disk(path: Path) -> Path:
    """Return a path as the disk spells it: file systems and tables differ in whether accents are composed (é).

    A path that exists, or whose spelling nothing matches, is returned as it is.

    :raises CocoaError: If it does not exist and several files differ from it only in how accents are composed.
    """
    if str(path).isascii() or os.path.lexists(path):
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        spellings = [part]
        if not part.isascii() and not os.path.lexists(found / part) and os.access(found, os.R_OK):
            spellings = _spellings(found).get(normalize("NFC", part), spellings)
        if len(spellings) > 1:
            names = ", ".join(map(ascii, spellings))
            raise CocoaError(f"{printable(path)} does not exist, and {names} in {printable(found)} are all spelled like"
                             " it but for how their accents are composed; rename all but one")  # fmt: skip
        found /= spellings[0]
    return found


def cached_by_folder(read: Callable[[Path], Names]) -> Callable[[Path], Names]:
    """Keep what ``read`` returns for the last folders, while they do not change: a file a call would be quadratic."""
    cached = lru_cache(maxsize=16)(lambda folder, mtime_ns: read(folder))

    def read_if_changed(folder: Path) -> Names:
        mtime_ns = os.stat(folder).st_mtime_ns
        # What changes within a tick of the clock leaves the mtime as it is.
        return cached(folder, mtime_ns) if time.time_ns() - mtime_ns > SETTLED_NS else read(folder)

    return read_if_changed


@cached_by_folder
def _spellings(folder: Path) -> dict[str, list[str]]:
    """Return the names in a folder by their composed form."""
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if not name.isascii():
            names.setdefault(normalize("NFC", name), []).append(name)
    return names
