"""What an evaluation has finished, on disk: a file for each part, there whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.folders import write_atomically

NAME_DIGITS = 12
"""Hexadecimal digits of a key's digest in a file's name; the whole key is in the file."""


class FinishedParts:
    """A folder of results, each under a name and the key that it holds for."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if it is not there.

        :raises CocoaError: If it cannot be made.
        """
        self.folder = folder
        make_folder(folder)

    def path(self, name: str, key: Mapping[str, Any]) -> Path:
        """Return where the result of that name and key is, or would be."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{name}-{digest[:NAME_DIGITS]}.json"

    def read(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result of that name and key; None where there is none that can be read."""
        try:
            document: dict[str, Any] = json.loads(self.path(name, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return document if isinstance(document, dict) and document.get("key") == dict(key) else None

    def write(self, name: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result, whole or not at all, and return it with its key.

        :raises CocoaError: If it cannot be written.
        """
        document = {**result, "key": dict(key)}
        write_result(self.path(name, key), json.dumps(document) + "\n")
        return document


def make_folder(folder: Path) -> None:
    """Make a folder if it is not there.

    :raises CocoaError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CocoaError(
            f"{printable(folder)} cannot be made ({one_line(error)}); give another folder with --out"
        ) from error


def write_result(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all.

    :raises CocoaError: If it cannot be written.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        raise CocoaError(f"{printable(path)} cannot be written ({one_line(error)})") from error
