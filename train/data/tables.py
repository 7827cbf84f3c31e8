"""Tables from JSONL, CSV and Parquet files, and from data sets that ``datasets`` loads: rows of named values."""

import csv
import glob
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets.exceptions import DatasetGenerationError, DatasetsError

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.images.find_files import MetadataError, parse_json_line
from cocoa_embed.train.data.arrow_images import StoredTable

Entry = tuple[str, dict[str, Any] | MetadataError]
"""A row's place, for errors, and its values by column, or what is wrong with it."""

TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")

UNREADABLE = (OSError, ValueError, RuntimeError, csv.Error, pa.ArrowException, DatasetsError)
"""What the readers of these formats raise for a table that is not there or broken."""


class Table(Protocol):
    """Rows of named values."""

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns."""

    def read(self, columns: Collection[str], lists: Collection[str] = ()) -> Iterator[Entry]:
        """Yield the rows in their order, with those of ``columns`` that are there.

        :param lists: The columns that may hold several values, which formats without lists write as JSON.
        """


@dataclass(frozen=True)
class JsonTable:
    """A JSONL file; a row that leaves a column out has nothing in it."""

    entries: Sequence[Entry]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of all rows, in the order of their appearance."""
        return tuple(dict.fromkeys(key for _, row in self.entries if isinstance(row, dict) for key in row))

    def read(self, columns: Collection[str], lists: Collection[str] = ()) -> Iterator[Entry]:
        """Yield the rows; JSON has lists of its own."""
        return iter(self.entries)


@dataclass(frozen=True)
class CsvTable:
    """A CSV file with a header."""

    columns: tuple[str, ...]
    entries: Sequence[Entry]

    def read(self, columns: Collection[str], lists: Collection[str] = ()) -> Iterator[Entry]:
        """Yield the rows, cells of ``lists`` that are lists in JSON as such."""
        for place, row in self.entries:
            if isinstance(row, dict):
                row = {key: _listed(cell) if key in lists else cell for key, cell in row.items() if key in columns}
            yield place, row


def _listed(cell: str | None) -> object:
    """Return the list that a cell of a CSV file holds as JSON, or the cell itself where it holds none."""
    if cell is None or not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def find_tables(pattern: str) -> list[Path]:
    """Return the file of that name, or the files that match a glob, sorted.

    :raises CocoaError: If there are none.
    """
    if Path(pattern).is_file():
        return [Path(pattern)]
    if not glob.has_magic(pattern):
        kind = "is a folder" if Path(pattern).is_dir() else "does not exist"
        raise CocoaError(
            f"{printable(pattern)} {kind}; give a {_either(TABLE_SUFFIXES)} file, or a glob of such files."
        )
    found = sorted(path for name in glob.glob(pattern, recursive=True) if (path := Path(name)).is_file())
    if not found:
        raise CocoaError(f"No file matches {printable(pattern)}; give a {_either(TABLE_SUFFIXES)} file or a glob.")
    return found


def _either(values: Sequence[str]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"


def open_table(path: Path) -> Table:
    """Open a JSONL, CSV or Parquet file, as its suffix says. The rows of a Parquet file stay on disk.

    :raises CocoaError: If it has another suffix, or cannot be read.
    """
    openers: dict[str, Callable[[Path], Table]] = {".jsonl": _open_jsonl, ".csv": _open_csv, ".parquet": _open_parquet}
    opener = openers.get(path.suffix.lower())
    if opener is None:
        raise CocoaError(f"{printable(path)} is not a table; expected {_either(TABLE_SUFFIXES)} as its suffix.")
    try:
        return opener(path)
    except UNREADABLE as error:
        raise CocoaError(f"{printable(path)} cannot be read ({_cause(error)}).") from error


def _cause(error: BaseException) -> str:
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__  # the error itself does not say
    return one_line(error).rstrip(".")


def _open_jsonl(path: Path) -> JsonTable:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        return JsonTable(
            [_read_line(f"{printable(path)}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        )


def _read_line(place: str, line: str) -> Entry:
    try:
        row = parse_json_line(place, line)
    except MetadataError as error:
        return place, error
    if isinstance(row, dict):
        return place, row
    return place, MetadataError(place, f"is a JSON {type(row).__name__}; expected an object, a value for each column")


def _open_csv(path: Path) -> CsvTable:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if repeated := sorted({column for column in header if header.count(column) > 1}):
            raise ValueError(f"its header has the column {repeated[0]!r} twice")
        entries = [
            _read_cells(f"{printable(path)}, row {number}", header, cells)
            for number, cells in enumerate(filter(None, lines), 1)
        ]
    return CsvTable(tuple(header), entries)


def _read_cells(place: str, header: Sequence[str], cells: Sequence[str]) -> Entry:
    if len(cells) != len(header):
        return place, MetadataError(place, f"has {len(cells)} cells; the header has {len(header)} columns")
    return place, {column: cell or None for column, cell in zip(header, cells, strict=True)}


def _open_parquet(path: Path) -> StoredTable:
    if parquet.read_metadata(path).num_rows:
        dataset = datasets.load_dataset("parquet", data_files=[str(path.absolute())], split="train")
    else:  # which load_dataset refuses
        dataset = datasets.Dataset(parquet.read_table(path))
    return StoredTable(printable(path), dataset.with_format("arrow"))


def open_data_set(name: str, config: str | None, splits: Sequence[str]) -> StoredTable:
    """Open a data set on the hub, or in a folder that ``datasets`` reads or wrote.

    :param splits: The first of these that the data set has is opened.
    :raises CocoaError: If it cannot be loaded, or has none of the splits.
    """
    faults: list[BaseException] = []
    for split in splits:
        try:
            dataset = _load_data_set(name, config, split)
        except UNREADABLE as error:
            faults.append(error)
            if not (isinstance(error, ValueError) and "split" in str(error).lower()):
                break
        else:
            return StoredTable(", ".join(filter(None, (name, config, split))), dataset.with_format("arrow"))
    what = printable(", ".join(filter(None, (name, config))))
    raise CocoaError(
        f"The data set {what} cannot be loaded ({_cause(faults[0])}); check its name, config and split, and the way "
        "to the hub if it is not a folder."
    ) from faults[0]


def _load_data_set(name: str, config: str | None, split: str) -> datasets.Dataset:
    folder = Path(name)
    if not any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(name, config, split=split)
    saved = datasets.load_from_disk(name)
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"no split {split!r}; it has {', '.join(saved)}")
    return saved[split]
