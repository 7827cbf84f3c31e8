"""Lock the folder of a store against other processes."""

from pathlib import Path

from filelock import FileLock, Timeout

from cocoa_embed.errors import CocoaError


def in_use(location: str) -> CocoaError:
    """Return the error for a folder that another process uses."""
    return CocoaError(
        f"the index {location} is in use by another process; wait for it, or run a Qdrant server and give its --url"
    )


def lock_file(file: Path, location: str) -> FileLock:
    """Create ``file`` if needed and lock it until ``release`` is called or the process ends.

    :raises CocoaError: If it is locked.
    :raises OSError: If it cannot be created or locked.
    """
    # A soft lock, the fallback where flock is missing, would survive a killed process.
    lock = FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise in_use(location) from error
    return lock
