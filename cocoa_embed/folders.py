"""Output folders: made where there is room, refused where something else lives; and files that are written whole."""

import os
import shutil
from pathlib import Path

from cocoa_embed.errors import CocoaError

RUN_MARKER = ".cocoa-run"
"""What makes a folder the output of a training run; its checkpoints are in it."""


SCRATCH_SUFFIX = ".new"


def refuse_foreign_folder(folder: Path, *, marker: str) -> None:
    """Check that ``folder`` may be written: not there, empty, or with the ``marker`` file of an earlier run.

    :raises CocoaError: If it is a file, or a folder that holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise CocoaError(f"{folder} is a file; give the name of a folder to write to.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise CocoaError(
            f"{folder} holds something else (it has no {marker}); nothing was written. Give another folder, or "
            "empty this one."
        )


def claim_folder(folder: Path, *, marker: str) -> None:
    """Make ``folder`` empty for writing, with its ``marker`` file; what an earlier run left there is removed.

    :raises CocoaError: If it is a file, a folder that holds something else, or cannot be written.
    """
    refuse_foreign_folder(folder, marker=marker)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (folder / marker).touch()
    except OSError as error:
        raise CocoaError(f"{folder} cannot be written ({error.strerror}); give another folder.") from error


def write_whole(file: Path, text: str) -> None:
    """Write a file so that whoever looks, and whenever the process is killed, finds all of it or what was before.

    Several processes may write the same file: each has a scratch file of its own beside it, which a kill leaves there.

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


def is_scratch_of(name: str, file_name: str) -> bool:
    """Tell whether a file of that name is what ``write_whole`` leaves of another when it is killed."""
    return name.startswith(f"{file_name}.") and name.endswith(SCRATCH_SUFFIX)
