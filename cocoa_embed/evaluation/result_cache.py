"""Results of an evaluation on disk: a file for each finished part, written atomically."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.folders import write_atomically

DIGEST_DIGITS = 12
"""The number of hexadecimal digits of a key's digest in its file's name; the whole key is in the file."""


class ResultCache:
    """A folder of results, each stored under a name and a key that holds all that the result depends on."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if it does not exist.

        :raises CocoaError: If it cannot be made.
        """
        self.folder = folder
        make_folder(folder)

    def read(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result of this name and key; None if there is none, or it cannot be read."""
        try:
            document: dict[str, Any] = json.loads(self._path(name, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return document if isinstance(document, dict) and document.get("key") == dict(key) else None

    def write(self, name: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a result with its key.

        :raises CocoaError: If it cannot be written.
        """
        write_result(self._path(name, key), json.dumps({**result, "key": dict(key)}) + "\n")

    def _path(self, name: str, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{name}-{digest[:DIGEST_DIGITS]}.json"


def make_folder(folder: Path) -> None:
    """Make a folder for results if it does not exist.

    :raises CocoaError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CocoaError(
            f"{printable(folder)} cannot be made ({one_line(error)}); give another folder with --out"
        ) from error


def write_result(path: Path, text: str) -> None:
    """Write a text file atomically.

    :raises CocoaError: If it cannot be written.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        raise CocoaError(f"{printable(path)} cannot be written ({one_line(error)})") from error
