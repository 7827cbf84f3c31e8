"""Read rows from every kind of source: image folders, tables, WebDatasets, MMEB-train and data sets of the hub."""

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cocoa_embed.data.arrow_table import ArrowTable, open_data_set, open_shards
from cocoa_embed.data.columns import NEGATIVE_PARTS, RowReader, map_columns
from cocoa_embed.data.image_folder import caption_files
from cocoa_embed.data.mmeb import TRAIN_SUBSETS, split_instruction, without_image_token
from cocoa_embed.data.places import Place, version_of
from cocoa_embed.data.rows import Row
from cocoa_embed.data.tables import Table, find_files, open_table
from cocoa_embed.errors import CocoaError, RowError, did_you_mean, printable
from cocoa_embed.train.data.caption_rows import read_captions
from cocoa_embed.train.settings import SourceSettings

MMEB_COLUMNS = {
    "query_text": "qry",
    "query_image": "qry_image_path",
    "positive_text": "pos_text",
    "positive_image": "pos_image_path",
    "negative_text": "neg_text",
    "negative_image": "neg_image_path",
}


def read_subset(subset: str, source: SourceSettings) -> Iterator[tuple[int, Row | RowError]]:
    """Yield the rows of one source in order, or the errors of rows that cannot be used; images may be missing.

    Each comes with the number of its entry, from 0: the number of its image in an image folder, otherwise its own.

    :param subset: The rows' subset. In the ``mmeb`` layout it is also the name of the subset to read, unless
        ``config`` is given.
    :raises CocoaError: If the source cannot be read: a folder, file, column or data set is missing.
    """
    first = source.limit if source.limit_order == "first" else None
    if source.folder is not None:
        yield from read_captions(source.folder, source.captions, source.paraphrases, first, subset,
                                 instructions=source.instructions, must_exist=False)  # fmt: skip
        return
    name, tables = _open_source(subset, source)
    found = list(dict.fromkeys(column for table, _ in tables for column in table.columns))
    columns = source.columns.model_dump(exclude_none=True) if source.columns else None
    if source.mmeb is not None and columns is None:
        columns = {part: each for part, each in MMEB_COLUMNS.items() if each in found or part not in NEGATIVE_PARTS}
    mapping = map_columns(name, found, columns)
    reader = partial(RowReader, mapping, subset=subset, instructions=source.instructions, must_exist=False)
    if source.mmeb is not None:
        reader = partial(reader, clean=without_image_token, split=partial(split_instruction, source.config or subset))
    if not any(len(table) for table, _ in tables):
        raise CocoaError(f"{name} has no rows.")
    rows = (reader(images=images).read(table) for table, images in tables)
    yield from enumerate(islice(chain.from_iterable(rows), first))


def source_version(subset: str, source: SourceSettings) -> list[Any]:
    """Return values, for JSON, that change when ``read_subset`` would give other rows.

    :raises CocoaError: If a file or a data set of the source is missing.
    """
    is_first = source.limit_order == "first"
    settings = source.model_dump(mode="json", exclude={"weight"} if is_first else {"weight", "limit"})
    files = _files(subset, source)
    content = [table.fingerprint for table in _open_hub(subset, source)] if files is None else map(version_of, files)
    return [settings, str(source.images and source.images.absolute()), list(content)]


def _files(subset: str, source: SourceSettings) -> list[Place] | None:
    """Return the files of a source, None for a data set.

    :raises CocoaError: If there are none.
    """
    if source.folder is not None:
        return [*caption_files(source.folder)]
    if source.file is not None:
        return find_files(source.file)
    if source.webdataset is not None:
        return find_files(source.webdataset, ".tar file")
    folder = None if source.mmeb is None else _folder(source.mmeb)
    return None if folder is None else [*_mmeb_files(folder, source.config or subset, source.split)]


def _open_hub(subset: str, source: SourceSettings) -> list[ArrowTable]:
    """Return a data set of the hub, or of a folder.

    :raises CocoaError: If it cannot be loaded, or has no such subset.
    """
    if source.mmeb is None:
        return [open_data_set(str(source.hub), source.config, (source.split,))]
    name = source.config or subset
    if source.config is None and name not in TRAIN_SUBSETS:
        hint = did_you_mean(name, TRAIN_SUBSETS)
        raise CocoaError(
            f"{source.mmeb} has no subset {name!r} {hint}; if the subset has another name there, give it as config."
        )
    if source.images is None:
        raise CocoaError(
            f"{source.mmeb}, {name}: the data set has no images; download them, and give their folder as data.images."
        )
    return [open_data_set(source.mmeb, name, _mmeb_splits(source.split))]


def _open_source(subset: str, source: SourceSettings) -> tuple[str, list[tuple[Table, Path | None]]]:
    """Return the source's name in error messages, and its tables, each with the folder of its relative image paths."""
    files = _files(subset, source)
    if files is None:
        tables = _open_hub(subset, source)
        given = str(source.mmeb or source.hub)
        return tables[0].name, [(table, source.images or _folder(given)) for table in tables]
    if source.webdataset is not None:
        shards = open_shards(files)
        return shards.name, [(shards, source.images)]
    if source.mmeb is not None:
        name = printable(f"{source.mmeb}, {source.config or subset}")
        return name, [(open_table(path), source.images or _folder(source.mmeb)) for path in files]
    beside = ((path, path.parent if isinstance(path, Path) else None) for path in files)
    return printable(str(source.file)), [(open_table(path), source.images or folder) for path, folder in beside]


def _folder(name: str) -> Path | None:
    return Path(name) if Path(name).is_dir() else None


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
