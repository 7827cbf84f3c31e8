"""Tables of named values in JSONL, CSV and Parquet files."""

import codecs
import csv
import glob
import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from cocoa_embed.data.places import Place, open_text, reading, remote_places, suffix_of
from cocoa_embed.errors import CocoaError, RowError, one_line, printable, require
from cocoa_embed.images.find_files import match_pattern

Entry = tuple[str, dict[str, Any] | RowError]
"""A row's name in error messages, and its values by column, or the error of a malformed row."""

TABLE_SUFFIXES = ".jsonl, .csv or .parquet"

DELIMITERS = ",;\t"

logger = logging.getLogger(__name__)


class Table(Protocol):
    """Rows of named values."""

    def __len__(self) -> int: ...

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns."""
        ...

    def read(self, columns: Collection[str], lists: Collection[str] = ()) -> Iterator[Entry]:
        """Yield the rows in order, with at least the existing columns of ``columns``.

        :param lists: The columns that may hold lists, which CSV files write as JSON.
        """
        ...


@dataclass(frozen=True)
class TextTable:
    """The rows of a JSONL or CSV file, which is read again each time.

    :param entries: Reads the file, given the columns that may hold lists.
    """

    columns: Sequence[str]
    length: int
    entries: Callable[[Collection[str]], Iterator[Entry]]

    def __len__(self) -> int:
        return self.length

    def read(self, columns: Collection[str], lists: Collection[str] = ()) -> Iterator[Entry]:
        """Yield the rows, with lists in the columns of ``lists``."""
        return self.entries(lists)


def find_files(pattern: str, kind: str = f"{TABLE_SUFFIXES} file") -> list[Place]:
    """Return the file of this name, or the files that match a glob, sorted; also those of a remote file system.

    :raises CocoaError: If there are none.
    """
    if "://" in pattern:
        found: list[Place] = [*remote_places(pattern)]
    else:
        found = [path for path in match_pattern(Path(pattern)) if path.is_file()]
    if not found:
        fault = "is a folder" if Path(pattern).is_dir() else "does not exist"
        fault += " and matches no file" if glob.has_magic(pattern) else ""
        raise CocoaError(f"{printable(pattern)} {fault}; give a {kind}, or a glob of such files.")
    return found


def open_table(path: Place) -> Table:
    """Open a JSONL, CSV or Parquet file, by its suffix. Its rows stay on disk.

    :raises CocoaError: If it has another suffix, or cannot be read.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        require("datasets", "eval")
        from cocoa_embed.data.arrow_table import open_parquet

        return open_parquet(path)
    if suffix not in (".jsonl", ".csv"):
        raise CocoaError(f"{printable(path)} is not a table; expected a {TABLE_SUFFIXES} file.")
    is_csv = suffix == ".csv"
    with reading(path):
        encoding = _encoding(path, others=is_csv)
        entries = partial(_read_csv if is_csv else _read_jsonl, path, encoding)
        columns = dict.fromkeys(_read_header(path, encoding) if is_csv else ())
        length = 0
        for _, row in entries(()):
            length += 1
            columns |= dict.fromkeys(row) if isinstance(row, dict) else {}
    return TextTable(list(columns), length, entries)


def _encoding(path: Place, *, others: bool) -> str:
    """Return the encoding of a file; if it is neither UTF-8 nor UTF-16, Windows-1252 if ``others`` are allowed.

    :raises ValueError: If it is in none of them.
    """
    with open_text(path, "latin-1") as file:
        start = file.read(1000)
    if start.startswith((codecs.BOM_UTF16_LE.decode("latin-1"), codecs.BOM_UTF16_BE.decode("latin-1"))):
        return "utf-16"
    if "\0" in start:
        raise ValueError("it holds NUL bytes, as UTF-16 without a byte order mark does; save it as UTF-8")
    for encoding in ("utf-8-sig", *(["cp1252"] if others else [])):
        try:
            with open_text(path, encoding) as file:
                while file.read(2**20):
                    pass
        except UnicodeDecodeError:
            continue
        if encoding == "cp1252":
            logger.warning("%s is not UTF-8 and is read as Windows-1252; if its letters come out wrong, save it as "
                           "UTF-8.", printable(path))  # fmt: skip
        return encoding
    raise ValueError("it is not UTF-8; save it as UTF-8")


def _read_jsonl(path: Place, encoding: str, _: Collection[str]) -> Iterator[Entry]:
    with reading(path), open_text(path, encoding, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _read_line(f"{printable(path)}:{number}", line)


def _read_line(source: str, line: str) -> Entry:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return source, RowError(source, f"is not JSON ({one_line(error)})")
    if not isinstance(row, dict):
        return source, RowError(source, f"is a JSON {type(row).__name__}; expected an object, a value for each column")
    return source, row


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON value")


def _read_header(path: Place, encoding: str) -> list[str]:
    with open_text(path, encoding) as file:
        header = next(_csv_cells(file), [])
    if repeated := [column for column in header if header.count(column) > 1]:
        raise ValueError(f"its header has the column {repeated[0]!r} twice")
    return header


def _csv_cells(lines: Iterator[str]) -> Iterator[list[str]]:
    """Yield the cells of each line, split at the delimiter of the first line.

    :raises ValueError: If a quote is not closed, or not doubled inside a cell: the end of the cell is unknown.
    """
    header = next(lines, "")
    reader, start = csv.reader(chain([header], lines), delimiter=max(DELIMITERS, key=header.count), strict=True), 1
    try:
        for cells in reader:
            yield cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {start}: {error}; inside a quoted cell, write each quote twice") from error


def _read_csv(path: Place, encoding: str, lists: Collection[str]) -> Iterator[Entry]:
    with reading(path), open_text(path, encoding) as file:
        lines = _csv_cells(file)
        header = next(lines, [])
        for number, cells in enumerate(filter(None, lines), 1):
            source = f"{printable(path)}, row {number}"
            if len(cells) == len(header):
                columns = zip(header, cells, strict=True)
                yield source, {name: _parse_list(cell) if name in lists else cell or None for name, cell in columns}
            else:
                fault = f"has {len(cells)} cells; the header has {len(header)} columns"
                yield source, RowError(source, fault)


def _parse_list(cell: str) -> object:
    """Return the list that a CSV cell holds as JSON, or the cell itself if it holds none; None for an empty cell."""
    if not cell.lstrip().startswith("["):
        return cell or None
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell
