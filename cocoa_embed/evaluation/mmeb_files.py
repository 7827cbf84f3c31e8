"""The Parquet files of MMEB-V1's public layout, ``TIGER-Lab/MMEB-eval``, and what a row of them must look like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, one_line, printable, require

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
LISTS = ("tgt_text", "tgt_img_path")

SHARD = re.compile(r"[^-]+-\d+-of-(?P<count>\d+)")
"""The name of a file that is one of several, such as ``test-00000-of-00002``."""

SPLIT = "test"
ROWS_AT_ONCE = 64


def subset_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a subset: those of the split ``test``, or of the only split there is.

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
            f"{printable(folder)} holds {len(files)} of {expected} Parquet files; get the others, or all of them anew"
        )
    return files


def count_rows(file: Path) -> int:
    """Return how many rows a Parquet file has.

    :raises CocoaError: If it cannot be read.
    """
    parquet, arrow = require("pyarrow.parquet", "eval"), require("pyarrow", "eval")
    try:
        return int(parquet.read_metadata(file).num_rows)
    except (OSError, arrow.ArrowException) as error:
        raise CocoaError(f"{printable(file)} cannot be read ({one_line(error)})") from error


def read_rows(file: Path, at_once: int = ROWS_AT_ONCE) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a Parquet file: what each is called, and its values by column.

    :param at_once: How many rows are read together.
    :raises CocoaError: If it cannot be read, a column is missing, or a value is no text or no list of texts.
    """
    parquet, arrow = require("pyarrow.parquet", "eval"), require("pyarrow", "eval")
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            check_columns(file, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=at_once, columns=list(COLUMNS)):
                for cells in batch.to_pylist():
                    number += 1
                    yield check_row(f"{printable(file)}, row {number}", cells)
    except (OSError, arrow.ArrowException) as error:
        raise CocoaError(f"{printable(file)} cannot be read ({one_line(error)})") from error


def check_columns(file: Path, found: list[str]) -> None:
    """Refuse a table without the layout's columns.

    :raises CocoaError: If one is missing.
    """
    if missing := [column for column in COLUMNS if column not in found]:
        raise CocoaError(
            f"{printable(file)} has no column {' and no '.join(missing)};"
            f" expected {', '.join(COLUMNS)}, found {', '.join(found) or 'none'}"
        )


def check_row(place: str, cells: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a row, or refuse it: texts, and two lists of texts of one length that are not empty. None is no text.

    :raises CocoaError: If it is refused.
    """
    for column in COLUMNS:
        is_list = column in LISTS
        value = cells[column]
        if is_list and not isinstance(value, list):
            raise CocoaError(f"{place}: {column} holds a {type(value).__name__}; expected a list of texts")
        for text in value if is_list else [value]:
            if not isinstance(text, str | None):
                raise CocoaError(f"{place}: {column} holds a {type(text).__name__}; expected text")
    texts, paths = (len(cells[column]) for column in LISTS)
    if texts != paths:
        raise CocoaError(f"{place}: tgt_text lists {texts} candidates and tgt_img_path {paths}; expected as many")
    if texts == 0:
        raise CocoaError(f"{place}: the list of candidates is empty; expected at least one, the first of them right")
    return place, cells
