"""Files of a store that others may open, or that a kill may leave half-way: locks, and files written whole."""

import fcntl
import os
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


def write_whole(file: Path, text: str) -> None:
    """Write a file so that whoever looks, and whenever the process is killed, finds all of it or what was before.

    :raises OSError: If it cannot be written.
    """
    scratch = file.with_name(file.name + ".new")
    with scratch.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(scratch, file)
