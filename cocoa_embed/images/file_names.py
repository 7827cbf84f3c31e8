"""Find a file whatever the Unicode form of its name: é is one code point or two."""

import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from unicodedata import normalize

Names = TypeVar("Names")

SETTLED_NS = 2 * 10**9
"""Changes of a folder that are this many nanoseconds apart have different mtimes on any file system."""


def as_on_disk(path: Path) -> Path:
    """Return a path as the disk spells it: file systems and tables differ in whether accents are composed (é).

    A path that exists, that nothing matches, or that several files match, is returned as it is.
    """
    found = spellings(path)
    return found[0] if len(found) == 1 else path


def spellings(path: Path) -> list[Path]:
    """Return the path itself if it exists, else those that differ from it only in how accents are composed."""
    if str(path).isascii() or os.path.lexists(path):
        return [path]
    found = [Path(path.anchor)]
    for part in path.relative_to(path.anchor).parts:
        found = [folder / name for folder in found for name in _names_like(folder, part)]
    return found


def why_missing(path: Path) -> str:
    """Return the reason why a path that does not exist cannot be used."""
    names = ", ".join(ascii(str(each)) for each in spellings(path)) if not os.path.lexists(path) else ""
    several = f"; {names} differ from it and from one another only in how accents are composed, rename all but one"
    return "does not exist" + several * ("," in names)


def _names_like(folder: Path, name: str) -> list[str]:
    if name.isascii() or os.path.lexists(folder / name):
        return [name]
    try:
        return _names_by_composed(folder).get(normalize("NFC", name), [])
    except (OSError, ValueError):  # it is not a folder, or cannot be listed
        return []


def cached_by_folder(read: Callable[[Path], Names]) -> Callable[[Path], Names]:
    """Cache what ``read`` returns for a folder until the folder changes: reading it for each file is quadratic."""
    cached = lru_cache(maxsize=16)(lambda folder, mtime_ns: read(folder))

    def read_if_changed(folder: Path) -> Names:
        mtime_ns = os.stat(folder).st_mtime_ns
        # A change within one tick of the clock does not change the mtime.
        return cached(folder, mtime_ns) if time.time_ns() - mtime_ns > SETTLED_NS else read(folder)

    return read_if_changed


@cached_by_folder
def _names_by_composed(folder: Path) -> dict[str, list[str]]:
    """Return the names in a folder by their composed form."""
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if not name.isascii():
            names.setdefault(normalize("NFC", name), []).append(name)
    return names
