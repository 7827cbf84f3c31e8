"""Reads rows from every kind of source: image folders, tables, MMEB-train and data sets of the hub."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from cocoa_embed.data.arrow_table import open_data_set
from cocoa_embed.data.columns import NEGATIVE_PARTS, RowReader, map_columns
from cocoa_embed.data.mmeb import TRAIN_SUBSETS, without_image_token
from cocoa_embed.data.rows import Row
from cocoa_embed.data.tables import Table, find_tables, open_table
from cocoa_embed.errors import CocoaError, RowError, did_you_mean, printable
from cocoa_embed.train.data.caption_rows import read_captions
from cocoa_embed.train.data.rows import check_text
from cocoa_embed.train.settings import SourceSettings

MMEB_COLUMNS = {
    "query_text": "qry",
    "query_image": "qry_image_path",
    "positive_text": "pos_text",
    "positive_image": "pos_image_path",
    "negative_text": "neg_text",
    "negative_image": "neg_image_path",
}


def read_subset(subset: str, source: SourceSettings) -> Iterator[Row | RowError]:
    """Yield the rows of one source in order, or the errors of rows that cannot be used.

    :param subset: The rows' subset. In the ``mmeb`` layout it is also the name of the subset to read, unless
        ``config`` is given.
    :raises CocoaError: If the source cannot be read: a folder, file, column or data set is missing.
    """
    if source.folder is not None:
        yield from read_captions(source.folder, source.captions, source.paraphrases, source.limit, subset)
        return
    name, tables = _open_source(subset, source)
    found = list(dict.fromkeys(column for table, _ in tables for column in table.columns))
    columns = source.columns.model_dump(exclude_none=True) if source.columns else None
    if source.mmeb is not None and columns is None:
        columns = {part: each for part, each in MMEB_COLUMNS.items() if each in found or part not in NEGATIVE_PARTS}
    mapping = map_columns(name, found, columns)
    clean = _check_text if source.mmeb is None else _clean_mmeb_text
    if not any(len(table) for table, _ in tables):
        raise CocoaError(f"{name} has no rows.")
    rows = (RowReader(mapping, images, subset, clean).read(table) for table, images in tables)
    yield from islice(chain.from_iterable(rows), source.limit)


def _open_source(subset: str, source: SourceSettings) -> tuple[str, list[tuple[Table, Path | None]]]:
    """Return the source's name in error messages, and its tables, each with the folder of its relative image paths."""
    if source.file is not None:
        paths = find_tables(source.file)
        return printable(source.file), [(open_table(path), source.images or path.parent) for path in paths]
    if source.hub is not None:
        table = open_data_set(source.hub, source.config, (source.split,))
        return table.name, [(table, source.images or _folder(source.hub))]
    assert source.mmeb is not None
    name = source.config or subset
    folder = _folder(source.mmeb)
    images = source.images or folder
    tables: list[Table]
    if folder is not None:
        tables = [open_table(path) for path in _mmeb_files(folder, name, source.split)]
    elif source.config is None and name not in TRAIN_SUBSETS:
        hint = did_you_mean(name, TRAIN_SUBSETS)
        raise CocoaError(f"{source.mmeb} has no subset {name!r} {hint}; give the config of a subset of another name.")
    elif images is None:
        raise CocoaError(f"{source.mmeb}, {name}: its images are not part of it; download them and give data.images.")
    else:
        tables = [open_data_set(source.mmeb, name, _mmeb_splits(source.split))]
    return printable(f"{source.mmeb}, {name}"), [(table, images) for table in tables]


def _folder(name: str) -> Path | None:
    return Path(name) if Path(name).is_dir() else None


def _check_text(text: str, has_image: bool, source: str) -> str:
    return check_text(text, source)


def _clean_mmeb_text(text: str, has_image: bool, source: str) -> str:
    return check_text(without_image_token(text, has_image, source), source)


def _mmeb_splits(split: str) -> tuple[str, ...]:
    """Return the names of a split: ``train``, the default of recipes, is called ``original`` in MMEB-train."""
    return ("train", "original") if split == "train" else (split,)


def _mmeb_files(folder: Path, subset: str, split: str) -> list[Path]:
    """Return the Parquet files of a subset's split, in its sub-folder or in a folder that is itself a subset.

    :raises CocoaError: If there are none.
    """
    of_subset = folder / subset if (folder / subset).is_dir() else folder
    files = sorted(of_subset.glob("*.parquet"))
    if not files:
        known = sorted(entry.name for entry in folder.iterdir() if any(entry.glob("*.parquet")))
        raise CocoaError(f"{printable(of_subset)} holds no subset {subset!r} {did_you_mean(subset, known)}.")
    for name in _mmeb_splits(split):
        if of_split := [file for file in files if file.stem.split("-")[0] == name]:
            return of_split
    found = sorted({file.stem.split("-")[0] for file in files})
    raise CocoaError(f"{printable(of_subset)} has no files of the split {split!r} {did_you_mean(split, found)}.")
