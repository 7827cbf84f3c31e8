"""Training rows, and the reader that makes them from an image folder."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image
from torch.utils.data import Dataset

from cocoa_embed.errors import CocoaError, ImageError, RowError, printable
from cocoa_embed.images.find_files import MetadataError, check_metadata_row
from cocoa_embed.images.load import decode_image, load_image
from cocoa_embed.model.backbone import MAX_ASPECT_RATIO
from cocoa_embed.model.template import RESERVED_TOKENS
from cocoa_embed.train.data.arrow_images import StoredImage
from cocoa_embed.train.data.tables import open_table
from cocoa_embed.train.settings import CaptionChoice

RowImage: TypeAlias = Path | StoredImage
"""An image of a row: a file, or a place in a table that holds images. Its ``str`` is its identity."""

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""What an image folder may keep its texts in, one of these."""


@dataclass(frozen=True)
class BadRow:
    """A row that was left out: its subset, where it comes from, why it cannot be used, and by which stages.

    :param stages: Empty where that is not told.
    """

    subset: str
    source: str
    reason: str
    stages: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Item:
    """One side of a pair: a text, an image, or both."""

    text: str | None = None
    image: RowImage | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.image is None:
            raise ValueError("an item needs a text, an image, or both")


@dataclass(frozen=True, slots=True)
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
    def image(self) -> RowImage | None:
        """The row's image, from whichever side has one."""
        return self.query.image or self.positive.image

    def items(self) -> tuple[Item, ...]:
        """Return the query, the positive and the negatives."""
        return (self.query, self.positive, *self.negatives)

    def images(self) -> tuple[RowImage, ...]:
        """Return the images of all items, negatives included."""
        return tuple(item.image for item in self.items() if item.image is not None)

    def reversed(self) -> "Row":
        """Return the row with its sides exchanged; its negatives, which are the query's, are left out."""
        return replace(self, query=self.positive, positive=self.query, negatives=())


def load_row_image(image: RowImage) -> Image.Image:
    """Load a row's image for training.

    :raises ImageError: If it cannot be used, or one side is more than 200 times the other, which processors refuse.
    """
    name = printable(str(image))
    loaded = decode_image(image.read(), name)[0] if isinstance(image, StoredImage) else load_image(image)
    if max(loaded.size) > MAX_ASPECT_RATIO * min(loaded.size):
        size = f"{loaded.width} x {loaded.height}"
        raise ImageError(name, f"is {size}: one side is more than {MAX_ASPECT_RATIO} times the other")
    return loaded


def stored_images(rows: Iterable[Row]) -> dict[str, StoredImage]:
    """Return the rows' images that are kept inside tables, by their names."""
    return {str(image): image for row in rows for image in row.images() if isinstance(image, StoredImage)}


class Draw(NamedTuple):
    """A row's number, and how often it was drawn before: what seeds its corruption, in whatever batch or worker."""

    row: int
    epoch: int = 0


class Rows(Dataset[tuple[Draw, Row]]):
    """Rows by their draws."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> tuple[Draw, Row]:
        return draw, self.rows[draw.row]


def numbered(rows: Sequence[Row]) -> list[tuple[Draw, Row]]:
    """Return rows as a collator takes them, each drawn for the first time."""
    return [(Draw(index), row) for index, row in enumerate(rows)]


def read_image_folder(
    folder: Path,
    *,
    captions: CaptionChoice = "text",
    paraphrases: int = 0,
    limit: int | None = None,
    subset: str = "data",
    bad: list[BadRow] | None = None,
) -> list[Row]:
    """Read an image folder with one of ``METADATA_FILES`` (``file_name`` and ``text``) as image-caption rows.

    :param captions: ``text``: a row for each image. ``captions``: a row for each entry of the list in the column
        ``captions`` (in a CSV file, a list in JSON), or for its ``text`` where there is none.
    :param paraphrases: Text-only rows to add for each image that has several ``captions``, from one of them to
        another, drawn by the image's number in the file; all there are where there are fewer.
    :param limit: Read the first ``limit`` images.
    :param bad: Where to put images that cannot be used; without it, the first one raises.
    :raises CocoaError: If the folder is missing, holds no row or no metadata, or has metadata that cannot be read.
    :raises MetadataError: Without ``bad``, if an entry is malformed or names an image that is not there.
    :raises RowError: Without ``bad``, if an image has no text.
    """
    metadata = _find_metadata(folder)
    entries = islice(open_table(metadata).read(("file_name", "text", "captions"), lists=("captions",)), limit)
    rows: list[Row] = []
    found = 0
    for number, (place, entry) in enumerate(entries):
        found += 1
        try:
            if isinstance(entry, MetadataError):
                raise entry
            rows += _image_rows(metadata, check_metadata_row(metadata, place, entry), number, captions, paraphrases)
        except (MetadataError, RowError) as error:
            if bad is None:
                raise
            bad.append(BadRow(subset, error.source, error.reason))
    if not found:
        raise CocoaError(f"{printable(metadata)} has no rows; a file_name and a text for each image are expected.")
    return [replace(row, subset=subset) for row in rows]


def _find_metadata(folder: Path) -> Path:
    name = printable(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise CocoaError(f"{name} {kind}; give a folder of images with {METADATA_FILES[0]}.")
    found = [file for file in METADATA_FILES if (folder / file).is_file()]
    if len(found) > 1:
        raise CocoaError(f"{name} has {' and '.join(found)}; keep one of them.")
    if not found:
        others = " or ".join(METADATA_FILES[1:])
        raise CocoaError(
            f"{name} has no {METADATA_FILES[0]} (nor {others}); write one JSON object a line, with file_name and text."
        )
    return folder / found[0]


def _image_rows(
    metadata: Path, entry: dict[str, Any], number: int, captions: CaptionChoice, paraphrases: int
) -> list[Row]:
    """Return the rows of one image, the ``number``-th of its folder."""
    source = f"{metadata}, {entry['file_name']}"
    wordings = _wordings(entry.get("captions"), source)
    texts = wordings if captions == "captions" and wordings else [_caption(entry.get("text"), source)]
    image = Item(image=entry["path"])
    rows = [Row(query=image, positive=Item(text=text), source=source) for text in texts]
    if len(wordings) > 1:
        ordered = list(permutations(wordings, 2))
        pairs = random.Random(number).sample(ordered, k=min(paraphrases, len(ordered)))
        rows += [Row(query=Item(text=one), positive=Item(text=other), source=source) for one, other in pairs]
    return rows


def _wordings(captions: object, source: str) -> list[str]:
    if captions is None:
        return []
    if not isinstance(captions, list):
        raise RowError(source, f"'captions' is {captions!r}; expected a list of texts.")
    return [_caption(caption, source) for caption in captions]


def _caption(text: object, source: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RowError(source, "the row has no text; give it a non-empty 'text' or remove the line.")
    return checked_text(text, source)


def checked_text(text: str, source: str) -> str:
    """Return a row's text as it is.

    :raises RowError: If it holds a token that stands for an image, or is no Unicode, which tokenizers refuse.
    """
    if reserved := [token for token in RESERVED_TOKENS if token in text]:
        raise RowError(source, f"the text holds {', '.join(reserved)}, which stands for an image; take it out.")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError(source, f"the text {text[:40]!a} holds half of a surrogate pair, which is no character.")
    return text
