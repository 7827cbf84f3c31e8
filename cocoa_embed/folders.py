"""Output folders: made where there is room, refused where something else lives."""

import shutil
from pathlib import Path

from cocoa_embed.errors import CocoaError


def claim_folder(folder: Path, *, marker: str) -> None:
    """Make ``folder`` empty for writing; what an earlier run left there, known by its ``marker`` file, is removed.

    :raises CocoaError: If it is a file, or a folder that holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise CocoaError(f"{folder} is a file; give the name of a folder to write to.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / marker).is_file():
            raise CocoaError(
                f"{folder} holds something else (it has no {marker}); nothing was written. Give another folder, or "
                "empty this one."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / marker).touch()
