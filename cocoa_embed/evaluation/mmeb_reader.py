"""Reads MMEB-V1 as published, ``TIGER-Lab/MMEB-eval``: a folder of Parquet files for each subset, and the images.

A row has ``qry_text``, ``qry_img_path`` and two lists of the same length, ``tgt_text`` and ``tgt_img_path``: its
candidates, the first of which is correct. An empty path is no image. The benchmark's instruction is part of the text.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cocoa_embed.data.image_token import without_image_token
from cocoa_embed.data.mmeb_subsets import SUBSETS
from cocoa_embed.data.rows import Item, shortened
from cocoa_embed.data.tables import RowTable, open_table
from cocoa_embed.errors import CocoaError, UsageError, did_you_mean, printable

LIST_COLUMNS = ("tgt_text", "tgt_img_path")
COLUMNS = ("qry_text", "qry_img_path", *LIST_COLUMNS)

SHARD = re.compile(r"[^-]+-\d+-of-(?P<count>\d+)")
"""The name of a file that is one of several, such as ``test-00000-of-00002``."""

SPLIT = "test"

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
    :param rows_in_data: The number of rows, including those beyond the limit and those left out.
    :param rows_without_image: The number of rows left out because one of their images is missing.
    :param rows_merged: The number of rows in which a repeated target counts once.
    :param digest: Identifies these rows and images.
    """

    name: str
    queries: Sequence[Item]
    targets: Sequence[Item]
    rows: Sequence[CandidateRow]
    rows_in_data: int
    rows_without_image: int
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
    :param images: The folder of the image paths.
    :param limit: The most rows of each subset to read.
    :param skip_missing_images: Leave out and count the rows with a missing image, instead of an error.
    :param merge_repeated_targets: Count a target once that a row lists twice, instead of an error.
    """

    data: Path
    images: Path
    limit: int | None = None
    skip_missing_images: bool = False
    merge_repeated_targets: bool = False

    def subsets(self, selected: Sequence[str] = ()) -> list[str]:
        """Return the selected subsets, or all that exist, in the benchmark's order.

        :raises UsageError: If a selected one is no subset of MMEB-V1.
        :raises CocoaError: If a selected one or a folder is missing, or there is no subset.
        """
        for name in selected:
            if name not in SUBSETS:
                raise UsageError(f"MMEB-V1 has no subset {name!r} {did_you_mean(name, tuple(SUBSETS))}")
        for folder, content in ((self.data, "the subsets of MMEB-V1"), (self.images, "its images")):
            if not folder.is_dir():
                kind = "is not a folder" if folder.exists() else "does not exist"
                raise CocoaError(f"{printable(folder)} {kind}; name the folder that holds {content}")
        found = [name for name in SUBSETS if any((self.data / name).glob("*.parquet"))]
        if not found:
            raise CocoaError(
                f"{printable(self.data)} holds no subset of MMEB-V1; expected folders of Parquet files such as"
                " MSCOCO_i2t/test-00000-of-00001.parquet, as TIGER-Lab/MMEB-eval has them"
            )
        for name in selected:
            if name not in found:
                raise CocoaError(f"{printable(self.data / name)} holds no Parquet files {did_you_mean(name, found)}")
        return [name for name in found if name in selected or not selected]

    def read(self, name: str) -> SubsetData:
        """Read a subset and look for its images, which are not opened.

        :raises CocoaError: If a file or a row is malformed; the message says which.
        """
        tables = {file: open_table(file) for file in _subset_files(self.data / name)}
        rows_in_data = sum(map(len, tables.values()))
        reader = _SubsetReader(self.merge_repeated_targets)
        for source, cells in islice(chain.from_iterable(starmap(_read_table, tables.items())), self.limit):
            reader.add(source, cells)
        rows, queries, targets = reader.rows, list(reader.queries.numbers), list(reader.targets.numbers)
        if not rows:
            raise CocoaError(f"{printable(self.data / name)} has no rows")
        found = self._find_images(name, (*queries, *targets))
        if None in found.values():
            no_query, no_target = (
                np.array([_is_missing(item, found) for item in items]) for items in (queries, targets)
            )
            rows = [row for row in rows if not no_query[row.query] and not no_target[row.targets].any()]
            if not rows:
                raise CocoaError(f"{name}: every one of its {len(reader.rows)} rows has an image that is missing")
            rows, queries, targets = _without_unused(rows, queries, targets)
        return SubsetData(
            name, queries, targets, rows, rows_in_data,
            rows_without_image=len(reader.rows) - len(rows),
            rows_merged=reader.merged,
            digest=_digest(queries, targets, rows, rows_in_data, found),
        )  # fmt: skip

    def _find_images(self, name: str, items: Sequence[Item]) -> dict[str, Status]:
        """Return the status of each image, by its path."""
        found = {str(item.image): _status(self.images / str(item.image)) for item in items if item.image is not None}
        missing = [path for path, status in found.items() if status is None]
        if missing and len(missing) == len(found):
            raise CocoaError(
                f"none of the {len(missing)} images of {name} is in {printable(self.images)}; the first should be"
                f" {missing[0]!r}: {_suggest_folder(self.images, missing[0])}"
            )
        if missing and not self.skip_missing_images:
            raise CocoaError(
                f"{len(missing)} of the {len(found)} images of {name} are not in {printable(self.images)}, the first is"
                f" {missing[0]!r}; get them, or leave their rows out with --missing-images skip"
            )
        return found


def _subset_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a subset: those of the split ``test``, or of the only split.

    :raises CocoaError: If there are several other splits, or files of the split are missing.
    """
    by_split: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")):
        by_split.setdefault(file.stem.split("-")[0], []).append(file)
    if SPLIT not in by_split and len(by_split) > 1:
        raise CocoaError(f"{printable(folder)} has the splits {', '.join(by_split)}; expected {SPLIT}")
    files = by_split[SPLIT] if SPLIT in by_split else next(iter(by_split.values()))
    expected = max((int(shard["count"]) for file in files if (shard := SHARD.fullmatch(file.stem))), default=len(files))
    if len(files) != expected:
        raise CocoaError(
            f"{printable(folder)} holds {len(files)} of {expected} Parquet files; download the others, or all again"
        )
    return files


def _read_table(file: Path, table: RowTable) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
            if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
                expected = "a list of texts" if column in LIST_COLUMNS else "a text"
                raise CocoaError(f"{source}: {column} holds {shortened(cells[column])}; expected {expected}")
        count, paths = (len(cells[column]) for column in LIST_COLUMNS)
        if count != paths or not count:
            raise CocoaError(f"{source}: tgt_text lists {count} candidates and tgt_img_path {paths}; expected as many"
                             " of one as of the other, at least one")  # fmt: skip
        yield source, cells


class _Items:
    """Distinct items, numbered in order of appearance."""

    def __init__(self) -> None:
        self.numbers: dict[Item, int] = {}
        self._seen: dict[tuple[str | None, str | None], int] = {}

    def number(self, text: str | None, path: str | None, source: str, name: str) -> int:
        """Return the number of an item, given by its cells."""
        if (text, path) not in self._seen:
            clean = without_image_token(text or "", bool(path), f"{source}: {name}")
            if not clean and not path:
                raise CocoaError(f"{source}: {name} has neither a text nor an image")
            item = Item(clean or None, Path(path) if path else None)
            self._seen[text, path] = self.numbers.setdefault(item, len(self.numbers))
        return self._seen[text, path]


class _SubsetReader:
    """Turns rows of cells into rows of numbers."""

    def __init__(self, merge: bool) -> None:
        self.merge, self.merged = merge, 0
        self.queries, self.targets = _Items(), _Items()
        self.rows: list[CandidateRow] = []

    def add(self, source: str, cells: Mapping[str, Any]) -> None:
        """Add a row of cells.

        :raises CocoaError: If one of its items is empty, or it lists a target twice and is not to be merged.
        """
        query = self.queries.number(cells["qry_text"], cells["qry_img_path"], source, "the query")
        candidates = enumerate(zip(cells["tgt_text"], cells["tgt_img_path"], strict=True), 1)
        first: dict[int, int] = {}
        for position, (text, path) in candidates:
            target = self.targets.number(text, path, source, f"candidate {position}")
            if first.setdefault(target, position) != position and not self.merge:
                item = list(self.targets.numbers)[target]
                raise CocoaError(
                    f"{source}: candidates {first[target]} and {position} are the same target ({item});"
                    " remove one, or count it once with --repeated-targets merge"
                )
        self.merged += len(first) < len(cells["tgt_text"])
        self.rows.append(CandidateRow(source, query, np.array(list(first))))


def _is_missing(item: Item, found: Mapping[str, Status]) -> bool:
    return item.image is not None and found[str(item.image)] is None


def _without_unused(
    rows: list[CandidateRow], queries: list[Item], targets: list[Item]
) -> tuple[list[CandidateRow], list[Item], list[Item]]:
    """Leave out the items that no row uses, and renumber the others."""
    used_queries, query_numbers = np.unique([row.query for row in rows], return_inverse=True)
    used_targets, target_numbers = np.unique(np.concatenate([row.targets for row in rows]), return_inverse=True)
    by_row = np.split(target_numbers, np.cumsum([len(row.targets) for row in rows])[:-1])
    renumbered = [
        CandidateRow(row.source, int(query), numbers)
        for row, query, numbers in zip(rows, query_numbers, by_row, strict=True)
    ]
    return renumbered, [queries[number] for number in used_queries], [targets[number] for number in used_targets]


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


def _digest(
    queries: list[Item], targets: list[Item], rows: list[CandidateRow], rows_in_data: int, found: Mapping[str, Status]
) -> str:
    """Return a digest of the rows, and of the size and the modification time of each image."""
    digest = hashlib.sha256(repr((rows_in_data, len(queries), len(targets))).encode())
    for item in (*queries, *targets):
        path = None if item.image is None else str(item.image)
        digest.update(repr((item.text, path, path and found[path])).encode())
    for row in rows:
        digest.update(row.query.to_bytes(8, "little") + row.targets.astype("<i8").tobytes() + b";")
    return digest.hexdigest()
