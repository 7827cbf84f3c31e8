"""The demo: a tiny model, trained on scenes that it draws, evaluated, indexed and searched."""

from os.path import expanduser
from pathlib import Path

from cocoa_embed.errors import UsageError
from cocoa_embed.folders import refuse_checkpoint, refuse_foreign_folder, refuse_to_overwrite
from cocoa_embed.model.training_record import TRAINING_FILE

MARKER = ".cocoa-demo"
"""Marks the demo's working folder."""


def check_folders(out: Path, work: Path, photos: Path | None = None, backbone: str | None = None) -> None:
    """Check that both output folders may be written.

    :param photos: A folder that the demo reads.
    :param backbone: A name, or another folder that the demo reads.
    :raises CocoaError: If an output folder holds something else, or would overwrite a folder that is read.
    :raises UsageError: If the output folders are the same, or one lies inside the other.
    """
    if work.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(work.resolve()):
        raise UsageError(
            f"{out} and {work} are the same folder, or one lies inside the other; give separate folders as --out and"
            " --work."
        )
    inputs = [photos, None if backbone is None else Path(expanduser(backbone))]  # as a recipe reads it
    for folder in (out, work):
        refuse_to_overwrite(folder, [path for path in inputs if path is not None and path.is_dir()])
    refuse_checkpoint(out)
    refuse_foreign_folder(out, marker=TRAINING_FILE)
    refuse_foreign_folder(work, marker=MARKER)
