"""Lock the folder of a store against other processes."""

from pathlib import Path

from filelock import FileLock

from cocoa_embed.errors import CocoaError


def in_use(location: str) -> CocoaError:
    """Return the error for a folder that something else uses."""
    return CocoaError(
        f"the index {location} is in use by another process, or by another indexer in this one; wait for the process,"
        " close the other indexer, or run a Qdrant server and give its --url"
    )


def folder_lock(file: Path) -> FileLock:
    """Return a lock on ``file``, which is created if needed; it raises ``Timeout`` if another process holds it."""
    # A soft lock, the fallback where flock is missing, would survive a killed process.
    return FileLock(file, thread_local=False, fallback_to_soft=False, blocking=False)
