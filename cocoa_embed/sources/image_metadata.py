"""Describe images by the metadata of their folder and the folders above, and by text files next to them."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from cocoa_embed.data.image_folder import (
    DescribedImage,
    metadata_file,
    read_metadata,
    read_text,
    text_beside,
    unread_table,
)
from cocoa_embed.errors import CocoaError, RowError, printable
from cocoa_embed.sources.base import as_json

logger = logging.getLogger(__name__)

FOLDERS_KEPT = 64
"""The number of folders whose metadata are kept: those of the current images and the folders above."""


class ImageDescription(NamedTuple):
    """What the metadata say about one image."""

    metadata: dict[str, Any]
    """JSON values: the caption as ``text``, if there is one, and other columns."""
    source: str | None
    """The first file that describes the image; None if none does."""
    checked_sources: frozenset[str]
    """The metadata files, read without an error, that could describe the image, whether or not they do."""


class FolderMetadata:
    """The metadata of one folder, by the absolute path of each image; on disk if they are too large for a cache."""

    def __init__(self, source: str) -> None:
        """Remember the file of the metadata; there are no rows yet."""
        self.source = source
        self.is_whole = True
        """Whether every row could be used."""
        self._rows = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._rows.execute("CREATE TABLE rows (image BLOB PRIMARY KEY, columns TEXT) WITHOUT ROWID")
        self._rows.execute("BEGIN")

    def row(self, image: str) -> dict[str, Any] | None:
        """Return the columns of an image; None if the metadata do not name it."""
        found = self._rows.execute("SELECT columns FROM rows WHERE image = ?", (os.fsencode(image),)).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def add(self, image: DescribedImage) -> None:
        """Add a row. Of several rows of an image, all texts are kept, as lines; of other columns, the first value."""
        path = os.path.abspath(image.path)
        known = self.row(path) or {}
        merge(known, {"text": "\n".join(image.wordings), **image.others} if image.wordings else image.others)
        self._rows.execute("REPLACE INTO rows VALUES (?, ?)", (os.fsencode(path), json.dumps(known)))


class ImageMetadata:
    """Describes images; each metadata file is read once, for the first image that it may describe.

    Images are best described folder by folder: the metadata of the last ``FOLDERS_KEPT`` folders are kept.
    """

    def __init__(self, on_error: Callable[[str, str], object]) -> None:
        """Prepare; nothing is read yet.

        :param on_error: Called with the name of a file or a row that cannot be used, and the reason, once each.
        """
        self._on_error = on_error
        self._noted: set[tuple[str, str]] = set()
        self._read = lru_cache(maxsize=FOLDERS_KEPT)(self._read_folder)

    def describe(self, image: Path, root: Path) -> ImageDescription:
        """Return what is known about an image.

        :param image: An absolute path.
        :param root: The folder that is searched; those above are not read.
        """
        above = (folder for folder in image.parent.parents if folder.is_relative_to(root))
        folders = [*filter(None, map(self._read, (*reversed([*above]), image.parent)))]
        metadata: dict[str, Any] = {}
        source = None
        for folder in folders:
            if (row := folder.row(str(image))) is not None:
                merge(metadata, row)
                source = source or folder.source
        checked = {folder.source for folder in folders if folder.is_whole}
        if "text" not in metadata and (beside := self._text_beside(image)):
            text, file = beside
            checked.add(file)
            if text is not None:
                metadata["text"] = text
                source = source or file
        return ImageDescription(metadata, source, frozenset(checked))

    def _text_beside(self, image: Path) -> tuple[str | None, str] | None:
        """Return the caption in a text file and the file; None if there is none, or it cannot be read."""
        try:
            if path := text_beside(image):
                return read_text(path), str(path)
        except RowError as error:
            self._note(error.source, error.reason)
        except OSError:  # the folder is gone, or cannot be listed: reading the image reports that
            pass
        return None

    def _read_folder(self, folder: Path) -> FolderMetadata | None:
        found = None
        try:
            if (metadata := metadata_file(folder)) is None:
                if hint := unread_table(os.listdir(folder)):
                    logger.warning("%s: %s", printable(folder), hint)
                return None
            found = FolderMetadata(str(metadata))
            for row in read_metadata(metadata):
                if isinstance(row, RowError):
                    self._note(row.source, row.reason)
                    found.is_whole = False
                else:
                    found.add(row)
        except CocoaError as error:
            self._note(str(folder) if found is None else found.source, str(error))
            if found is not None:
                found.is_whole = False
        except OSError:  # the folder cannot be listed: the search reports that
            pass
        return found

    def _note(self, source: str, reason: str) -> None:
        if (source, reason) not in self._noted:
            self._noted.add((source, reason))
            self._on_error(source, reason)


def merge(known: dict[str, Any], new: dict[str, Any]) -> None:
    """Merge new columns of an image into the known ones: texts are joined as lines, missing columns are added."""
    for name, value in as_json(new).items():
        if name == "text" and "text" in known:
            known["text"] = f"{known['text']}\n{value}"
        else:
            known.setdefault(name, value)
