"""Reads pairs of one's own: an image folder with ``metadata.jsonl``, or a JSONL, CSV or Parquet table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable, require
from cocoa_embed.evaluation.embed import Item
from cocoa_embed.evaluation.pairs import Pair
from cocoa_embed.images.find_files import METADATA_FILE, parse_json_line, read_image_folder_metadata

Entry = tuple[str, dict[str, Any]]
"""A row's place, for errors, and its values by column."""


@dataclass(frozen=True)
class PairColumns:
    """Which column holds which part of a pair; a part without a column is not there.

    A text's column may hold a list of texts, each of which makes a pair of its own. An image is a path, or the bytes of
    a file inside a Parquet table.
    """

    query_text: str | None = None
    query_image: str | None = None
    positive_text: str | None = None
    positive_image: str | None = None

    @property
    def names(self) -> list[str]:
        """The columns that are named."""
        return [name for name in asdict(self).values() if name is not None]


KNOWN_COLUMNS = (
    PairColumns(query_text="text", positive_image="image"),
    PairColumns(query_text="text", positive_image="file_name"),
    PairColumns(query_text="caption", positive_image="image"),
)
"""What is looked for where no column is named and none is called as in ``PairColumns``."""

ROWS_AT_ONCE = 256


def read_pairs(data: Path, images: Path | None = None, columns: PairColumns | None = None) -> list[Pair]:
    """Read pairs.

    :param data: An image folder, or a ``.jsonl``, ``.csv`` or ``.parquet`` file.
    :param images: The folder that relative paths of images in a table start from; by default that of the table.
    :param columns: Which columns of a table to use; by default those called as ``PairColumns`` calls them, or else
        the first of ``KNOWN_COLUMNS`` that are there.
    :raises CocoaError: If there is no such file, it cannot be read, or a row is not as it should be.
    """
    if data.is_dir():
        if images is not None or columns is not None:
            raise UsageError(f"{printable(data)} is an image folder; its columns and images are known, name a table")
        return _pairs_of_image_folder(data)
    entries = list(_read_table(data))
    if not entries:
        raise CocoaError(f"{printable(data)} has no rows")
    chosen = _choose(data, columns, list(dict.fromkeys(name for _, row in entries for name in row)))
    folder = data.parent if images is None else images
    return [pair for place, row in entries for pair in _pairs_of_row(place, row, chosen, folder)]


def _pairs_of_image_folder(folder: Path) -> list[Pair]:
    pairs = []
    for row in read_image_folder_metadata(folder):
        if not row.get("text"):
            raise CocoaError(f"{printable(folder / METADATA_FILE)} has no text for {row['file_name']!r}")
        _require_unicode(row["text"])
        pairs.append(Pair(Item(text=row["text"]), Item(image=str(row["path"]))))
    return pairs


def _read_table(path: Path) -> Iterator[Entry]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if not path.is_file():
        raise CocoaError(f"{printable(path)} does not exist; name an image folder or a {' or '.join(readers)} file")
    if path.suffix.lower() not in readers:
        raise CocoaError(f"{printable(path)} is not a table; expected {' or '.join(readers)} as its suffix")
    try:
        yield from readers[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error) as error:
        raise CocoaError(f"{printable(path)} cannot be read ({one_line(error)})") from error


def _read_jsonl(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{printable(path)}:{number}"
            if not line.strip():
                continue
            row = parse_json_line(place, line)
            if not isinstance(row, dict):
                raise CocoaError(f"{place} is a JSON {type(row).__name__}; expected an object, a value for each column")
            yield place, row


def _read_csv(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        header = next(lines, [])
        for number, cells in enumerate(filter(None, lines), 1):
            place = f"{printable(path)}, row {number}"
            if len(cells) != len(header):
                raise CocoaError(f"{place} has {len(cells)} cells; the header has {len(header)} columns")
            yield place, dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[Entry]:
    parquet, arrow = require("pyarrow.parquet", "eval"), require("pyarrow", "eval")
    try:
        with parquet.ParquetFile(path) as table:
            rows = (row for batch in table.iter_batches(batch_size=ROWS_AT_ONCE) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{printable(path)}, row {number}", row
    except arrow.ArrowException as error:
        raise CocoaError(f"{printable(path)} cannot be read ({one_line(error)})") from error


def _choose(data: Path, asked: PairColumns | None, found: list[str]) -> PairColumns:
    """Return the columns to use.

    :raises CocoaError: If one that was asked for is missing, or a side of the pairs has none.
    """
    if asked is None:
        own_names = PairColumns(**{part: part for part in asdict(PairColumns()) if part in found})
        fitting = (
            columns for columns in (own_names, *KNOWN_COLUMNS) if columns.names and set(columns.names) <= set(found)
        )
        asked = next(fitting, own_names)
    listed = f"found are {', '.join(found) or 'none'}"
    if missing := [name for name in asked.names if name not in found]:
        raise CocoaError(f"{printable(data)} has no column {' and no '.join(missing)}; {listed}")
    if not (asked.query_text or asked.query_image) or not (asked.positive_text or asked.positive_image):
        raise CocoaError(
            f"{printable(data)}: which columns are pairs is not clear ({listed}); name one for each side with"
            " --query-text, --query-image, --positive-text and --positive-image"
        )
    return asked


def _pairs_of_row(place: str, row: dict[str, Any], columns: PairColumns, images: Path) -> list[Pair]:
    queries = _items(place, row, columns.query_text, columns.query_image, images)
    documents = _items(place, row, columns.positive_text, columns.positive_image, images)
    return [Pair(query, document) for query in queries for document in documents]


def _items(place: str, row: dict[str, Any], text: str | None, image: str | None, images: Path) -> list[Item]:
    """Return one side of a row's pairs: an item for each of its texts, all with the same image.

    :raises CocoaError: If there is neither a text nor an image.
    """
    texts: list[str | None] = [*_texts(place, text, row.get(text))] if text else []
    picture = _image(place, image, row.get(image), images) if image else None
    if not texts and picture is None:
        raise CocoaError(f"{place}: nothing is in {' and nothing in '.join(filter(None, (text, image)))}")
    return [Item(each, picture) for each in texts or [None]]


def _texts(place: str, column: str, value: object) -> list[str]:
    texts: list[str] = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str | None):
            raise CocoaError(f"{place}: {column} holds a {type(text).__name__}; expected text")
        if text:
            _require_unicode(text)
            texts.append(text)
    return texts


def _require_unicode(text: str) -> None:
    from cocoa_embed.encode.encoder import require_unicode  # imports torch

    require_unicode(text)


def _image(place: str, column: str, value: object, images: Path) -> str | bytes | None:
    if isinstance(value, dict):  # as data sets keep images inside Parquet
        value = value.get("bytes") or value.get("path")
    if not value:
        return None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise CocoaError(f"{place}: {column} holds a {type(value).__name__}; expected the path of an image")
    path = (images / value).absolute()
    if "\0" in value or not path.is_file():
        raise CocoaError(f"{place}: {column} names {value!r}, which is not in {printable(images)}")
    return str(path)
