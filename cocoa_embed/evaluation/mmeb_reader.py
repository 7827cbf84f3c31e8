"""Reads MMEB-V1 as published, ``TIGER-Lab/MMEB-eval``: a folder of Parquet files for each subset, and the images.

A row has ``qry_text``, ``qry_img_path`` and two lists of one length, ``tgt_text`` and ``tgt_img_path``: its own
candidates, the first of which is right. An empty path is no image. The benchmark's instruction is part of the text.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cocoa_embed.data.image_token import without_image_token
from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.evaluation.embed import Item
from cocoa_embed.evaluation.mmeb_files import ROWS_AT_ONCE, count_rows, read_rows, subset_files
from cocoa_embed.evaluation.mmeb_subsets import SUBSETS, nearest, require_subset

Status = tuple[int, int] | None
"""The size of a file in bytes and the time of its last change in nanoseconds; None where there is no file."""


class Row(NamedTuple):
    """One query and its candidates, as numbers of a subset's items; the first candidate is right."""

    place: str
    query: int
    targets: np.ndarray


@dataclass(frozen=True)
class SubsetData:
    """The rows of one subset, and what they are made of, each query and each target once.

    :param queries: Paths of images start from the folder of images; so they do in ``targets``.
    :param rows_in_data: How many rows there are, with those beyond the limit and those left out.
    :param rows_without_image: How many rows are left out because an image of theirs is missing.
    :param rows_merged: In how many rows a target that is listed again counts once.
    :param digest: What tells these rows and images from others.
    """

    name: str
    queries: Sequence[Item]
    targets: Sequence[Item]
    rows: Sequence[Row]
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
    :param images: The folder that the paths of images start from.
    :param limit: Read that many rows of each subset.
    :param skip_missing_images: Leave out and count rows with an image that is not there, instead of an error.
    :param merge_repeated_targets: Count a target once that a row lists twice, instead of an error.
    """

    data: Path
    images: Path
    limit: int | None = None
    skip_missing_images: bool = False
    merge_repeated_targets: bool = False

    def subsets(self, asked: Sequence[str] = ()) -> list[str]:
        """Return the subsets asked for, or all that are there, in the benchmark's order.

        :raises UsageError: If one that was asked for is no subset of MMEB-V1.
        :raises CocoaError: If one that was asked for is not there, or none is, or a folder is missing.
        """
        for name in asked:
            require_subset(name)
        for folder, what in ((self.data, "the subsets of MMEB-V1"), (self.images, "its images")):
            if not folder.is_dir():
                kind = "is not a folder" if folder.exists() else "does not exist"
                raise CocoaError(f"{printable(folder)} {kind}; name the folder that holds {what}")
        there = [name for name in SUBSETS if any((self.data / name).glob("*.parquet"))]
        if not there:
            raise CocoaError(
                f"{printable(self.data)} holds no subset of MMEB-V1; expected folders of Parquet files such as"
                " MSCOCO_i2t/test-00000-of-00001.parquet, as TIGER-Lab/MMEB-eval has them"
            )
        for name in asked:
            if name not in there:
                raise CocoaError(f"{printable(self.data / name)} holds no Parquet files{nearest(name, there)}")
        return [name for name in there if name in asked or not asked]

    def read(self, name: str) -> SubsetData:
        """Read one subset and look for its images, which are not opened.

        :raises CocoaError: If a file or a row of it is not as it should be; the message says which.
        """
        files = subset_files(self.data / name)
        rows_in_data = sum(count_rows(file) for file in files)
        limit = rows_in_data if self.limit is None else self.limit
        reader = _SubsetReader(merge=self.merge_repeated_targets)
        for file in files:
            if len(reader.rows) == limit:
                break
            for place, cells in read_rows(file, min(limit, ROWS_AT_ONCE)):
                reader.add(place, cells)
                if len(reader.rows) == limit:
                    break
        return self._finish(name, reader, rows_in_data)

    def _finish(self, name: str, reader: _SubsetReader, rows_in_data: int) -> SubsetData:
        if not reader.rows:
            raise CocoaError(f"{printable(self.data / name)} has no rows")
        queries, targets = list(reader.queries.numbers), list(reader.targets.numbers)
        found = self._find_images(name, (*queries, *targets))
        rows = reader.rows
        if None in found.values():
            whole = [row for row in rows if _has_images(row, queries, targets, found)]
            if not whole:
                raise CocoaError(f"{name}: every one of its {len(rows)} rows has an image that is missing")
            rows, queries, targets = _renumber(whole, queries, targets)
        return SubsetData(
            name=name,
            queries=queries,
            targets=targets,
            rows=rows,
            rows_in_data=rows_in_data,
            rows_without_image=len(reader.rows) - len(rows),
            rows_merged=reader.merged,
            digest=_digest(queries, targets, rows, rows_in_data, found),
        )

    def _find_images(self, name: str, items: Iterable[Item]) -> dict[str, Status]:
        paths = dict.fromkeys(item.image for item in items if isinstance(item.image, str))
        found = {path: _status(self.images / path) for path in paths}
        missing = [path for path, status in found.items() if status is None]
        if missing and len(missing) == len(found):
            raise CocoaError(
                f"none of the {len(missing)} images of {name} is in {printable(self.images)}; the first should be"
                f" {missing[0]!r}: {_way_out(self.images, missing[0])}"
            )
        if missing and not self.skip_missing_images:
            raise CocoaError(
                f"{len(missing)} of the {len(found)} images of {name} are not in {printable(self.images)}, the first is"
                f" {missing[0]!r}; get them, or leave their rows out with --missing-images skip"
            )
        return found


class _Items:
    """Distinct items, numbered in the order of their appearance."""

    def __init__(self) -> None:
        self.numbers: dict[Item, int] = {}
        self._seen: dict[tuple[str | None, str | None], int] = {}

    def number(self, text: str | None, path: str | None, place: str, name: str | int) -> int:
        """Return the number of an item, given as the data have it."""
        if (text, path) not in self._seen:
            called = f"{place}: {name if isinstance(name, str) else f'candidate {name}'}"
            clean = without_image_token(text or "", bool(path), called)
            if not clean and not path:
                raise CocoaError(f"{called} has neither a text nor an image")
            self._seen[text, path] = self.numbers.setdefault(Item(clean or None, path or None), len(self.numbers))
        return self._seen[text, path]


class _SubsetReader:
    """Turns rows of values into rows of numbers."""

    def __init__(self, merge: bool) -> None:
        self.merge, self.merged = merge, 0
        self.queries, self.targets = _Items(), _Items()
        self.rows: list[Row] = []

    def add(self, place: str, cells: dict[str, Any]) -> None:
        """Add a row of values.

        :raises CocoaError: If an item of it is empty, or a target is listed twice and not merged.
        """
        query = self.queries.number(cells["qry_text"], cells["qry_img_path"], place, "the query")
        candidates = enumerate(zip(cells["tgt_text"], cells["tgt_img_path"], strict=True), 1)
        targets = [self.targets.number(text, path, place, number) for number, (text, path) in candidates]
        distinct = list(dict.fromkeys(targets))
        if len(distinct) < len(targets):
            if not self.merge:
                self._refuse_repeated(place, targets)
            self.merged += 1
        self.rows.append(Row(place, query, np.array(distinct)))

    def _refuse_repeated(self, place: str, targets: list[int]) -> None:
        again = next(position for position, target in enumerate(targets) if target in targets[:position])
        item = list(self.targets.numbers)[targets[again]]
        raise CocoaError(
            f"{place}: candidates {targets.index(targets[again]) + 1} and {again + 1} are the same target ({item});"
            " take one out, or count it once with --repeated-targets merge"
        )


def _has_images(row: Row, queries: list[Item], targets: list[Item], found: dict[str, Status]) -> bool:
    items = (queries[row.query], *(targets[number] for number in row.targets))
    return not any(isinstance(item.image, str) and found[item.image] is None for item in items)


def _renumber(rows: list[Row], queries: list[Item], targets: list[Item]) -> tuple[list[Row], list[Item], list[Item]]:
    """Leave out the items that no row needs any more."""
    used_queries = np.unique([row.query for row in rows])
    used_targets = np.unique(np.concatenate([row.targets for row in rows]))
    renumbered = [
        Row(row.place, int(np.searchsorted(used_queries, row.query)), np.searchsorted(used_targets, row.targets))
        for row in rows
    ]
    return renumbered, [queries[number] for number in used_queries], [targets[number] for number in used_targets]


def _status(path: Path) -> Status:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _way_out(images: Path, path: str) -> str:
    near = (images.absolute().parent, *sorted(entry for entry in images.iterdir() if entry.is_dir()))
    found = next((folder for folder in near if _status(folder / path)), None)
    return f"did you mean --images {printable(found)}?" if found else "give the folder that this path starts from"


def _digest(
    queries: list[Item], targets: list[Item], rows: list[Row], rows_in_data: int, found: dict[str, Status]
) -> str:
    """Return what changes with the rows that are scored, and with the size or the time of an image."""
    digest = hashlib.sha256(repr((rows_in_data, len(queries), len(targets))).encode())
    for item in (*queries, *targets):
        status = found[item.image] if isinstance(item.image, str) else None
        digest.update(repr((item.text, item.image, status)).encode())
    for row in rows:
        digest.update(row.query.to_bytes(8, "little") + row.targets.astype("<i8").tobytes() + b";")
    return digest.hexdigest()
