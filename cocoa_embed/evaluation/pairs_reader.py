"""Read pairs for evaluation from an image folder, or from a JSONL, CSV or Parquet table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from cocoa_embed.data import CaptionChoice
from cocoa_embed.data.columns import RowReader, map_columns
from cocoa_embed.data.image_folder import find_metadata, read_metadata
from cocoa_embed.data.places import suffix_of
from cocoa_embed.data.rows import ArrowImage, Item
from cocoa_embed.data.tables import TABLE_SUFFIXES, open_table
from cocoa_embed.errors import CocoaError, RowError, UsageError, printable

TEXTS = TypeAdapter(list[str])


class Pair(NamedTuple):
    """Two items that belong together. In one direction the first is the query, in the other the second."""

    first: Item
    second: Item


def read_pairs(
    data: Path,
    images: Path | None = None,
    columns: Mapping[str, str] | None = None,
    captions: CaptionChoice = "captions",
) -> list[Pair]:
    """Read pairs.

    :param data: An image folder, or a ``.jsonl``, ``.csv`` or ``.parquet`` file. A text's cell may hold a list of
        texts (in a CSV file, a JSON list of strings only), each of which makes a pair.
    :param images: The folder of a table's relative image paths; by default that of the table.
    :param columns: The columns of ``query_text``, ``query_image``, ``positive_text`` and ``positive_image``; by default
        those of ``map_columns``.
    :param captions: For an image folder: a pair for each entry of an image's list ``captions``, or for its ``text``.
    :raises CocoaError: If the data are missing or cannot be read, or a row is malformed.
    """
    if data.is_dir():
        if images is not None or columns:
            raise UsageError(
                f"{printable(data)} is an image folder, which takes neither --images nor column options; leave them"
                " out, or name a table"
            )
        pairs = list(_image_folder_pairs(data, captions))
    elif not data.exists():
        raise CocoaError(f"{printable(data)} does not exist; name an image folder or a {TABLE_SUFFIXES} file")
    else:
        pairs = list(_table_pairs(data, data.parent if images is None else images, columns))
    if not pairs:
        raise CocoaError(f"{printable(data)} has no rows")
    return pairs


def _image_folder_pairs(folder: Path, captions: CaptionChoice) -> Iterator[Pair]:
    for image in read_metadata(find_metadata(folder)):
        if isinstance(image, RowError):
            raise image
        yield from (Pair(Item(text), Item(images=(image.path,))) for text in image.texts(captions))


def _table_pairs(data: Path, images: Path, columns: Mapping[str, str] | None) -> Iterator[Pair]:
    table = open_table(data)
    if not len(table):
        return
    mapping = map_columns(printable(data), table.columns, columns, lambda part: f"--{part.replace('_', '-')}")
    reader = RowReader(mapping, images)
    texts = [mapping[part] for part in ("query_text", "positive_text") if part in mapping]
    first: dict[bytes, ArrowImage] = {}
    for source, values in table.read(set(mapping.values())):
        if isinstance(values, RowError):
            raise values
        if suffix_of(data) == ".csv":
            values |= {column: _parse_texts(values[column]) for column in texts}
        for each in _single_texts(values, texts):
            row = reader.row(each, source)
            yield Pair(_merged(row.query, first), _merged(row.positive, first))


def _parse_texts(cell: str | None) -> list[str] | str | None:
    """Return the texts that a CSV cell lists as JSON, or the cell if it is not a list of texts (``[1987]``)."""
    try:
        return TEXTS.validate_json(cell or "") or cell
    except ValueError:
        return cell


def _single_texts(values: Mapping[str, Any], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a row's values with one text per cell, for each combination of the texts in its cells."""
    cells = [values.get(column) for column in columns]
    lists = [([text for text in cell if text] or [None]) if isinstance(cell, list) else [cell] for cell in cells]
    for texts in product(*lists):
        yield {**values, **dict(zip(columns, texts, strict=True))}


def _merged(item: Item, first: dict[bytes, ArrowImage]) -> Item:
    """Return an item with the first image in the table that has the same bytes, so that copies are one item."""
    if not isinstance(item.image, ArrowImage):
        return item
    return replace(item, images=(first.setdefault(hashlib.sha256(item.image.read()).digest(), item.image),))
