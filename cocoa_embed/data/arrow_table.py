"""Tables that stay on disk, memory-mapped by ``datasets``: Parquet files and data sets, with the images inside them."""

from __future__ import annotations

import glob
import logging
import tarfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from cocoa_embed.data import SHARD_IMAGES
from cocoa_embed.data.places import Place, open_binary, reading
from cocoa_embed.data.rows import ArrowImage
from cocoa_embed.errors import CocoaError, ImageError, one_line, printable
from cocoa_embed.images.load import check_size
from cocoa_embed.images.urls import is_web

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256
"""Rows that are converted to Python values together."""

SHARD_MEMBERS = 1000
"""The number of files in a shard that are looked at to find its columns: their suffixes."""

EMBEDDED = object()
"""A placeholder for an image's bytes."""

LIST_KINDS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)

UNREADABLE = (OSError, ValueError, RuntimeError, pa.ArrowException, DatasetsError)
"""The errors of ``datasets`` and pyarrow for missing or broken data."""


@dataclass(frozen=True)
class ArrowTable:
    """A memory-mapped table: small in memory, and pickled as a file name.

    :param name: Its name in error messages and in the names of its images; tables of the same name are equal.
    :param dataset: The data set, in the format ``arrow``, which decodes nothing.
    :param origin: What ``reopen`` needs to open it again.
    :param images: Image columns that are merged into an extra column ``image``, with the first value that is not null.
    """

    name: str
    dataset: datasets.Dataset = field(compare=False, repr=False)
    origin: tuple[str | None, ...] = field(default=(), compare=False, repr=False)
    images: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return (*self.dataset.column_names, *(["image"] if self.images else []))

    @property
    def fingerprint(self) -> str:
        """A string that changes when the table does."""
        return self.dataset._fingerprint

    def row_name(self, row: int) -> str:
        """Return the name of a row in error messages, counting from 1."""
        return f"{self.name}, row {row + 1}"

    def read(self, columns: Collection[str], lists: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each row's name and its values, embedded images as ``ArrowImage``.

        :param columns: The columns to read; missing ones are left out.
        :param lists: Not used: Arrow columns are typed.
        """
        images = self.images if "image" in columns else ()
        wanted = [column for column in dict.fromkeys((*columns, *images)) if column in self.dataset.column_names]
        batches = cast(Iterator[pa.Table], self.dataset.select_columns(wanted).iter(batch_size=ROWS_AT_ONCE))
        for first, batch in zip(count(step=ROWS_AT_ONCE), batches, strict=False):
            values = [self._values(batch[column], column, first) for column in wanted]
            for row, cells in enumerate(zip(*values, strict=True), first):
                found = dict(zip(wanted, cells, strict=True))
                one = {"image": next(filter(None, map(found.get, images)), None)} if images else {}
                yield self.row_name(row), {**found, **one}

    def read_image(self, image: ArrowImage) -> bytes:
        """Return the bytes of an embedded image.

        :raises ImageError: If the table cannot be read, or the bytes are too many.
        """
        name = printable(str(image))
        try:
            cell = self.dataset[image.row][image.column][0]
            if image.position is not None:
                cell = cell.values[image.position]
            if isinstance(cell, pa.StructScalar):
                cell = cell["bytes"]
        except (OSError, LookupError, pa.ArrowException) as error:
            raise ImageError(name, f"cannot be read ({one_line(error)})") from error
        content = cell.as_buffer()
        check_size(content.size, name)
        return bytes(content)

    def _values(self, cells: pa.ChunkedArray, column: str, first: int) -> list[Any]:
        """Return the values of a column in the batch that begins at row ``first``. No image bytes are read."""
        is_list = any(is_kind(cells.type) for is_kind in LIST_KINDS)
        if not _holds_images(cells.type.value_type if is_list else cells.type):
            return cells.to_pylist()

        def image_or(value: object, offset: int, position: int | None = None) -> object:
            return ArrowImage(self, first + offset, column, position) if value is EMBEDDED else value

        if not is_list:
            return [image_or(value, offset) for offset, value in enumerate(_without_bytes(cells))]
        lists = (_without_bytes(cell.values) if cell.is_valid else None for cell in cells)
        return [
            values and [image_or(value, offset, position) for position, value in enumerate(values)]
            for offset, values in enumerate(lists)
        ]


def _holds_images(kind: pa.DataType) -> bool:
    return _is_binary(kind) or (pa.types.is_struct(kind) and any(member.name == "bytes" for member in kind))


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _without_bytes(cells: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return images as ``EMBEDDED``, or as their paths if they have no bytes; None if they have neither."""
    if _is_binary(cells.type):
        return [EMBEDDED if length else None for length in pc.call_function("binary_length", [cells]).to_pylist()]
    members = dict(zip((member.name for member in cells.type), cells.flatten(), strict=True))
    embedded = _without_bytes(members["bytes"])
    paths = members["path"].to_pylist() if "path" in members else [None] * len(embedded)
    return [content or path for content, path in zip(embedded, paths, strict=True)]


def open_parquet(path: Place) -> ArrowTable:
    """Open a Parquet file, without columns of types that ``datasets`` does not know.

    :raises CocoaError: If it cannot be read.
    """
    with reading(path):
        with open_binary(path) as file:
            metadata = parquet.read_metadata(file)
            features = _known_features(metadata.schema.to_arrow_schema(), printable(path))
            columns = None if features is None else [*features]
            empty = None if metadata.num_rows else parquet.read_table(file, columns=columns)
        if empty is None:
            return _open_files("parquet", [path], features, **({} if columns is None else {"columns": columns}))
    return ArrowTable(printable(path), datasets.Dataset(empty).with_format("arrow"), ("parquet", str(path)))


def _known_features(schema: pa.Schema, name: str) -> datasets.Features | None:
    """Return the features of the columns whose types ``datasets`` knows; None if it knows all.

    :param name: The table's name, for the warning about the others.
    """
    known, unknown = [], []
    for column in schema:
        try:
            datasets.Features.from_arrow_schema(pa.schema([column]))
            known.append(column)
        except ValueError:
            unknown.append(f"{column.name!r} ({column.type})")
    if not unknown:
        return None
    logger.warning("%s: the columns %s are not read, as the package datasets does not know their types; to use them, "
                   "write them as text, numbers, lists or structs", name, printable(", ".join(unknown)))  # fmt: skip
    return datasets.Features.from_arrow_schema(pa.schema(known))


def open_shards(paths: Sequence[Place]) -> ArrowTable:
    """Open the tar files of a WebDataset: files of the same name form a row, with a column for each suffix.

    If images have several suffixes, there is also a column ``image``.

    :raises CocoaError: If they cannot be read.
    """
    name = printable(paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more")
    with reading(name):
        table = _with_one_image(replace(_open_files("webdataset", paths, _shard_features(paths[0])), name=name))
    if not any(_holds_images(kind) for kind in table.dataset.features.arrow_schema.types):
        kinds = ", ".join(column for column in table.columns if not column.startswith("__"))
        raise CocoaError(f"{name} has no images (files found: {kinds}); a row is an image and a text of the same name.")
    return table


def _with_one_image(table: ArrowTable) -> ArrowTable:
    """Drop empty image columns, and add a column ``image`` unless only one of ``SHARD_IMAGES`` is left."""
    suffixes = [column for column in table.columns if column in WebDataset.IMAGE_EXTENSIONS]
    empty = [suffix for suffix in suffixes if table.dataset.data.column(suffix).null_count == len(table)]
    used = [suffix for suffix in dict.fromkeys((*SHARD_IMAGES, *suffixes)) if suffix in {*suffixes} - {*empty}]
    is_usual = len(used) == 1 and used[0] in SHARD_IMAGES
    dataset = table.dataset.remove_columns(empty) if empty else table.dataset
    return replace(table, dataset=dataset, images=() if is_usual or "image" in table.columns else tuple(used))


def _shard_features(shard: Place) -> datasets.Features | None:
    """Return the features of a shard of images and texts, with all usual image columns; None if it has other files.

    Without given features, ``datasets`` refuses all shards if one of the first samples lacks a file.
    """
    with open_binary(shard) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        names = [member.name for member in islice(archive, SHARD_MEMBERS) if member.isfile()]
    suffixes = {suffix for name in names if (suffix := base_plus_ext(name)[1]) is not None}
    images = suffixes & {*WebDataset.IMAGE_EXTENSIONS}
    if not images or suffixes - images != {"txt"}:
        return None
    suffixes |= {*SHARD_IMAGES}  # later samples may have them
    kinds = {suffix: datasets.Value("string") if suffix == "txt" else datasets.Image() for suffix in sorted(suffixes)}
    return datasets.Features({**kinds, "__key__": datasets.Value("string"), "__url__": datasets.Value("string")})


def _open_files(
    builder: str, paths: Sequence[Place], features: datasets.Features | None = None, **options: Any
) -> ArrowTable:
    files = [str(path.absolute() if isinstance(path, Path) else path) for path in paths]
    # ``datasets`` treats local names as patterns; in a web address, a question mark is not a wildcard.
    files = [file if is_web(file) else glob.escape(file) for file in files]
    dataset = _load(builder, data_files=files, split="train", features=features, **options)
    return ArrowTable(printable(paths[0]), dataset.with_format("arrow"), (builder, *map(str, paths)))


def open_data_set(name: str, config: str | None, splits: Sequence[str]) -> ArrowTable:
    """Open a data set from the hub, or from a folder that ``datasets`` reads or wrote.

    :param splits: The first of these that the data set has is opened.
    :raises CocoaError: If it cannot be loaded, or has none of the splits.
    """
    faults: list[BaseException] = []
    for split in splits:
        try:
            dataset = _load_data_set(name, config, split)
        except UNREADABLE as error:
            faults.append(error)
            if "split" not in str(error).lower():
                break
        else:
            title = ", ".join(filter(None, (name, config, split)))
            return ArrowTable(title, dataset.with_format("arrow"), ("hub", name, config, split))
    what, reason = printable(", ".join(filter(None, (name, config)))), one_line(faults[0]).rstrip(".")
    raise CocoaError(
        f"The data set {what} cannot be loaded ({reason}); check its name, config and split, and the connection to the"
        " hub if it is not a folder."
    ) from faults[0]


@cache
def reopen(origin: tuple[str | None, ...]) -> ArrowTable:
    """Open a table again by its ``origin``: its kind, then its files, or a data set's name, config and split.

    :raises CocoaError: If it cannot be opened any more.
    """
    kind, *rest = origin
    if kind == "hub":
        name, config, split = rest
        return open_data_set(str(name), config, (str(split),))
    paths = [str(path) if "://" in str(path) else Path(str(path)) for path in rest]
    return open_shards(paths) if kind == "webdataset" else open_parquet(paths[0])


def _load_data_set(name: str, config: str | None, split: str) -> datasets.Dataset:
    if not any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _load(name, config, split=split)
    saved = datasets.load_from_disk(name)
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"no split {split!r}; it has {', '.join(map(str, saved))}")
    return saved[split]


def _load(*arguments: Any, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(*arguments, **options)
    except DatasetGenerationError as error:  # its own message does not say why
        raise DatasetsError(one_line(error.__cause__ or error)) from error
