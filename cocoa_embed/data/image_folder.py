"""Reads the metadata of an image folder: a file name, usually a text, and other columns for each image."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cocoa_embed.data.rows import check_unicode
from cocoa_embed.data.tables import open_table
from cocoa_embed.errors import CocoaError, RowError, printable

METADATA_FILE = "metadata.jsonl"
METADATA_FILES = (METADATA_FILE, "metadata.csv", "metadata.parquet")
"""The files that may hold an image folder's metadata; a folder has one of them."""


class DescribedImage(NamedTuple):
    """A row of an image folder's metadata.

    :param source: The row's name in error messages.
    :param path: The absolute path of the image.
    :param columns: All values, by column.
    """

    source: str
    path: Path
    columns: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The image's non-empty text.

        :raises RowError: If it has none.
        """
        text = self.columns.get("text")
        if not isinstance(text, str):
            raise RowError(self.source, f"has no 'text' ({_found(self.columns)}); call the column of captions 'text', "
                           "or remove the row")  # fmt: skip
        if not text.strip():
            raise RowError(self.source, "has an empty 'text'; write one, or remove the row")
        return check_unicode(text, self.source)


def find_metadata(folder: Path) -> Path:
    """Return the metadata file of an image folder.

    :raises CocoaError: If the folder does not exist, or has not exactly one of ``METADATA_FILES``.
    """
    name = printable(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise CocoaError(f"{name} {kind}; give a folder of images with {METADATA_FILE}.")
    found = [file for file in METADATA_FILES if (folder / file).is_file()]
    if len(found) > 1:
        raise CocoaError(f"{name} has {' and '.join(found)}; keep one of them.")
    if not found:
        others = " or ".join(METADATA_FILES[1:])
        raise CocoaError(f"{name} has no {METADATA_FILE} (nor {others}); write one JSON object a line, with file_name "
                         "and text.")  # fmt: skip
    return folder / found[0]


def read_metadata(metadata: Path, must_exist: bool = True) -> Iterator[DescribedImage | RowError]:
    """Yield the rows of a metadata file in order, or the errors of rows that cannot be used.

    :param metadata: The file; ``file_name`` is relative to its folder.
    :param must_exist: Whether a missing image is an error.
    :raises CocoaError: If the file cannot be read.
    """
    table = open_table(metadata)
    for source, row in table.read(table.columns, lists=("captions",)):
        try:
            if isinstance(row, RowError):
                raise row
            path = _image_path(metadata.parent, source, row, must_exist)
            yield DescribedImage(f"{printable(metadata)}, {row['file_name']}", path, row)
        except RowError as error:
            yield error


def _image_path(folder: Path, source: str, row: Mapping[str, Any], must_exist: bool) -> Path:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise RowError(source, f"has no 'file_name' ({_found(row)}); give the image's path, relative to the folder")
    if not isinstance(row.get("text"), str | None):
        raise RowError(source, f"has a text that is a {type(row['text']).__name__}; expected a string")
    image = (folder / name).absolute()
    if "\0" in name or (must_exist and not image.is_file()):
        raise RowError(source, f"names {name!r}, which is not in {printable(folder)}")
    return image


def _found(row: Mapping[str, Any]) -> str:
    return f"columns found: {', '.join(row) or 'none'}"
