"""Rows from every kind of source that a recipe may name."""

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

from cocoa_embed.data.image_token import without_image_token
from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.train.data.columns import RowReader, Tidy, columns_of, map_columns
from cocoa_embed.train.data.mmeb import (
    MMEB_TRAIN_SUBSETS,
    columns_found,
    find_subset_files,
    nearest_subset,
    splits_of,
)
from cocoa_embed.train.data.rows import BadRow, Row, read_image_folder
from cocoa_embed.train.data.tables import Table, find_tables, open_data_set, open_table
from cocoa_embed.train.settings import ColumnsSettings, SourceSettings


def read_source(subset: str, source: SourceSettings, bad: list[BadRow]) -> list[Row]:
    """Read the rows of one source, in their order.

    :param subset: The name that the rows get. For the ``mmeb`` layout it is also the subset to read, where ``config``
        does not say otherwise.
    :param bad: Where rows are put that cannot be used.
    :raises CocoaError: If the source as a whole cannot be read: a folder, file, column or data set is not there.
    """
    if source.folder is not None:
        return read_image_folder(
            source.folder,
            captions=source.captions,
            paraphrases=source.paraphrases,
            limit=source.limit,
            subset=subset,
            bad=bad,
        )
    if source.file is not None:
        return _read_files(subset, source, source.file, bad)
    if source.mmeb is not None:
        return _read_mmeb(subset, source, source.mmeb, bad)
    if source.hub is not None:
        table = open_data_set(source.hub, source.config, (source.split,))
        images = source.images or _folder(source.hub)
        return _read_tables(subset, source, table.name, [(table, images)], source.columns, bad)
    raise ValueError(f"the source {subset!r} names nothing to read")


def _read_files(subset: str, source: SourceSettings, pattern: str, bad: list[BadRow]) -> list[Row]:
    tables = [(open_table(path), source.images or path.parent) for path in find_tables(pattern)]
    return _read_tables(subset, source, printable(pattern), tables, source.columns, bad)


def _read_mmeb(subset: str, source: SourceSettings, mmeb: str, bad: list[BadRow]) -> list[Row]:
    name = source.config or subset
    folder = _folder(mmeb)
    tables: list[Table]
    if folder is not None:
        tables = [open_table(path) for path in find_subset_files(folder, name, source.split)]
    elif mmeb.startswith((".", "/", "~")):
        raise CocoaError(f"{printable(mmeb)} does not exist; give the folder of MMEB-train, or its name on the hub.")
    else:
        _check_hub_subset(subset, source)
        tables = [open_data_set(mmeb, name, splits_of(source.split))]
    images = source.images or folder
    columns = source.columns or columns_found(columns_of(tables))
    where = printable(f"{mmeb}, {name}")
    return _read_tables(
        subset, source, where, [(table, images) for table in tables], columns, bad, tidy=without_image_token
    )


def _check_hub_subset(subset: str, source: SourceSettings) -> None:
    if source.config is None and subset not in MMEB_TRAIN_SUBSETS:
        hint = nearest_subset(subset, MMEB_TRAIN_SUBSETS)
        raise CocoaError(f"{source.mmeb} has no subset {subset!r}{hint}; a subset of another name needs its config.")
    if source.images is None:
        raise CocoaError(f"{source.mmeb}, {subset}: its images are not part of it; download them and give data.images.")


def _folder(name: str) -> Path | None:
    return Path(name) if Path(name).is_dir() else None


def _read_tables(
    subset: str,
    source: SourceSettings,
    name: str,
    tables: Sequence[tuple[Table, Path | None]],
    columns: ColumnsSettings | None,
    bad: list[BadRow],
    *,
    tidy: Tidy | None = None,
) -> list[Row]:
    """Read tables, each with the folder that its images' paths start from, as one."""
    if source.images is not None and not source.images.is_dir():
        raise CocoaError(f"{printable(source.images)} is not a folder; data.images is where image paths start from.")
    mapping = map_columns(name, columns_of([table for table, _ in tables]), columns)
    found = chain.from_iterable(RowReader(subset, mapping, images, tidy).read(table, bad) for table, images in tables)
    rows = list(islice(found, source.limit))
    if not rows:
        raise CocoaError(f"{name} has no rows.")
    return [row for row in rows if row is not None]
