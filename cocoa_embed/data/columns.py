"""Turn the columns of a table into rows: a query, its positive and its negatives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cocoa_embed.data import SHARD_IMAGES
from cocoa_embed.data.rows import ArrowImage, Item, ItemImage, Row, check_unicode, shortened
from cocoa_embed.data.tables import Table
from cocoa_embed.errors import CocoaError, RowError, did_you_mean, printable
from cocoa_embed.images.file_names import as_on_disk

Side: TypeAlias = Literal["query", "positive"]

NEGATIVE_PARTS = ("negative_text", "negative_image")

PARTS = (
    *("query_instruction", "query_text", "query_image"),
    *("positive_instruction", "positive_text", "positive_image"),
    *NEGATIVE_PARTS,
)
"""The parts of a row; each may have a column."""

KNOWN_LAYOUTS = (
    {"query_text": "text", "positive_image": "image"},
    {"query_text": "text", "positive_image": "file_name"},
    {"query_text": "caption", "positive_image": "image"},
    *({"query_text": "txt", "positive_image": column} for column in ("image", *SHARD_IMAGES)),
)
"""The columns that hold the parts in common data sets."""

SIDES: tuple[Side, ...] = ("query", "positive")

CleanText = Callable[[str, bool, str], str]
"""Cleans or refuses a text, given whether its item has an image, and the row's source."""

SplitText = Callable[[Literal["query", "target"], str], tuple[str | None, str | None]]
"""Splits a text of a side into its instruction and its content."""


def map_columns(
    name: str,
    found: Sequence[str],
    given: Mapping[str, str] | None = None,
    option: Callable[[str], str] = "columns.{}".format,
) -> dict[str, str]:
    """Return the column of each part.

    :param name: The table's name in error messages.
    :param found: The table's columns.
    :param given: The column of each part; by default the columns named as in ``PARTS``, or the first of
        ``KNOWN_LAYOUTS`` that is complete.
    :param option: Returns the option with which a user names the column of a part.
    :raises CocoaError: If a column is missing, or the query or the positive has none.
    """
    named = {part: part for part in PARTS if part in found}
    instructions = {part: part for part in named if part.endswith("_instruction")}
    layouts = (layout for layout in (named, *KNOWN_LAYOUTS) if {*found} >= {*layout.values()})
    default = next((layout for layout in layouts if _missing_side(layout) is None), named)
    mapping = given or {**instructions, **default}
    for part, column in mapping.items():
        if column not in found:
            raise CocoaError(f"{name} has no column {column!r} for {part} {did_you_mean(column, found)}.")
    if side := _missing_side(mapping):
        raise CocoaError(f"{name}: no column holds the {side}; give {option(f'{side}_text')} or "
                         f"{option(f'{side}_image')} (columns found: {', '.join(found) or 'none'}).")  # fmt: skip
    return dict(mapping)


def _missing_side(mapping: Mapping[str, str]) -> str | None:
    return next((side for side in SIDES if not {f"{side}_text", f"{side}_image"} & {*mapping}), None)


@dataclass(frozen=True)
class RowReader:
    """Turns a table's values into rows.

    :param mapping: The column of each part, from ``map_columns``.
    :param images: The folder that relative image paths start from; None refuses such paths.
    :param clean: Applied to every text and instruction, if given.
    :param split: Applied to the texts of a table without columns of instructions, if given.
    :param instructions: The instruction of each row, by side; a column of instructions replaces it. Negatives have the
        instruction of their positive.
    :param must_exist: Whether a missing image is an error.
    """

    mapping: Mapping[str, str]
    images: Path | None
    subset: str = "data"
    clean: CleanText | None = None
    split: SplitText | None = None
    instructions: Mapping[Side, str] = field(default_factory=dict)
    must_exist: bool = True

    def read(self, table: Table) -> Iterator[Row | RowError]:
        """Yield a table's rows in order, or the errors of rows that cannot be used."""
        lists = [self.mapping[part] for part in NEGATIVE_PARTS if part in self.mapping]
        for source, values in table.read(set(self.mapping.values()), lists):
            try:
                yield values if isinstance(values, RowError) else self.row(values, source)
            except RowError as error:
                yield error

    def row(self, values: Mapping[str, Any], source: str) -> Row:
        """Make a row.

        :raises RowError: If a value cannot be used, or a side is empty.
        """
        query, positive = (self._side(side, values, source) for side in SIDES)
        texts, images = (_as_list(values.get(self.mapping.get(part, ""))) for part in NEGATIVE_PARTS)
        if texts and images and len(texts) != len(images):
            raise RowError(source, f"it has {len(texts)} negative texts and {len(images)} negative images; expected "
                           "the same number of both")  # fmt: skip
        negatives = (self._item("positive", text, image, values, source) for text, image in zip_longest(texts, images))
        return Row(query, positive, source, tuple(item for item in negatives if item is not None), self.subset)

    def _side(self, side: Side, values: Mapping[str, Any], source: str) -> Item:
        text, image = (self.mapping.get(f"{side}_{part}", "") for part in ("text", "image"))
        item = self._item(side, values.get(text), values.get(image), values, source)
        if item is None:
            raise RowError(source, f"the {side} is empty ({' and '.join(filter(None, (text, image)))})")
        return item

    def _item(self, side: Side, text: object, image: object, values: Mapping[str, Any], source: str) -> Item | None:
        """Return an item, or None if it has neither a text nor an image."""
        images = () if _is_empty(image) else (self._image(image, source),)
        column = self.mapping.get(f"{side}_instruction")
        given = self.instructions.get(side) if column is None else values.get(column)
        content, instruction = (self._text(value, bool(images), source) for value in (text, given))
        if content is None and not images:
            return None
        if self.split is not None and content is not None and instruction is None:
            instruction, content = self.split("query" if side == "query" else "target", content)
            if content is None and not images:  # an instruction alone is a text
                instruction, content = None, instruction
            return Item(content, images, instruction)
        return Item(content, images, separated(instruction, content))

    def _text(self, text: object, has_image: bool, source: str) -> str | None:
        if not isinstance(text, str | None):
            raise RowError(source, f"{shortened(text)} is not a text")
        if text:
            check_unicode(text, source)
            text = text if self.clean is None else self.clean(text, has_image, source)
        return None if _is_empty(text) else text

    def _image(self, value: object, source: str) -> ItemImage:
        if isinstance(value, ArrowImage):
            return value
        if not isinstance(value, str):
            raise RowError(source, f"{shortened(value)} is not the path of an image")
        if "://" in value or value.startswith("data:"):
            raise RowError(source, f"the image {shortened(value)} is a URL; download it and give its path")
        path = Path(value)
        if not path.is_absolute():
            if self.images is None:
                raise RowError(source, f"the image {printable(path)} is a relative path; give the folder it starts "
                               "from as data.images")  # fmt: skip
            path = (self.images / path).absolute()
        path = as_on_disk(path)
        if "\0" in value or (self.must_exist and not path.is_file()):
            raise RowError(source, f"the image {printable(path)} does not exist")
        return path


def separated(instruction: str | None, text: str | None) -> str | None:
    """Return an instruction with the space that separates it from a text, or without space if there is no text."""
    if instruction is None or text is None:
        return instruction and instruction.rstrip()
    return instruction if instruction[-1].isspace() else f"{instruction} "


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _as_list(value: object) -> list[object]:
    """Return a list as it is, a single value as a list of one, and empty values as an empty list."""
    values = value if isinstance(value, list) else [value]
    return [] if all(map(_is_empty, values)) else values
