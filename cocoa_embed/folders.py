"""The cache folder, output folders that never replace other files, and atomic writes of files."""

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cocoa_embed.errors import CocoaError, UsageError

DEFAULT_INDEX = "cocoa-index"
"""The folder of the local index, if no other location is given."""

RUN_MARKER = ".cocoa-run"
"""Marks the output folder of a training run, which holds its checkpoints."""

LOCK_FILE = ".cocoa-writing"
"""In an output folder while a run writes to it, and after a kill."""

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP})
"""The errors of file systems without locks, such as some network ones."""

SCRATCH_SUFFIX = ".new"
"""The suffix of a file that is not complete yet."""

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder for files that are kept between runs; it may not exist.

    It is ``$COCOA_CACHE``, by default ``~/.cache/cocoa-embed``.
    """
    return Path(os.environ.get("COCOA_CACHE") or Path.home() / ".cache" / "cocoa-embed")


def refuse_foreign_folder(folder: Path, *, marker: str) -> None:
    """Check that ``folder`` may be written: it is missing, empty, or has the ``marker`` file of an earlier run.

    :raises CocoaError: If it is a file, or a folder that holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise CocoaError(f"{folder} is a file; give the name of a folder to write to.")
    if folder.is_dir() and any(map(_is_content, folder.iterdir())) and not (folder / marker).is_file():
        raise CocoaError(
            f"{folder} holds something else (it has no {marker}); nothing was written. Give another folder, or "
            "empty this one."
        )


def refuse_to_overwrite(out: Path, inputs: Iterable[Path]) -> None:
    """Check that an output folder, which ``claim_folder`` empties, holds none of the inputs.

    :param inputs: Files and folders.
    :raises UsageError: If it does.
    """
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out} holds {path}, which the run reads; give another output folder.")


def refuse_checkpoint(out: Path) -> None:
    """Check that an output folder is not inside a training run: a checkpoint looks like an earlier export.

    :raises CocoaError: If it is.
    """
    if any((parent / RUN_MARKER).is_file() for parent in out.resolve().parents):
        raise CocoaError(f"{out} is in the folder of a training run; give a folder outside of it.")


@contextmanager
def only_writer(folder: Path, *, marker: str) -> Iterator[None]:
    """Keep other runs from writing to ``folder``, which is created if needed, until the end of the block.

    A killed run keeps nobody out. On a file system without locks, a warning says that nothing keeps others out.

    :raises CocoaError: If another run writes to it, it holds something else, or it cannot be written.
    """
    refuse_foreign_folder(folder, marker=marker)
    is_new, file = not folder.exists(), folder / LOCK_FILE
    lock = FileLock(file, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise CocoaError(f"another run is writing to {folder}; wait for it, or give another folder.") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise CocoaError(f"{folder} cannot be written ({error.strerror}); give another folder.") from error
        logger.warning("%s is on a file system without locks; see to it that no other run writes to it", folder)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            file.unlink()  # while it is locked: whoever waits for it sees that it is gone
        lock.release()
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # if the run has written nothing


def _is_content(entry: Path) -> bool:
    return entry.name != LOCK_FILE


def claim_folder(folder: Path, *, marker: str) -> None:
    """Create ``folder``, empty but for its ``marker`` file; the output of an earlier run is removed.

    The marker is removed last, so that the remains of a killed run are still recognised.

    :raises CocoaError: If it is a file, a folder that holds something else, or cannot be written.
    """
    refuse_foreign_folder(folder, marker=marker)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in sorted(filter(_is_content, folder.iterdir()), key=lambda entry: entry.name == marker):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (folder / marker).touch()
    except OSError as error:
        raise CocoaError(f"{folder} cannot be written ({error.strerror}); give another folder.") from error


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's content so that readers, even after a kill, find either the old content or the new.

    Several processes may write the same file: each writes its own scratch file next to it, which a kill leaves behind.

    :raises OSError: If it cannot be written.
    """
    scratch = file.with_name(f"{file.name}.{os.getpid()}{SCRATCH_SUFFIX}")
    try:
        scratch.write_text(text, encoding="utf-8")
        with scratch.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(scratch, file)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
