"""Training rows, and the readers that make them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from cocoa_embed.backbone import MAX_ASPECT_RATIO
from cocoa_embed.errors import CocoaError
from cocoa_embed.images import ImageError, load_image, printable, read_image_folder_metadata
from cocoa_embed.template import RESERVED_TOKENS

CaptionChoice = Literal["text", "captions"]


@dataclass(frozen=True)
class Item:
    """One side of a pair: a text, an image, or both."""

    text: str | None = None
    image: Path | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.image is None:
            raise ValueError("an item needs a text, an image, or both")


@dataclass(frozen=True)
class Row:
    """A pair of items that belong together.

    :param source: Where the row comes from (file and line), for errors.
    :param negatives: Items that look like the positive and are wrong.
    :param subset: The subset of the data that the row is from.
    """

    query: Item
    positive: Item
    source: str
    negatives: tuple[Item, ...] = ()
    subset: str = "data"

    @property
    def image(self) -> Path | None:
        """The row's image, from whichever side has one."""
        return self.query.image or self.positive.image

    def with_image(self, image: Path | None) -> "Row":
        """Return the row with another image in the place of its own."""
        if self.query.image is not None:
            return replace(self, query=replace(self.query, image=image))
        return replace(self, positive=replace(self.positive, image=image))

    def reversed(self) -> "Row":
        """Return the row with its sides exchanged; its negatives, which are the query's, are left out."""
        return replace(self, query=self.positive, positive=self.query, negatives=())


def load_row_image(path: Path) -> Image.Image:
    """Load a row's image for training.

    :raises ImageError: If it cannot be used, or one side is more than 200 times the other, which processors refuse.
    """
    image = load_image(path)
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        size = f"{image.width} x {image.height}"
        raise ImageError(printable(path), f"is {size}: one side is more than {MAX_ASPECT_RATIO} times the other")
    return image


class Draw(NamedTuple):
    """A row's number, and how often it was drawn before: what seeds its corruption, in whatever batch or worker."""

    index: int
    epoch: int = 0


class Rows(Dataset[tuple[Draw, Row]]):
    """Rows by their draws."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> tuple[Draw, Row]:
        return draw, self.rows[draw.index]


def numbered(rows: Sequence[Row]) -> list[tuple[Draw, Row]]:
    """Return rows as a collator takes them, each drawn for the first time."""
    return [(Draw(index), row) for index, row in enumerate(rows)]


def read_image_folder(
    folder: Path, *, captions: CaptionChoice = "text", paraphrases: int = 0, limit: int | None = None
) -> list[Row]:
    """Read an image folder with ``metadata.jsonl`` (``file_name`` and ``text`` in each line) as image-caption rows.

    :param captions: ``text``: a row for each image. ``captions``: a row for each entry of the line's list
        ``captions``, or for its ``text`` where there is none.
    :param paraphrases: Text-only rows to add for each image that has several ``captions``, from one of them to
        another, drawn by the image's number in the file; all there are where there are fewer.
    :param limit: Read the first ``limit`` images.
    :raises CocoaError: If the folder holds no row, names an image that is not there, or has a row without text.
    """
    rows = []
    for number, line in enumerate(read_image_folder_metadata(folder)[:limit]):
        source = f"{folder / 'metadata.jsonl'}, {line['file_name']}"
        wordings = _wordings(line.get("captions"), source)
        texts = wordings if captions == "captions" and wordings else [_text(line.get("text"), source)]
        image = Item(image=Path(line["path"]))
        rows += [Row(query=image, positive=Item(text=text), source=source) for text in texts]
        if len(wordings) > 1:
            ordered = list(permutations(wordings, 2))
            pairs = random.Random(number).sample(ordered, k=min(paraphrases, len(ordered)))
            rows += [Row(query=Item(text=one), positive=Item(text=other), source=source) for one, other in pairs]
    if not rows:
        raise CocoaError(f"{folder / 'metadata.jsonl'} has no rows; one line of JSON per image is expected.")
    return rows


def _wordings(captions: object, source: str) -> list[str]:
    if captions is None:
        return []
    if not isinstance(captions, list):
        raise CocoaError(f"{source}: 'captions' is {captions!r}; expected a list of texts.")
    return [_text(caption, source) for caption in captions]


def _text(text: object, source: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise CocoaError(f"{source}: the row has no text; give it a non-empty 'text' or remove the line.")
    if reserved := [token for token in RESERVED_TOKENS if token in text]:
        raise CocoaError(f"{source}: the text holds {', '.join(reserved)}, which stands for an image; take it out.")
    return text
