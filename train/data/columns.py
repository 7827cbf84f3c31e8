"""From a table's columns to rows: a query, a positive, and negatives, each a text, an image, or both."""

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cocoa_embed.errors import CocoaError, RowError, printable
from cocoa_embed.images.find_files import MetadataError
from cocoa_embed.train.data.arrow_images import StoredImage
from cocoa_embed.train.data.rows import BadRow, Item, Row, RowImage, checked_text
from cocoa_embed.train.data.tables import Table
from cocoa_embed.train.settings import ColumnsSettings

PARTS = tuple(ColumnsSettings.model_fields)
"""The parts of a row that a column may hold: ``query_text``, ``query_image`` and so on."""

NEGATIVE_PARTS = ("negative_text", "negative_image")

Tidy = Callable[[str, bool, str], str]
"""What is done to a text before all else, given whether an image stands beside it, and the row's place."""


def map_columns(name: str, found: Sequence[str], section: ColumnsSettings | None) -> dict[str, str]:
    """Return the column of each part of a row; without a section, each part's column is called as it is.

    :param name: What to call the table in errors.
    :param found: The columns that the table has.
    :raises CocoaError: If a column is not there, or the query or the positive has none.
    """
    if section is None:
        mapping = {part: part for part in PARTS if part in found}
    else:
        mapping = section.model_dump(exclude_none=True)
    listed = f"found are {', '.join(map(repr, found)) or 'none'}"
    for part, column in mapping.items():
        if column not in found:
            nearest = difflib.get_close_matches(column, found, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}? {listed}" if nearest else listed
            raise CocoaError(f"{name} has no column {column!r} for the {part.replace('_', ' ')} ({hint}).")
    for side in ("query", "positive"):
        if not any(part.startswith(side) for part in mapping):
            raise CocoaError(f"{name}: no column holds the {side}; give columns.{side}_text or columns.{side}_image "
                             f"({listed}).")  # fmt: skip
    return mapping


@dataclass(frozen=True)
class RowReader:
    """Makes rows from a table's values.

    :param mapping: The column of each part of a row, as ``map_columns`` returns.
    :param images: The folder that relative image paths start from; without one they cannot be used.
    :param tidy: Applied to every text first.
    """

    subset: str
    mapping: Mapping[str, str]
    images: Path | None
    tidy: Tidy | None = None

    def read(self, table: Table, bad: list[BadRow]) -> Iterator[Row | None]:
        """Yield a table's rows; those that cannot be used go to ``bad``, with None in their place."""
        lists = [self.mapping[part] for part in NEGATIVE_PARTS if part in self.mapping]
        for place, entry in table.read(set(self.mapping.values()), lists):
            try:
                if isinstance(entry, MetadataError):
                    raise entry
                row = self._row(entry, place)
            except (MetadataError, RowError) as error:
                bad.append(BadRow(self.subset, error.source, error.reason))
                row = None
            yield row

    def _row(self, values: Mapping[str, Any], place: str) -> Row:
        query, positive = (self._side(side, values, place) for side in ("query", "positive"))
        return Row(query, positive, place, self._negatives(values, place), self.subset)

    def _side(self, side: str, values: Mapping[str, Any], place: str) -> Item:
        parts = [part for part in (f"{side}_text", f"{side}_image") if part in self.mapping]
        given = {part.removeprefix(f"{side}_"): values.get(self.mapping[part]) for part in parts}
        item = self._item(given.get("text"), given.get("image"), place)
        if item is None:
            raise RowError(place, f"the {side} is empty ({' and '.join(self.mapping[part] for part in parts)})")
        return item

    def _negatives(self, values: Mapping[str, Any], place: str) -> tuple[Item, ...]:
        """Return the negatives: texts and images side by side, where there are both as many of one as of the other."""
        texts, images = (_as_list(values.get(self.mapping.get(part, ""))) for part in NEGATIVE_PARTS)
        if texts and images and len(texts) != len(images):
            raise RowError(place, f"it has {len(texts)} negative texts and {len(images)} negative images; expected as "
                           "many of one as of the other")  # fmt: skip
        items = [self._item(text, image, place) for text, image in zip_longest(texts, images)]
        return tuple(item for item in items if item is not None)

    def _item(self, text: object, image: object, place: str) -> Item | None:
        """Return an item; None where both parts are empty."""
        found_image = None if _is_empty(image) else self._image(image, place)
        if not isinstance(text, str | None):
            raise RowError(place, f"{_shortened(text)} stands where a text is expected")
        if text and self.tidy:
            text = self.tidy(text, found_image is not None, place)
        found_text = None if _is_empty(text) else checked_text(str(text), place)
        return None if found_text is None and found_image is None else Item(found_text, found_image)

    def _image(self, value: object, place: str) -> RowImage:
        if isinstance(value, StoredImage):
            return value
        if not isinstance(value, str):
            raise RowError(place, f"{_shortened(value)} stands where the path of an image is expected")
        if "://" in value or value.startswith("data:"):
            raise RowError(place, f"the image {_shortened(value)} is a URL; download it and give its path")
        path = Path(value)
        if not path.is_absolute():
            if self.images is None:
                raise RowError(place, f"the image {printable(path)} is a relative path; give the folder it starts from "
                               "as data.images")  # fmt: skip
            path = (self.images / path).absolute()
        if "\0" in value or not path.is_file():
            raise RowError(place, f"the image {printable(path)} does not exist")
        return path


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _as_list(value: object) -> list[object]:
    """Return several values as they are, one as a list of it, and none as no values."""
    if isinstance(value, list):
        return [] if all(map(_is_empty, value)) else value
    return [] if _is_empty(value) else [value]


def _shortened(value: object) -> str:
    written = ascii(value)
    return written if len(written) <= 60 else f"{written[:60]}…"


def columns_of(tables: Collection[Table]) -> list[str]:
    """Return the names of the columns of several tables, each once."""
    return list(dict.fromkeys(column for table in tables for column in table.columns))
