"""The folder in which training keeps what it has read and checked, so that a later run need not do it again."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from cocoa_embed.errors import one_line, printable
from cocoa_embed.folders import cache_folder

logger = logging.getLogger(__name__)


def rows_folder() -> Path:
    """Return the folder, which may not exist."""
    return cache_folder() / "rows"


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` create a file or folder next to ``path``, then rename it to ``path``.

    :raises OSError: If it cannot be written; then no part of it is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(scratch / path.name)
        if path.is_dir():  # another process may be about to open it, so it is missing only for an instant
            os.replace(path, scratch / "earlier")
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def warn_without_cache(error: OSError) -> None:
    """Warn that the cache cannot be written, once for each reason."""
    _warn(cache_folder(), error.strerror or one_line(error))


@cache
def _warn(folder: Path, reason: str) -> None:
    logger.warning("The cache %s cannot be written (%s); the next run reads and checks the data again. COCOA_CACHE "
                   "names another folder.", printable(folder), reason)  # fmt: skip
