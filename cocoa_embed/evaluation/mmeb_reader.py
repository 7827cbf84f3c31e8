"""Reads MMEB-V1 as published, ``TIGER-Lab/MMEB-eval``: a folder of Parquet files for each subset, and the images.

A row has ``qry_text``, ``qry_img_path`` and two lists of the same length, ``tgt_text`` and ``tgt_img_path``: its
candidates, the first of which is correct. An empty path is no image. The benchmark's instruction is part of the text.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

LIST_COLUMNS = ("tgt_text", "tgt_img_path")
COLUMNS = ("qry_text", "qry_img_path", *LIST_COLUMNS)

SHARD = re.compile(r"test-\d+-of-(?P<count>\d+)")
"""The name of a file that is one of several: ``test-00000-of-00002``."""

TEST_FILES = "test*.parquet"

Status = tuple[int, int] | None
"""The size of a file in bytes and its modification time in nanoseconds; None if there is no file."""


class CandidateRow(NamedTuple):
    """A query and its candidates, as numbers of a subset's items; the first candidate is correct."""

    source: str
    query: int
    targets: np.ndarray


@dataclass(frozen=True)
class SubsetData:
    """The rows of a subset, and their distinct queries and targets.

    :param queries: Image paths are relative to the folder of images, here and in ``targets``.
    :param rows_in_data: The number of rows, including those beyond the limit and those skipped.
    :param rows_without_image: The number of rows skipped because one of their images is missing.
    :param rows_merged: The number of rows in which a repeated target counts once.
    :param found: The status of each item's image.
    """

    name: str
    queries: Sequence[Item]
    targets: Sequence[Item]
    rows: Sequence[CandidateRow]
    rows_in_data: int
    rows_without_image: int
    rows_merged: int
    found: Mapping[Item, Status]

    @property
    def digest(self) -> str:
        """A digest of the rows, and of the size and the modification time of each image."""
        items = [(item.text, str(item.image), self.found.get(item)) for item in (*self.queries, *self.targets)]
        rows = [(row.query, row.targets.tolist()) for row in self.rows]
        content = repr((self.rows_in_data, len(self.queries), items, rows))
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def parts(self) -> set[frozenset[str]]:
        """The kinds of items that a model has to embed."""
        return {item.parts for item in (*self.queries, *self.targets)}


@dataclass(frozen=True)
class MmebFolder:
    """The public layout on disk.

    :param data: The folder that holds a folder for each subset.
    :param images: The folder of the image paths.
    :param limit: The most rows of each subset to read.
    :param skip_missing_images: Skip and count rows with a missing image, instead of an error.
    :param merge_repeated_targets: Count a target that a row lists twice once, instead of an error.
    """

    data: Path
    images: Path
    limit: int | None = None
    skip_missing_images: bool = False
    merge_repeated_targets: bool = False

    def subsets(self, selected: Sequence[str] = ()) -> list[str]:
        """Return the selected subsets, or all that exist, in the benchmark's order.

        :raises UsageError: If a selected name is no subset of MMEB-V1.
        :raises CocoaError: If a selected subset or a folder is missing, or there is no subset.
        """
        for name in selected:
            if name not in SUBSETS:
                raise UsageError(f"MMEB-V1 has no subset {name!r} {did_you_mean(name, tuple(SUBSETS))}")
        for folder, content in ((self.data, "the subsets of MMEB-V1"), (self.images, "its images")):
            if not folder.is_dir():
                kind = "is not a folder" if folder.exists() else "does not exist"
                raise CocoaError(f"{printable(folder)} {kind}; name the folder that holds {content}")
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
        """Read the selected subsets, or all that exist, so that errors in the data show before hours of work.

        :raises CocoaError: If anything is wrong with the data.
        """
        return [self.read(name) for name in self.subsets(selected)]

    def read(self, name: str) -> SubsetData:
        """Read a subset and look for its images, which are not opened.

        :raises CocoaError: If a file or a row is malformed; the message says which.
        """
        tables = {file: open_table(file) for file in _subset_files(self.data / name)}
        cells = islice(chain.from_iterable(starmap(_read_table, tables.items())), self.limit)
        numbering, read, merged = _Numbering(), [], 0
        for source, values in cells:
            query = numbering.number(values["qry_text"], values["qry_img_path"], source)
            candidates = enumerate(zip(values["tgt_text"], values["tgt_img_path"], strict=True), 1)
            listed = [numbering.number(*each, source, position) for position, each in candidates]
            distinct = list(dict.fromkeys(listed))
            if len(distinct) < len(listed) and not self.merge_repeated_targets:
                _refuse_repeated(source, listed, list(numbering.items))
            merged += len(distinct) < len(listed)
            read.append(CandidateRow(source, query, np.array(distinct)))
        if not read:
            raise CocoaError(f"{printable(self.data / name)} has no rows")
        items = list(numbering.items)
        found = self._find_images(name, items)
        missing = np.array([item in found and found[item] is None for item in items])
        rows = [row for row in read if not missing[row.query] and not missing[row.targets].any()]
        if not rows:
            raise CocoaError(f"{name}: every one of its {len(read)} rows has an image that is missing")
        queries, query_numbers = np.unique([row.query for row in rows], return_inverse=True)
        targets = np.unique(np.concatenate([row.targets for row in rows]))
        return SubsetData(
            name,
            [items[number] for number in queries],
            [items[number] for number in targets],
            [CandidateRow(row.source, int(query), np.searchsorted(targets, row.targets))
             for row, query in zip(rows, query_numbers, strict=True)],
            rows_in_data=sum(map(len, tables.values())),
            rows_without_image=len(read) - len(rows),
            rows_merged=merged,
            found=found,
        )  # fmt: skip

    def _find_images(self, name: str, items: Iterable[Item]) -> dict[Item, Status]:
        """Return the status of the image of each item that has one."""
        status_of = cache(lambda path: _status(self.images / path))
        found = {item: status_of(item.image) for item in items if item.image is not None}
        paths = dict.fromkeys(item.image for item in found)
        missing = [str(path) for path in paths if status_of(path) is None]
        if missing and len(missing) == len(paths):
            raise CocoaError(
                f"none of the {len(missing)} images of {name} is in {printable(self.images)}; the first should be"
                f" {missing[0]!r}: {_suggest_folder(self.images, missing[0])}"
            )
        if missing and not self.skip_missing_images:
            raise CocoaError(
                f"{len(missing)} of the {len(paths)} images of {name} are not in {printable(self.images)}, the first is"
                f" {missing[0]!r}; get them, or skip their rows with --missing-images skip"
            )
        return found


class _Numbering:
    """Numbers distinct items in their order."""

    def __init__(self) -> None:
        self.items: dict[Item, int] = {}
        self._cells: dict[tuple[str | None, str | None], int] = {}

    def number(self, text: str | None, path: str | None, source: str, candidate: int | None = None) -> int:
        """Return the number of the item of two cells.

        :param candidate: The candidate's position, from 1; None for the query.
        :raises CocoaError: If the item is empty.
        """
        if (text, path) not in self._cells:
            name = f"{source}: " + ("the query" if candidate is None else f"candidate {candidate}")
            clean = without_image_token(text or "", bool(path), name)
            if not clean and not path:
                raise CocoaError(f"{name} has neither a text nor an image")
            item = Item(clean or None, (Path(path),) if path else ())
            self._cells[text, path] = self.items.setdefault(item, len(self.items))
        return self._cells[text, path]


def _refuse_repeated(source: str, listed: Sequence[int], items: Sequence[Item]) -> None:
    again = next(position for position, number in enumerate(listed) if number in listed[:position])
    raise CocoaError(
        f"{source}: candidates {listed.index(listed[again]) + 1} and {again + 1} are the same target"
        f" ({items[listed[again]]}); remove one, or count it once with --repeated-targets merge"
    )


def _subset_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a subset.

    :raises CocoaError: If some of them are missing.
    """
    files = sorted(folder.glob(TEST_FILES))
    expected = max((int(shard["count"]) for file in files if (shard := SHARD.fullmatch(file.stem))), default=len(files))
    if len(files) != expected:
        raise CocoaError(
            f"{printable(folder)} holds {len(files)} of {expected} Parquet files; download the others, or all again"
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
        for column in COLUMNS:
            texts = cells[column] if column in LIST_COLUMNS else [cells[column]]
            if not isinstance(texts, list) or not {type(text) for text in texts} <= {str, NoneType}:
                expected = "a list of texts" if column in LIST_COLUMNS else "a text"
                raise CocoaError(f"{source}: {column} holds {shortened(cells[column])}; expected {expected}")
        count, paths = (len(cells[column]) for column in LIST_COLUMNS)
        if count != paths or not count:
            raise CocoaError(f"{source}: tgt_text lists {count} candidates and tgt_img_path {paths}; expected as many"
                             " of one as of the other, at least one")  # fmt: skip
        yield source, cells


def _status(path: Path) -> Status:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _suggest_folder(images: Path, path: str) -> str:
    near = (images.absolute().parent, *sorted(entry for entry in images.iterdir() if entry.is_dir()))
    found = next((folder for folder in near if _status(folder / path)), None)
    return f"did you mean --images {printable(found)}?" if found else "give the folder of this path"
