"""Handle rows whose images turn out broken when training decodes them: stop, or use the next row instead."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.train.data.rows import Example, load_row_image

REMEDY = "Repair it, or leave such rows out with data.on_bad_row=skip."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplaceBroken:
    """A collator that replaces broken examples with usable ones, or stops at them.

    :param collate: The collator; it raises ``ImageError``.
    :param next_of: Returns the example to try in place of a broken one.
    :param on_bad_row: ``stop`` or ``skip``, as in ``DataSettings``.
    :param rows: The number of rows, and so of attempts to find a usable one.
    """

    collate: Callable[[list[Example]], dict[str, Any]]
    next_of: Callable[[Example], Example]
    on_bad_row: str
    rows: int

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Collate examples.

        :raises CocoaError: If one is broken, and ``on_bad_row`` is ``stop`` or no row is usable.
        """
        try:
            return self.collate(examples)
        except ImageError as error:
            if self.on_bad_row == "stop":
                raise CocoaError(f"{error}. {REMEDY}") from error
        return self.collate([self._usable(example) for example in examples])

    def _usable(self, example: Example) -> Example:
        for _ in range(self.rows):
            _, row = example
            if (fault := _fault(row)) is None:
                return example
            logger.warning("%s: %s The next row replaces it.", row.source, fault)
            example = self.next_of(example)
        raise CocoaError("The images of all rows are broken; repair them, or train on other data.")


def unbroken(rows: Iterable[Row], on_bad_row: str) -> list[Row]:
    """Return the rows whose images can be decoded.

    :raises CocoaError: If one cannot, and ``on_bad_row`` is ``stop``.
    """
    found = []
    for row in rows:
        if (fault := _fault(row)) is None:
            found.append(row)
        elif on_bad_row == "stop":
            raise CocoaError(f"{row.source}: {fault} {REMEDY}")
        else:
            logger.warning("%s: %s It is left out of the measurements.", row.source, fault)
    return found


def _fault(row: Row) -> str | None:
    """Return a sentence about the first image of a row that cannot be decoded, if any."""
    try:
        for image in row.images():
            load_row_image(image)
    except ImageError as error:
        return f"the image {str(error).rstrip('.')}."
    return None
