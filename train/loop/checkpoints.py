"""Atomic checkpoints to resume from."""

import json
from pathlib import Path
from typing import Any

from cocoa_embed.folders import write_atomically

COMPLETE = "complete.json"
"""Written last into a checkpoint: the names and sizes of its files, and facts of the run."""


def write_json(path: Path, document: dict[str, Any] | list[Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(document, indent=2) + "\n")


def mark_complete(checkpoint: Path, **facts: Any) -> None:
    """Mark a checkpoint as complete.

    :param facts: What a resumed run reads from it, as JSON takes it.
    """
    files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    write_json(checkpoint / COMPLETE, {"files": files, **facts})


def newest_complete(folder: Path) -> Path | None:
    """Return the newest complete ``checkpoint-<step>`` in ``folder``, None if there is none."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    newest_first = sorted(checkpoints, key=step_of, reverse=True)
    return next((checkpoint for checkpoint in newest_first if is_complete(checkpoint)), None)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was saved at."""
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end, and still has all its files."""
    if not (checkpoint / COMPLETE).is_file():
        return False
    sizes = read_complete(checkpoint)["files"]
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == sizes[name] for name in sizes)


def read_complete(checkpoint: Path) -> dict[str, Any]:
    """Return what ``mark_complete`` wrote."""
    document: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return document


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
