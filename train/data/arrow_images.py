"""Tables that stay on disk, memory-mapped by ``datasets``, and the images inside them."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from cocoa_embed.errors import ImageError, one_line, printable
from cocoa_embed.images.load import check_size

ROWS_AT_ONCE = 256
"""Rows whose values are read together."""

EMBEDDED = object()
"""Stands for a value that is an image's bytes."""


@dataclass(frozen=True)
class StoredTable:
    """A table of ``datasets``: memory-mapped, so that it is small in memory and goes to workers as a file name.

    :param name: What it is called in errors and in the names of its images; tables of one name are the same table.
    :param dataset: In the format ``arrow``, which decodes nothing.
    """

    name: str
    dataset: Dataset = field(compare=False, repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.dataset.column_names)

    def place(self, row: int) -> str:
        """Return what a row is called in errors, counting from 1."""
        return f"{self.name}, row {row + 1}"

    def read(self, columns: Collection[str], lists: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each row's place and its values, embedded images as ``StoredImage``.

        :param columns: The columns to read; those that the table does not have are left out.
        :param lists: Not used: the columns of these tables know whether they hold lists.
        """
        wanted = [column for column in columns if column in self.columns]
        first = 0
        for batch in self.dataset.select_columns(wanted).iter(batch_size=ROWS_AT_ONCE):
            values = {column: self._values(batch[column], column, first) for column in wanted}
            for offset in range(batch.num_rows):
                yield self.place(first + offset), {column: values[column][offset] for column in wanted}
            first += batch.num_rows

    def _values(self, cells: pa.ChunkedArray, column: str, first: int) -> list[Any]:
        """Return a batch's values of a column, which begins at row ``first``; no image's bytes are read."""
        if not _is_list(cells.type):
            return [
                StoredImage(self, first + offset, column) if value is EMBEDDED else value
                for offset, value in enumerate(_without_bytes(cells))
            ]
        return [
            [
                StoredImage(self, first + offset, column, position) if value is EMBEDDED else value
                for position, value in enumerate(_without_bytes(cell.values))
            ]
            if cell.is_valid
            else None
            for offset, cell in enumerate(cells)
        ]


@dataclass(frozen=True)
class StoredImage:
    """An image kept inside a table: where it stands. Its bytes are read when they are asked for.

    :param row: The row's number in the table, from 0.
    :param position: Its number in the cell, from 0, where the column holds lists.
    """

    table: StoredTable
    row: int
    column: str
    position: int | None = None

    def __str__(self) -> str:
        """Return the image's name, which no other image of a run has."""
        entry = "" if self.position is None else f"[{self.position}]"
        return f"{self.table.place(self.row)}, {self.column}{entry}"

    def read(self) -> bytes:
        """Return the bytes of the image's file.

        :raises ImageError: If the table cannot be read any more, or the bytes are too many.
        """
        name = printable(str(self))
        try:
            cell = self.table.dataset[self.row][self.column][0]
            if self.position is not None:
                cell = cell.values[self.position]
            if isinstance(cell, pa.StructScalar):
                cell = cell["bytes"]
        except (OSError, LookupError, pa.ArrowException) as error:
            raise ImageError(name, f"cannot be read ({one_line(error)})") from error
        stored = cell.as_buffer()
        check_size(stored.size, name)
        return bytes(stored)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _without_bytes(cells: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return cells as Python values, with ``EMBEDDED`` for bytes, and paths for images that are stored as such."""
    if pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type):
        return [EMBEDDED if length else None for length in pc.binary_length(cells).to_pylist()]
    names = [member.name for member in cells.type] if pa.types.is_struct(cells.type) else []
    if "bytes" not in names:
        return cells.to_pylist()
    embedded = _without_bytes(pc.struct_field(cells, "bytes"))
    paths = pc.struct_field(cells, "path").to_pylist() if "path" in names else [None] * len(embedded)
    return [here or path for here, path in zip(embedded, paths, strict=True)]
