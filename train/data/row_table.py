"""The rows of a stage as a memory-mapped Arrow table: a ``Row`` is made when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from cocoa_embed.data.arrow_table import ArrowTable, reopen
from cocoa_embed.data.rows import ArrowImage, Item, ItemImage, Row

FORMAT_VERSION = 1
"""Of the files; it changes with ``SCHEMA`` and with what the columns mean."""

ROWS_A_CHUNK = 10_000

_IMAGE = pa.struct({"path": pa.string(), "table": pa.int32(), "row": pa.int64(), "position": pa.int32()})
_ITEM = pa.struct({"text": pa.string(), "instruction": pa.string(), "images": pa.list_(_IMAGE)})
_NUMBERS = ("subset", "query_id", "positive_id", "negatives_id", "image_id", "images", "query_text", "positive_text")

SCHEMA = pa.schema(
    {
        "source": pa.string(),
        "query": _ITEM,
        "positive": _ITEM,
        "negatives": pa.list_(_ITEM),
        **{name: pa.int64() for name in _NUMBERS},
    }
)
"""An image outside a table is its path; one inside has the number of its table, and its column as ``path``."""


class RowTable(Sequence[Row]):
    """Rows in a table, in the order of ``indices``: small in memory, and pickled as a file name and the indices.

    :param table: In ``SCHEMA``.
    :param subsets: The names of the subsets, in their order.
    :param image_tables: The tables of the images inside tables.
    :param indices: Rows of ``table``, int64; they may repeat. By default all, in order.
    :param path: The file of ``table``; None for a table in memory.
    """

    def __init__(
        self,
        table: pa.Table,
        subsets: Sequence[str],
        image_tables: Sequence[ArrowTable] = (),
        *,
        indices: np.ndarray | None = None,
        path: Path | None = None,
    ) -> None:
        self.subsets = tuple(subsets)
        self._table = table
        self._image_tables = tuple(image_tables)
        self._indices = np.arange(len(table)) if indices is None else indices
        self._path = path

    @classmethod
    def of(cls, rows: Iterable[Row]) -> RowTable:
        """Return rows as a table in memory."""
        writer = _Chunks()
        table = pa.Table.from_batches(writer.batches(rows), SCHEMA)
        return cls(table, list(writer.subsets), list(writer.image_tables))

    @classmethod
    def write(cls, path: Path, rows: Iterable[Row]) -> RowTable:
        """Write rows to a new Arrow file, a few at a time, and open it."""
        chunks = _Chunks()
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in chunks.batches(rows):
                writer.write_batch(batch)
            found = {
                "version": FORMAT_VERSION,
                "subsets": list(chunks.subsets),
                "image_tables": [list(table.origin) for table in chunks.image_tables],
            }
        path.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> RowTable:
        """Open a file of ``write``, memory-mapped.

        :raises ValueError: If it is of another version.
        :raises OSError: If it cannot be read; so does pyarrow's ``ArrowInvalid``, a ``ValueError``.
        """
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if found["version"] != FORMAT_VERSION:
            raise ValueError(f"it is of version {found['version']}; expected {FORMAT_VERSION}")
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return cls(table, found["subsets"], [reopen(tuple(origin)) for origin in found["image_tables"]], path=path)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is not None:
            return _reopened, (self._path, self._indices)
        return RowTable.of, (list(self),)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> RowTable: ...
    def __getitem__(self, index: int | slice) -> Row | RowTable:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._row(self._cells(int(self._indices[index])))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: np.ndarray) -> RowTable:
        """Return the rows at these places, in this order; rows may repeat."""
        chosen = self._indices[np.asarray(indices, dtype=np.int64)]
        return RowTable(self._table, self.subsets, self._image_tables, indices=chosen, path=self._path)

    def column(self, name: str) -> np.ndarray:
        """Return a number for each row, int64 ``[rows]``.

        ``subset`` is the place of its subset in ``subsets``; ``query_id`` and ``positive_id`` are equal for sides with
        equal texts and images; ``negatives_id`` identifies all negatives; ``image_id`` identifies ``Row.image``, and is
        0 without one; ``images`` counts the images of query and positive; ``query_text`` and ``positive_text`` are the
        characters of their content, without instructions.
        """
        return self._numbers[name][self._indices]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows in order: subsets, texts, and the names of images, not their pixels."""
        digest = hashlib.sha256(json.dumps(self.subsets).encode())
        for name in ("subset", "query_id", "positive_id", "negatives_id"):
            digest.update(self.column(name).astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        return {name: self._table[name].to_numpy() for name in _NUMBERS}

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first row of each chunk, and the number of all rows."""
        return np.cumsum([0, *(len(batch) for batch in self._batches)])

    @cached_property
    def _batches(self) -> list[pa.StructArray]:
        return [pa.StructArray.from_arrays([*batch.columns[:4], batch["subset"]], [*SCHEMA.names[:4], "subset"])
                for batch in self._table.to_batches()]  # fmt: skip

    def _cells(self, row: int) -> dict[str, Any]:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        cells: dict[str, Any] = self._batches[chunk][row - int(self._starts[chunk])].as_py()
        return cells

    def _row(self, cells: dict[str, Any]) -> Row:
        query, positive = self._item(cells["query"]), self._item(cells["positive"])
        negatives = tuple(map(self._item, cells["negatives"]))
        return Row(query, positive, cells["source"], negatives, self.subsets[cells["subset"]])

    def _item(self, cells: dict[str, Any]) -> Item:
        return Item(cells["text"], tuple(map(self._image, cells["images"])), cells["instruction"])

    def _image(self, cells: dict[str, Any]) -> ItemImage:
        if cells["table"] is None:
            return Path(cells["path"])
        return ArrowImage(self._image_tables[cells["table"]], cells["row"], cells["path"], cells["position"])


def _reopened(path: Path, indices: np.ndarray) -> RowTable:
    return RowTable.open(path).select(indices)


class _Chunks:
    """Turns rows into record batches, and collects the names of their subsets and the tables of their images."""

    def __init__(self) -> None:
        self.subsets: dict[str, int] = {}
        self.image_tables: dict[ArrowTable, int] = {}

    def batches(self, rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
        remaining = iter(rows)
        while chunk := list(islice(remaining, ROWS_A_CHUNK)):
            yield pa.RecordBatch.from_pylist([self._cells(row) for row in chunk], SCHEMA)

    def _cells(self, row: Row) -> dict[str, Any]:
        return {
            "source": row.source,
            "query": self._item(row.query),
            "positive": self._item(row.positive),
            "negatives": [self._item(item) for item in row.negatives],
            "subset": self.subsets.setdefault(row.subset, len(self.subsets)),
            "query_id": content_id(row.query),
            "positive_id": content_id(row.positive),
            "negatives_id": content_id(*row.negatives) if row.negatives else 0,
            "image_id": 0 if row.image is None else _digest(str(row.image)),
            "images": len(row.query.images) + len(row.positive.images),
            "query_text": len(row.query.text or ""),
            "positive_text": len(row.positive.text or ""),
        }

    def _item(self, item: Item) -> dict[str, Any]:
        return {"text": item.text, "instruction": item.instruction, "images": [self._image(i) for i in item.images]}

    def _image(self, image: ItemImage) -> dict[str, Any]:
        if not isinstance(image, ArrowImage):
            return {"path": str(image)}
        table: Any = image.table
        number = self.image_tables.setdefault(table, len(self.image_tables))
        return {"path": image.column, "table": number, "row": image.row, "position": image.position}


def content_id(*items: Item) -> int:
    """Return a number that is equal for equal items: their full texts, and the names of their images."""
    return _digest(json.dumps([(item.full_text, *map(str, item.images)) for item in items]))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True) or 1
