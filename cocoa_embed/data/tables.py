"""Tables of named values in JSONL, CSV and Parquet files."""

import csv
import glob
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cocoa_embed.errors import CocoaError, RowError, one_line, printable, require

Entry = tuple[str, dict[str, Any] | RowError]
"""A row's name in error messages, and its values by column, or the error of a malformed row."""

TABLE_SUFFIXES = ".jsonl, .csv or .parquet"


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
    """The rows of a JSONL or CSV file, which is read anew whenever they are.

    :param entries: Reads the file.
    :param lists_are_json: Lists are written as JSON inside of strings.
    """

    columns: Sequence[str]
    length: int
    entries: Callable[[], Iterator[Entry]]
    lists_are_json: bool = False

    def __len__(self) -> int:
        return self.length

    def read(self, columns: Collection[str], lists: Collection[str] = ()) -> Iterator[Entry]:
        """Yield the rows, with lists in the columns of ``lists``."""
        for source, row in self.entries():
            if self.lists_are_json and isinstance(row, dict):
                row = row | {column: _parse_list(row[column]) for column in lists if column in row}
            yield source, row


def find_tables(pattern: str) -> list[Path]:
    """Return the file of this name, or the files that match a glob, sorted.

    :raises CocoaError: If there are none.
    """
    if Path(pattern).is_file():
        return [Path(pattern)]
    found = sorted(path for name in glob.glob(pattern, recursive=True) if (path := Path(name)).is_file())
    if not found:
        fault = "is a folder" if Path(pattern).is_dir() else "does not exist"
        fault += " and matches no file" if glob.has_magic(pattern) else ""
        raise CocoaError(f"{printable(pattern)} {fault}; give a {TABLE_SUFFIXES} file, or a glob of such files.")
    return found


def open_table(path: Path) -> Table:
    """Open a JSONL, CSV or Parquet file, by its suffix. The rows of a Parquet file stay on disk.

    :raises CocoaError: If it has another suffix, or cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        require("datasets", "eval")
        from cocoa_embed.data.arrow_table import open_parquet

        return open_parquet(path)
    if suffix not in (".jsonl", ".csv"):
        raise CocoaError(f"{printable(path)} is not a table; expected a {TABLE_SUFFIXES} file.")
    entries = partial(_read_jsonl if suffix == ".jsonl" else _read_csv, path)
    length = 0
    try:
        columns = dict.fromkeys(_read_header(path) if suffix == ".csv" else ())
        for _, row in entries():
            length += 1
            columns |= dict.fromkeys(row) if isinstance(row, dict) else {}
    except (OSError, ValueError, csv.Error) as error:
        raise CocoaError(f"{printable(path)} cannot be read ({one_line(error)}).") from error
    return TextTable(list(columns), length, entries, lists_are_json=suffix == ".csv")


def _read_jsonl(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
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


def _read_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, strict=True), [])
    if repeated := [column for column in header if header.count(column) > 1]:
        raise ValueError(f"its header has the column {repeated[0]!r} twice")
    return header


def _read_csv(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        header = next(lines, [])
        for number, cells in enumerate(filter(None, lines), 1):
            yield _read_cells(f"{printable(path)}, row {number}", header, cells)


def _read_cells(source: str, header: Sequence[str], cells: Sequence[str]) -> Entry:
    if len(cells) != len(header):
        return source, RowError(source, f"has {len(cells)} cells; the header has {len(header)} columns")
    return source, {column: cell or None for column, cell in zip(header, cells, strict=True)}


def _parse_list(cell: str | None) -> object:
    """Return the list that a CSV cell holds as JSON, or the cell itself if it holds none."""
    if cell is None or not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell
