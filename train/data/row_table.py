"""The rows of a stage as a memory-mapped Arrow table: a ``Row`` object is made only when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from cocoa_embed.data.arrow_table import ArrowTable, reopen
from cocoa_embed.data.rows import ArrowImage, Item, ItemImage, Row
from cocoa_embed.errors import CocoaError, printable

FORMAT_VERSION = 1
"""The version of the files; it changes with ``SCHEMA`` and with the meaning of a column."""

ROWS_A_CHUNK = 10_000

_NUMBERS = (
    *("subset", "source_id", "query_id", "positive_id", "negatives_id", "negatives"),
    *("image_id", "images", "query_text", "positive_text"),
)

SCHEMA = pa.schema({"row": pa.string(), "image_ids": pa.list_(pa.int64()), **{name: pa.int64() for name in _NUMBERS}})
"""``row`` is JSON, which is read faster than nested columns. ``image_ids`` lists those of all items, in order."""


class RowTable(Sequence[Row]):
    """Rows in a table, in the order of ``indices``: small in memory, and pickled as a file name and the indices.

    :param table: A table of ``SCHEMA``.
    :param subsets: The names of the subsets, in their order.
    :param image_tables: The tables that contain images (``ArrowImage``).
    :param indices: Row numbers of ``table``, int64; they may repeat. By default all, in order.
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
        self._table, self._rows = table, table["row"]
        self._image_tables = tuple(image_tables)
        self._indices = np.arange(len(table)) if indices is None else indices
        self.path = path

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
        """Memory-map a file that ``write`` has written.

        :raises ValueError: If it is of another version, or broken (pyarrow's ``ArrowInvalid`` is a ``ValueError``).
        :raises OSError: If it cannot be read.
        """
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if found["version"] != FORMAT_VERSION:
            raise ValueError(f"it is of version {found['version']}; expected {FORMAT_VERSION}")
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return cls(table, found["subsets"], [reopen(tuple(origin)) for origin in found["image_tables"]], path=path)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            return RowTable.of, (list(self),)
        in_order = len(self._indices) == len(self._table) and bool((np.diff(self._indices) == 1).all())
        return _reopened, (self.path, None if in_order else self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> RowTable: ...
    def __getitem__(self, index: int | slice) -> Row | RowTable:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._row(int(self._indices[index]))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: np.ndarray) -> RowTable:
        """Return the rows at these indices, in this order; rows may repeat."""
        chosen = self._indices[np.asarray(indices, dtype=np.int64)]
        return RowTable(self._table, self.subsets, self._image_tables, indices=chosen, path=self.path)

    def image_ids(self) -> np.ndarray:
        """Return the ``image_id`` of each distinct image of the rows, negatives included, int64 ``[images]``."""
        ids, rows = self._images()
        return np.unique(ids[np.isin(rows, self._indices)])

    def images(self, image_ids: np.ndarray) -> Iterator[tuple[int, ItemImage]]:
        """Yield the id and the image of each of the ``image_ids`` that occurs, once."""
        ids, rows = self._images()
        distinct, firsts = np.unique(ids, return_index=True)
        chosen = np.isin(distinct, image_ids)
        for number, row in zip(distinct[chosen].tolist(), rows[firsts[chosen]].tolist(), strict=True):
            yield number, next(image for image in self._row(row).images() if image_id(image) == number)

    def with_images(self, image_ids: np.ndarray) -> np.ndarray:
        """Return whether each row has one of these images, bool ``[rows]``."""
        ids, rows = self._images()
        return np.isin(self._indices, rows[np.isin(ids, image_ids)])

    def image_sums(self, image_ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Sum the values of the images of each row's query and positive, each image once, int64 ``[rows]``.

        :param image_ids: The images that have a value, sorted; the value of others is 0.
        :param values: The values of these images, int64 ``[images]``.
        """
        ids, rows = self._images()
        of_pair = np.arange(len(ids)) - np.searchsorted(rows, rows) < self._table["images"].to_numpy()[rows]
        places = np.searchsorted(image_ids, ids)
        chosen = of_pair & (places < np.searchsorted(image_ids, ids, "right"))
        pairs = np.unique(rows[chosen] * len(image_ids) + places[chosen])
        rows, places = np.divmod(pairs, max(1, len(image_ids)))
        sums: np.ndarray = np.bincount(rows, values[places], len(self._table)).astype(np.int64)[self._indices]
        return sums

    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of the whole table in order: their ``image_id``, and the numbers of their rows."""
        lists = self._table["image_ids"].combine_chunks()
        return lists.flatten().to_numpy(), lists.value_parent_indices().to_numpy()

    def column(self, name: str) -> np.ndarray:
        """Return a number for each row, int64 ``[rows]``.

        ``subset`` is the index of its subset in ``subsets``; ``source_id`` identifies ``Row.source``; ``query_id`` and
        ``positive_id`` are equal for sides with equal texts and images; ``negatives_id`` identifies all negatives, and
        ``negatives`` counts them; ``image_id`` identifies ``Row.image``, and is 0 without one; ``images`` counts the
        images of query and positive; ``query_text`` and ``positive_text`` are the characters of their content, without
        instructions.
        """
        found: np.ndarray = self._table[name].to_numpy()[self._indices]
        return found

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows of each subset."""
        counts = np.bincount(self.column("subset"), minlength=len(self.subsets))
        return dict(zip(self.subsets, counts.tolist(), strict=True))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows in order: subsets, texts, and the names of images, not their pixels."""
        digest = hashlib.sha256(json.dumps(self.subsets).encode())
        for name in ("subset", "query_id", "positive_id", "negatives_id"):
            digest.update(self.column(name).astype("<i8").tobytes())
        return digest.hexdigest()

    def _row(self, number: int) -> Row:
        source, query, positive, negatives, subset = json.loads(self._rows[number].as_py())
        rest = tuple(map(self._item, negatives))
        return Row(self._item(query), self._item(positive), source, rest, self.subsets[subset])

    def _item(self, cells: list[Any]) -> Item:
        text, instruction, images = cells
        return Item(text, tuple(map(self._image, images)), instruction)

    def _image(self, cells: str | list[Any]) -> ItemImage:
        if isinstance(cells, str):
            return Path(cells)
        table, row, column, position = cells
        return ArrowImage(self._image_tables[table], row, column, position)


def _reopened(path: Path, indices: np.ndarray | None) -> RowTable:
    try:
        table = RowTable.open(path)
    except FileNotFoundError as error:
        raise CocoaError(
            f"The rows in {printable(path)} no longer exist, or are not on this machine; if a run has several "
            "machines, set COCOA_CACHE to a folder that all of them share."
        ) from error
    return table if indices is None else table.select(indices)


class _Chunks:
    """Turns rows into record batches, and collects the names of their subsets and the tables of their images."""

    def __init__(self) -> None:
        self.subsets: dict[str, int] = {}
        self.image_tables: dict[ArrowTable, int] = {}

    def batches(self, rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
        remaining = iter(rows)
        while chunk := list(islice(remaining, ROWS_A_CHUNK)):
            columns = zip(*map(self._cells, chunk), strict=True)
            arrays = [pa.array(cells, field.type) for cells, field in zip(columns, SCHEMA, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)

    def _cells(self, row: Row) -> tuple[Any, ...]:
        subset = self.subsets.setdefault(row.subset, len(self.subsets))
        query, positive, *negatives = map(self._item, row.items())
        return (
            json.dumps((row.source, query, positive, negatives, subset)),
            [image_id(image) for image in row.images()],
            subset,
            digest(row.source),
            content_id(row.query),
            content_id(row.positive),
            content_id(*row.negatives) if row.negatives else 0,
            len(row.negatives),
            0 if row.image is None else image_id(row.image),
            len(row.query.images) + len(row.positive.images),
            len(row.query.text or ""),
            len(row.positive.text or ""),
        )

    def _item(self, item: Item) -> tuple[Any, ...]:
        return item.text, item.instruction, [self._image(image) for image in item.images]

    def _image(self, image: ItemImage) -> str | tuple[Any, ...]:
        if not isinstance(image, ArrowImage):
            return str(image)
        table: Any = image.table
        return self.image_tables.setdefault(table, len(self.image_tables)), image.row, image.column, image.position


def content_id(*items: Item) -> int:
    """Return a number that is equal for equal items: their full texts, and the names of their images."""
    parts = [[item.full_text, *map(str, item.images)] for item in items]
    return digest(json.dumps(parts))


def image_id(image: ItemImage) -> int:
    """Return a number that identifies an image by its name; never 0."""
    return digest(str(image))


def digest(text: str) -> int:
    """Return a number that identifies a text, int64 and never 0."""
    hashed = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(hashed, "little", signed=True) or 1
