"""Checkpoints to resume from, marked when they are complete, and snapshots of a stage's weights."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cocoa_embed.errors import CocoaError, one_line
from cocoa_embed.folders import write_atomically
from cocoa_embed.model.training_record import TRAINING_FILE

COMPLETE = "complete.json"
"""Written last into a checkpoint: the names and sizes of its files, and facts of the run."""


TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
"""Names in the message of the ``RuntimeError`` that ``torch.save`` raises if it cannot write a file."""


@contextmanager
def explain_full_disk(content: str) -> Iterator[None]:
    """Turn errors in writing a run's files into one that says what to do.

    :param content: What the files hold.
    :raises CocoaError: If they cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
            raise
        raise CocoaError(
            f"{content} cannot be written ({one_line(error)}); make room, or move the run's folder to another disk and "
            "name it with --out, then run again with --resume."
        ) from error


def mark_complete(checkpoint: Path, **facts: Any) -> None:
    """Mark a checkpoint as complete.

    :param facts: JSON values for a resumed run.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_atomically(checkpoint / COMPLETE, json.dumps({"files": sizes, **facts}, indent=2) + "\n")


def newest_complete(folder: Path) -> Path | None:
    """Return the newest complete ``checkpoint-<step>`` in ``folder``, None if there is none."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return next(filter(_is_complete, sorted(checkpoints, key=step_of, reverse=True)), None)


def step_of(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def read_complete(checkpoint: Path) -> dict[str, Any]:
    """Return the document that ``mark_complete`` has written."""
    document: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return document


def _is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint is marked as complete, and still has all its files at their full size."""
    if not (checkpoint / COMPLETE).is_file():
        return False
    sizes = read_complete(checkpoint)["files"]
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == sizes[name] for name in sizes)


def snapshot_folder(stage_folder: Path, step: int) -> Path:
    """Return the folder of a step's snapshot."""
    return stage_folder / f"step-{step}"


def remove_unfinished(stage_folder: Path) -> None:
    """Remove the incomplete output of an interrupted stage; complete snapshots stay."""
    for path in stage_folder.glob("*"):
        if not path.is_dir():
            path.unlink()
        elif not (path / TRAINING_FILE).is_file():
            shutil.rmtree(path, ignore_errors=True)
