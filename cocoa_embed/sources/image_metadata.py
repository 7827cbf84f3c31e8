"""Describes the images of a source: the metadata of their folder and the folders above."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from cocoa_embed.data.image_folder import METADATA_FILES, find_metadata, read_metadata
from cocoa_embed.errors import CocoaError, RowError

FOLDERS_KEPT = 64
"""Folders whose metadata stay in memory: those of the images at hand and the folders above."""


class Description(NamedTuple):
    """What the metadata say about one image."""

    metadata: dict[str, Any]
    """JSON values: the caption as ``text``, if there is one, and other columns."""
    source: str | None
    """The first file that describes the image; None if none does."""
    checked_sources: frozenset[str]
    """The metadata files, read without a fault, that could describe the image: it has left the others unread."""


@dataclass
class FolderMetadata:
    """The metadata of one folder, by the absolute path of each image."""

    source: str | None = None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_whole: bool = False


class ImageMetadata:
    """Describes images; each metadata file is read once, when the first image that it may describe is."""

    def __init__(self, on_error: Callable[[str, str], object]) -> None:
        """Remember whom to tell of faults."""
        self._on_error = on_error
        self._read = lru_cache(maxsize=FOLDERS_KEPT)(self._read_folder)

    def describe(self, image: Path, root: Path) -> Description:
        """Return what is known about an image.

        :param image: An absolute path.
        :param root: The folder that is searched; those above are not read.
        """
        above = (folder for folder in image.parent.parents if folder.is_relative_to(root))
        folders = [self._read(folder) for folder in (*reversed([*above]), image.parent)]
        metadata: dict[str, Any] = {}
        found = [folder for folder in folders if str(image) in folder.rows]
        for folder in found:
            merge(metadata, folder.rows[str(image)])
        checked = frozenset(folder.source for folder in folders if folder.source and folder.is_whole)
        return Description(metadata, found[0].source if found else None, checked)

    def _read_folder(self, folder: Path) -> FolderMetadata:
        found = FolderMetadata()
        metadata = next((path for name in METADATA_FILES if (path := folder / name).exists()), None)
        if metadata is None:
            return found
        found.source, found.is_whole = str(metadata), True
        try:
            for row in read_metadata(find_metadata(folder)):
                if isinstance(row, RowError):
                    self._on_error(row.source, row.reason)
                    found.is_whole = False
                else:
                    columns = {name: value for name, value in row.columns.items() if name != "file_name"}
                    if columns.get("text") is None:
                        columns.pop("text", None)
                    merge(found.rows.setdefault(os.path.abspath(row.path), {}), columns)
        except CocoaError as error:
            self._on_error(str(metadata), str(error))
            found.is_whole = False
        return found


def merge(known: dict[str, Any], new: dict[str, Any]) -> None:
    """Add columns to those of the same image: the texts as lines, and columns that are not there yet."""
    # Tables have values that JSON does not have: dates become strings, numbers that are not finite become null.
    for name, value in json.loads(json.dumps(new, default=str), parse_constant=lambda _: None).items():
        if name == "text" and "text" in known:
            known["text"] = f"{known['text']}\n{value}"
        else:
            known.setdefault(name, value)
