"""Images inside Parquet and Arrow files, as in data sets on the Hugging Face hub."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING, Any, BinaryIO

from cocoa_embed.data.places import Place, open_binary, open_text, suffix_of
from cocoa_embed.data.tables import open_table
from cocoa_embed.errors import ImageError, RowError, printable, require
from cocoa_embed.images.load import check_size, image_size
from cocoa_embed.sources.base import Record
from cocoa_embed.sources.shard_files import Kind, ShardFile, give

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 64
"""Rows that are decoded together."""

ADDRESS_COLUMNS = ("url", "image_url", "img_url", "image", "address")
"""The names of a column of addresses, in lower case; the first that a table has is read."""

BUFFER_BYTES = 2**20
"""How much of a column is read at once, instead of its whole chunk in a row group."""


def read_table(file: ShardFile) -> Iterator[Record]:
    """Yield the images of a table's rows; a row is named by its number from 0, and its other columns are metadata.

    :raises ImageError: If the table has no images.
    :raises Exception: If it cannot be read to its end.
    """
    first = 0
    named: list[str] | None = None
    later, empty = list[str](), list[str]()
    for batch in batches(file.place):
        if named is None:
            named, empty = image_columns(batch)
        if not named:
            raise ImageError(file.key, f"has no images (columns: {', '.join(batch.schema.names)}); a column of images"
                             " has bytes, or {bytes, path}")  # fmt: skip
        later += [name for name in empty if _begins_with_image(batch[name])]
        empty = [name for name in empty if _first_content(batch[name]) is None]
        others = [name for name in batch.schema.names if name not in (*named, *later)]
        for number, row in enumerate(batch.select(others).to_pylist(), first):
            for column in (*named, *later):
                cell = batch[column][number - first].as_py()
                for position, (content, path) in enumerate(_images(cell, file.key)):
                    name = _name(number, "" if named == [column] else column, position)
                    yield file.make_record(name, content, {**row, **({"file_name": path} if path else {})})
        first += batch.num_rows


def read_cell(opened: BinaryIO, file: str, name: str) -> bytes:
    """Return the bytes of one image of a table, from the row group that holds it.

    :param name: ``17``, ``17:column``, ``17[2]`` or ``17:column[2]``, as ``read_table`` names it.
    :raises ImageError: If there is none, or it has no bytes.
    """
    key = printable(f"{file}#{name}")
    digits = re.match(r"\d+", name)
    if digits is not None:
        number = int(digits[0])
        named, row = image_cells(opened, file, number)
        for column, cell in row.items():
            for position, (content, _) in enumerate(_images(cell, key)):
                if name == _name(number, "" if named == [column] else column, position):
                    return give(content)
    raise ImageError(key, "is not an image in the table")


def image_cells(opened: BinaryIO, file: str, number: int) -> tuple[list[str], dict[str, Any]]:
    """Return the columns that begin with images, and a row's cells in them and in those that begin empty, by column.

    Both are empty if there is no such row.
    """
    import pyarrow.parquet as parquet

    first, named, columns = 0, list[str](), None
    if suffix_of(file) == ".parquet":
        table = parquet.ParquetFile(opened, buffer_size=BUFFER_BYTES)
        named = columns = [field.name for field in table.schema_arrow if _holds_bytes(field.type)]
        if len(columns) > 1:
            named, empty = image_columns(next(table.iter_batches(ROWS_AT_ONCE, columns=columns)))
            columns = [*named, *empty]
        starts = [0, *accumulate(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups))]
        group = max(0, bisect_right(starts[:-1], number) - 1)
        first, rows = starts[group], table.iter_batches(ROWS_AT_ONCE, [group], columns)
    else:
        rows = batches_of(opened, file)
    for batch in rows:
        if columns is None:
            named, empty = image_columns(batch)
            columns = [*named, *empty]
        if number < first + batch.num_rows:
            return named, {column: batch[column][number - first].as_py() for column in columns}
        first += batch.num_rows
    return [], {}


def batches(place: Place) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet or Arrow file.

    :raises Exception: If it cannot be read.
    """
    require("pyarrow", "tables")
    with open_binary(place) as file:
        yield from batches_of(file, str(place))


def batches_of(opened: BinaryIO, file: str) -> Iterator[pa.RecordBatch]:
    """Yield the rows of an opened Parquet or Arrow file.

    :param file: Its name.
    :raises Exception: If it cannot be read.
    """
    import pyarrow.ipc as ipc
    import pyarrow.parquet as parquet

    if suffix_of(file) == ".parquet":
        yield from parquet.ParquetFile(opened, buffer_size=BUFFER_BYTES).iter_batches(batch_size=ROWS_AT_ONCE)
        return
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    if is_file:
        reader = ipc.open_file(opened)
        whole = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        whole = iter(ipc.open_stream(opened))
    for batch in whole:
        yield from (batch.slice(start, ROWS_AT_ONCE) for start in range(0, batch.num_rows, ROWS_AT_ONCE))


def has_addresses(place: Place) -> bool:
    """Return whether a table has no images, but a column that may hold the addresses of images."""
    batch = None
    with suppress(Exception):  # reading all of it reports what is wrong
        batch = next(batches(place), None)
    return batch is not None and image_columns(batch) == ([], []) and address_column(batch.schema.names) is not None


def address_column(names: Iterable[str]) -> str | None:
    """Return the column that may hold addresses, None if there is none."""
    by_lower_case = {name.lower(): name for name in names}
    return next((by_lower_case[name] for name in ADDRESS_COLUMNS if name in by_lower_case), None)


def table_rows(place: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a table, or the lines of a list as ``url``, each with its number: lines from 1, rows from 0.

    :raises Exception: If it cannot be read.
    """
    suffix = suffix_of(place)
    if suffix == ".txt":
        with open_text(place, "utf-8-sig") as file:
            lines = ((str(number), line.strip()) for number, line in enumerate(file, 1))
            yield from ((number, {"url": line}) for number, line in lines if line and not line.startswith("#"))
        return
    if suffix in KIND.suffixes:
        rows: Iterator[Any] = (row for batch in batches(place) for row in batch.to_pylist())
    else:
        table = open_table(place)
        rows = (row for _, row in table.read(table.columns))
    yield from ((str(number), {} if isinstance(row, RowError) else row) for number, row in enumerate(rows))


def image_columns(batch: pa.RecordBatch) -> tuple[list[str], list[str]]:
    """Return the columns of images, and columns of bytes without a value in this batch, which may hold images later.

    Of several columns of bytes, those whose first bytes are an image hold images; if there are none, all do.
    """
    names = [field.name for field in batch.schema if _holds_bytes(field.type)]
    named = [name for name in names if _begins_with_image(batch[name])] or names
    return named, [name for name in names if name not in named and _first_content(batch[name]) is None]


def _begins_with_image(cells: pa.Array) -> bool:
    content = _first_content(cells)
    try:
        return content is not None and image_size(content, "") is not None
    except ImageError:
        return False


def _first_content(cells: pa.Array) -> bytes | None:
    contents = (content for cell in cells for content, _ in _images(cell.as_py(), ""))
    return next((content for content in contents if isinstance(content, bytes)), None)


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(member.name == "bytes" and _holds_bytes(member.type) for member in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _images(cell: Any, name: str) -> Iterator[tuple[bytes | ImageError, str | None]]:  # noqa: ANN401
    """Yield the images of a cell, with the names of their files; nothing for a cell without a value."""
    if isinstance(cell, list):
        for each in cell:
            yield from _images(each, name)
    elif isinstance(cell, dict):
        path = cell.get("path")
        if cell.get("bytes") is not None:
            yield from ((content, path) for content, _ in _images(cell["bytes"], name))
        elif path:
            yield ImageError(name, f"has no bytes, only the path {path!a}"), path
    elif isinstance(cell, bytes):
        try:
            check_size(len(cell), name)
            yield cell, None
        except ImageError as error:
            yield error, None


def _name(row: int, column: str, position: int) -> str:
    """Return the name of an image: the row, with the column if there are several, and the position in a list."""
    return str(row) + (f":{column}" if column else "") + (f"[{position}]" if position else "")


KIND = Kind("table", (".parquet", ".arrow"), read_table, "pyarrow", "tables", read_one=read_cell)
