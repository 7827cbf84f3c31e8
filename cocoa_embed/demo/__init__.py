"""The demo: a tiny model, trained on scenes that it draws, evaluated, indexed and searched."""

from pathlib import Path

from cocoa_embed.errors import UsageError
from cocoa_embed.folders import refuse_checkpoint, refuse_foreign_folder
from cocoa_embed.model.training_record import TRAINING_FILE

MARKER = ".cocoa-demo"
"""Marks the demo's working folder."""


def check_folders(out: Path, work: Path, photos: Path | None = None) -> None:
    """Check that both output folders may be written.

    :param photos: A folder that is read.
    :raises CocoaError: If an output folder holds something else, or they lie inside each other or around ``photos``.
    """
    if work.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(work.resolve()):
        raise UsageError(f"{out} and {work} lie inside each other; give --out and --work folders apart.")
    for folder in (out, work):
        if photos is not None and photos.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{photos} is in {folder}, which the demo replaces; give another --out or --work.")
    refuse_checkpoint(out)
    refuse_foreign_folder(out, marker=TRAINING_FILE)
    refuse_foreign_folder(work, marker=MARKER)
