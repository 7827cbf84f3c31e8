"""Items (a text, an image, or both) and the rows that pair a query with a positive and with negatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from PIL import Image

from cocoa_embed.errors import RowError, is_valid_unicode, printable
from cocoa_embed.images.load import decode_image, load_image

SHOWN_CHARACTERS = 60


class ImageTable(Protocol):
    """A table that holds images."""

    @property
    def fingerprint(self) -> str:
        """A string that changes when the table does."""
        ...

    def row_name(self, row: int) -> str:
        """Return the name of a row in error messages."""
        ...

    def read_image(self, image: ArrowImage) -> bytes:
        """Return the bytes of an image file."""
        ...


@dataclass(frozen=True)
class ArrowImage:
    """An image inside a table; its bytes are read on demand.

    :param row: The row's number in the table, from 0.
    :param position: The image's number in a cell that holds a list, from 0.
    """

    table: ImageTable
    row: int
    column: str
    position: int | None = None

    def __str__(self) -> str:
        """Return the image's name, which is unique in a run."""
        entry = "" if self.position is None else f"[{self.position}]"
        return f"{self.table.row_name(self.row)}, {self.column}{entry}"

    def read(self) -> bytes:
        """Return the bytes of the image file.

        :raises ImageError: If the table cannot be read, or the bytes are too many.
        """
        return self.table.read_image(self)


ItemImage: TypeAlias = Path | ArrowImage
"""An image file, or an image inside a table. Its ``str`` identifies it."""


def load_item_image(image: ItemImage) -> Image.Image:
    """Load an image as upright RGB.

    :raises ImageError: If it cannot be used.
    """
    return decode_image(image.read(), printable(str(image)))[0] if isinstance(image, ArrowImage) else load_image(image)


@dataclass(frozen=True, slots=True)
class Item:
    """A text, images, or both as one input of a model.

    :param text: The content; None or non-empty.
    :param instruction: What the model is to do with the content, with the space that separates them; None or
        non-empty. It comes before the text.
    :raises ValueError: If there is neither a text nor an image.
    """

    text: str | None = None
    images: tuple[ItemImage, ...] = ()
    instruction: str | None = None

    def __post_init__(self) -> None:
        if self.text is None and not self.images:
            raise ValueError("an item needs a text, an image, or both")

    @property
    def image(self) -> ItemImage | None:
        """The first image."""
        return self.images[0] if self.images else None

    @property
    def full_text(self) -> str | None:
        """Instruction and text, as the model sees them."""
        parts = [part for part in (self.instruction, self.text) if part is not None]
        return "".join(parts) if parts else None

    @property
    def parts(self) -> frozenset[str]:
        """What the item consists of: ``text``, ``image`` or both."""
        return frozenset(part for part, value in (("text", self.full_text), ("image", self.images)) if value)

    def under(self, folder: Path) -> Item:
        """Return the item with the paths of its images relative to ``folder``."""
        return replace(self, images=tuple(folder / i if isinstance(i, Path) else i for i in self.images))

    def load(self) -> dict[str, Any]:
        """Return the item as input of a SentenceTransformer, its images decoded: one image as it is, several in a list.

        :raises ImageError: If an image cannot be used.
        """
        images = list(map(load_item_image, self.images))
        loaded: dict[str, Any] = {"image": images[0] if len(images) == 1 else images} if images else {}
        return loaded if self.full_text is None else {**loaded, "text": self.full_text}

    def __str__(self) -> str:
        """Return the item's name in error messages."""
        names = [f"the image {printable(str(image))}" for image in self.images]
        if self.full_text is not None:
            names.append(f"the text {shortened(self.full_text)}")
        return " with ".join(names)


@dataclass(frozen=True, slots=True)
class Row:
    """A query and its positive.

    :param source: Where the row comes from (file and line), for error messages.
    :param negatives: Hard negatives of the query.
    :param subset: The subset of the data that the row belongs to.
    """

    query: Item
    positive: Item
    source: str
    negatives: tuple[Item, ...] = ()
    subset: str = "data"

    @property
    def image(self) -> ItemImage | None:
        """The query's first image, or else the positive's."""
        return self.query.image or self.positive.image

    def items(self) -> tuple[Item, ...]:
        """Return the query, the positive and the negatives."""
        return (self.query, self.positive, *self.negatives)

    def images(self) -> tuple[ItemImage, ...]:
        """Return the images of all items, negatives included."""
        return tuple(image for item in self.items() for image in item.images)

    def reversed(self) -> Row:
        """Return the row with query and positive exchanged, without the negatives, which belong to the query."""
        return replace(self, query=self.positive, positive=self.query, negatives=())


def check_unicode(text: str, source: str) -> str:
    """Return a text unchanged.

    :raises RowError: If it is not valid Unicode, which tokenizers refuse.
    """
    if not is_valid_unicode(text):
        raise RowError(source, f"the text {text[:40]!a} is not valid Unicode: it holds half of a surrogate pair")
    return text


def shortened(value: object) -> str:
    """Return a value as error messages show it, cut after ``SHOWN_CHARACTERS``."""
    written = repr(value) if isinstance(value, str) and value.isprintable() else ascii(value)
    return written if len(written) <= SHOWN_CHARACTERS else f"{written[:SHOWN_CHARACTERS]}…"
