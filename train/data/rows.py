"""Rows and their draws, bad rows, and the images of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from PIL import Image
from torch.utils.data import Dataset

from cocoa_embed.data.rows import ItemImage, Row, load_item_image
from cocoa_embed.errors import ImageError, printable
from cocoa_embed.model.families.family import MAX_ASPECT_RATIO


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its subset, source, the reason, and the stages that leave it out."""

    subset: str
    source: str
    reason: str
    stages: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class Draw(NamedTuple):
    """A row's number and epoch, which seed what is masked in the row, whatever its batch and its worker."""

    row: int
    epoch: int = 0


Example: TypeAlias = tuple[Draw, Row]
"""A row and its draw."""


class Rows(Dataset[Example]):
    """A data set of rows, indexed by their draws."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw | int) -> Example:
        """Return a row with its draw; a plain number is a draw of the first epoch."""
        draw = Draw(draw) if isinstance(draw, int) else draw
        return draw, self.rows[draw.row]

    def after(self, example: Example) -> Example:
        """Return the row after an example's, in the same epoch."""
        return self[example[0]._replace(row=(example[0].row + 1) % len(self))]


def numbered(rows: Sequence[Row]) -> list[Example]:
    """Return rows as the examples of a collator, all of the first epoch."""
    return [(Draw(index), row) for index, row in enumerate(rows)]


def load_row_image(image: ItemImage) -> Image.Image:
    """Load a row's image for training.

    :raises ImageError: If it cannot be read, or ``check_aspect_ratio`` refuses it.
    """
    loaded = load_item_image(image)
    check_aspect_ratio(loaded.size, printable(str(image)))
    return loaded


def check_aspect_ratio(size: tuple[int, int], name: str) -> tuple[int, int]:
    """Return the size of an image unchanged, if its aspect ratio is usable.

    :raises ImageError: If one side is more than 200 times the other, which processors refuse.
    """
    if max(size) > MAX_ASPECT_RATIO * min(size):
        reason = f"is {size[0]} x {size[1]}: one side is more than {MAX_ASPECT_RATIO} times the other"
        raise ImageError(name, reason)
    return size
