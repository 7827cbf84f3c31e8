"""Checkpoints to resume from: whole, or not there."""

import json
from pathlib import Path
from typing import Any

from cocoa_embed.folders import write_atomically

COMPLETE = "complete.json"
"""Written last into a checkpoint: the names and sizes of its files, and what the run was at that point."""


def write_json(path: Path, document: dict[str, Any] | list[Any]) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    write_atomically(path, json.dumps(document, indent=2) + "\n")


def mark_complete(checkpoint: Path, **known: Any) -> None:
    """Say that a checkpoint holds all that it should.

    :param known: What a resumed run wants to know of it, as JSON takes it.
    """
    files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    write_json(checkpoint / COMPLETE, {"files": files, **known})


def newest_complete(folder: Path) -> Path | None:
    """Return the newest whole ``checkpoint-<step>`` in ``folder``, None where there is none."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    newest_first = sorted(checkpoints, key=step_of, reverse=True)
    return next((checkpoint for checkpoint in newest_first if is_complete(checkpoint)), None)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was saved at."""
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end, and nothing of it has been removed since."""
    if not (checkpoint / COMPLETE).is_file():
        return False
    sizes = read_complete(checkpoint)["files"]
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == sizes[name] for name in sizes)


def read_complete(checkpoint: Path) -> dict[str, Any]:
    """Return what ``mark_complete`` has written."""
    document: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return document


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
