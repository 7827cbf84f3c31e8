"""Locks on the files of a store that other processes may open."""

import fcntl
from pathlib import Path
from typing import IO

from cocoa_embed.errors import CocoaError


def in_use(place: str) -> CocoaError:
    """Return the error for a folder that another process holds."""
    return CocoaError(
        f"the index {place} is in use by another process; wait for it, or run a Qdrant server and give its --url"
    )


def lock_file(file: Path, place: str) -> IO[str]:
    """Open a file, created if needed, that nobody else can lock before it is closed, or the process ends.

    :raises CocoaError: If it is locked.
    :raises OSError: If it cannot be created or locked.
    """
    handle = file.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise in_use(place) from error
    except OSError:
        handle.close()
        raise
    return handle
