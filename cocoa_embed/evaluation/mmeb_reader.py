"""Read MMEB-V1 as published, ``TIGER-Lab/MMEB-eval``: a folder of Parquet files for each subset, and the images.

A row has ``qry_text``, ``qry_img_path`` and two lists of the same length, ``tgt_text`` and ``tgt_img_path``: its
candidates, the first of which is correct. An empty path means no image. The benchmark's instruction is part of the
text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice, starmap
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np

from cocoa_embed.data.mmeb import SUBSETS, without_image_token
from cocoa_embed.data.rows import Item, shortened
from cocoa_embed.data.tables import Table, open_table
from cocoa_embed.errors import CocoaError, UsageError, did_you_mean, printable

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")

SHARD = re.compile(r"test-\d+-of-(?P<count>\d+)")
"""The name of a file that is one of several: ``test-00000-of-00002``."""

TEST_FILES = "test*.parquet"


class CandidateRow(NamedTuple):
    """A query and its candidates, as numbers of a subset's items; the first candidate is correct."""

    source: str
    query: int
    targets: np.ndarray


@dataclass(frozen=True)
class SubsetData:
    """The rows of a subset, and their distinct queries and targets.

    :param queries: The distinct queries. Image paths are relative to the folder of images, here and in ``targets``.
    :param rows_in_data: The number of rows, including those beyond the limit.
    :param rows_merged: The number of rows in which a repeated target counts once.
    :param digest: A digest of the rows, and of the size and the modification time of each image.
    """

    name: str
    queries: Sequence[Item]
    targets: Sequence[Item]
    rows: Sequence[CandidateRow]
    rows_in_data: int
    rows_merged: int
    digest: str

    @property
    def parts(self) -> set[frozenset[str]]:
        """The kinds of items that a model has to embed."""
        return {item.parts for item in (*self.queries, *self.targets)}


@dataclass(frozen=True)
class MmebFolder:
    """The public layout on disk.

    :param data: The folder that holds a folder for each subset.
    :param images: The folder that image paths are relative to.
    :param limit: The maximum number of rows of each subset to read.
    :param merge_repeated_targets: Count a target that a row lists twice once, instead of raising an error.
    """

    data: Path
    images: Path
    limit: int | None = None
    merge_repeated_targets: bool = False

    def subsets(self, selected: Sequence[str] = ()) -> list[str]:
        """Return the selected subsets, or all that exist, in the benchmark's order.

        :raises UsageError: If a selected name is not a subset of MMEB-V1.
        :raises CocoaError: If a selected subset or a folder is missing, or there is no subset.
        """
        for name in selected:
            if name not in SUBSETS:
                raise UsageError(f"MMEB-V1 has no subset {name!r} {did_you_mean(name, tuple(SUBSETS))}")
        for folder, content in ((self.data, "the subsets of MMEB-V1"), (self.images, "its images")):
            if not folder.is_dir():
                raise CocoaError(f"{printable(folder)} does not exist; name the folder that holds {content}")
        found = [name for name in SUBSETS if any((self.data / name).glob(TEST_FILES))]
        if not found:
            raise CocoaError(
                f"{printable(self.data)} holds no subset of MMEB-V1; expected folders of Parquet files"
                " like MSCOCO_i2t/test-00000-of-00001.parquet, as in TIGER-Lab/MMEB-eval"
            )
        for name in selected:
            if name not in found:
                raise CocoaError(f"{printable(self.data / name)} holds no {TEST_FILES} {did_you_mean(name, found)}")
        return [name for name in found if name in selected or not selected]

    def read_subsets(self, selected: Sequence[str] = ()) -> list[SubsetData]:
        """Read the selected subsets, or all that exist, so that errors in the data appear before hours of work.

        :raises CocoaError: If anything is wrong with the data.
        """
        return [self.read(name) for name in self.subsets(selected)]

    def read(self, name: str) -> SubsetData:
        """Read a subset and check that its images exist, without opening them.

        :raises CocoaError: If a file or a row is malformed, or an image is missing; the message says which.
        """
        tables = {file: open_table(file) for file in _subset_files(self.data / name)}
        queries, targets, rows, merged = _Numbering("the query"), _Numbering("a candidate"), [], 0
        for source, cells in islice(chain.from_iterable(starmap(_read_table, tables.items())), self.limit):
            try:
                query = queries.number(cells["qry_text"], cells["qry_img_path"])
                listed = list(map(targets.number, cells["tgt_text"], cells["tgt_img_path"]))
            except CocoaError as error:
                raise CocoaError(f"{source}: {error}") from error
            distinct = list(dict.fromkeys(listed))
            if len(distinct) < len(listed) and not self.merge_repeated_targets:
                again = next(number for number in distinct if listed.count(number) > 1)
                raise CocoaError(
                    f"{source}: two candidates are the same target ({list(targets.items)[again]}); remove one, or"
                    " count it once with --repeated-targets merge"
                )
            merged += len(distinct) < len(listed)
            rows.append(CandidateRow(source, query, np.array(distinct)))
        if not rows:
            raise CocoaError(f"{printable(self.data / name)} has no rows")
        items = [*queries.items, *targets.items]
        status = self._image_status(name, items)
        rows_in_data = sum(map(len, tables.values()))
        content = [(item.text, item.image, each) for item, each in zip(items, status, strict=True)]
        numbers = [(row.query, row.targets.tolist()) for row in rows]
        digest = hashlib.sha256(repr((rows_in_data, len(queries.items), content, numbers)).encode()).hexdigest()
        return SubsetData(name, list(queries.items), list(targets.items), rows, rows_in_data, merged, digest)

    def _image_status(self, name: str, items: Sequence[Item]) -> list[tuple[int, int] | None]:
        """Return the size and the modification time of each item's image; None for items without one."""
        files = [None if item.image is None else self.images / str(item.image) for item in items]
        found = zip(items, files, strict=True)
        missing = list(dict.fromkeys(str(item.image) for item, file in found if file and not file.is_file()))
        if missing:
            raise CocoaError(
                f"{len(missing)} images of {name} are not in {printable(self.images)}, the first is {missing[0]!r};"
                " download them, or give the folder that these paths start from as --images"
            )
        status = (None if file is None else file.stat() for file in files)
        return [each and (each.st_size, each.st_mtime_ns) for each in status]


class _Numbering:
    """Numbers distinct items in order of appearance."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.items: dict[Item, int] = {}
        self.number = cache(self._number)  # a subset has up to a million candidates

    def _number(self, text: str | None, path: str | None) -> int:
        """Return the number of the item that two cells describe.

        :raises CocoaError: If the item is empty.
        """
        clean = without_image_token(text or "", bool(path), self.kind)
        if not clean and not path:
            raise CocoaError(f"{self.kind} has neither a text nor an image")
        return self.items.setdefault(Item(clean or None, (Path(path),) if path else ()), len(self.items))


def _subset_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a subset.

    :raises CocoaError: If some of them are missing.
    """
    files = sorted(folder.glob(TEST_FILES))
    expected = max((int(shard["count"]) for file in files if (shard := SHARD.fullmatch(file.stem))), default=len(files))
    if len(files) != expected:
        raise CocoaError(
            f"{printable(folder)} holds {len(files)} of {expected} Parquet files; download the others, or all of them"
            " again"
        )
    return files


def _read_table(file: Path, table: Table) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the checked rows of a table.

    :raises CocoaError: If a column is missing, or a row is malformed.
    """
    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise CocoaError(f"{printable(file)} has no column {' and no '.join(missing)};"
                         f" expected {', '.join(COLUMNS)}, found {', '.join(table.columns)}")  # fmt: skip
    for source, cells in table.read(COLUMNS):
        assert isinstance(cells, dict)
        *query, texts, paths = (cells[column] for column in COLUMNS)
        are_lists = isinstance(texts, list) and isinstance(paths, list) and len(texts) == len(paths) > 0
        if not are_lists or not set(map(type, (*query, *texts, *paths))) <= {str, NoneType}:
            raise CocoaError(
                f"{source}: expected qry_text and qry_img_path as texts, tgt_text and tgt_img_path as equally long"
                f" lists of at least one text; found {', '.join(map(shortened, (*query, texts, paths)))}"
            )
        yield source, cells
