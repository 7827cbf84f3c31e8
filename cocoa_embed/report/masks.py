"""Lay out the bridge's attention mask as coloured runs to draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

SHOWN_WHOLE = 40
"""Masks with more positions are condensed."""

SHOWN_POSITIONS = 12
"""Positions of a long block that are shown one by one."""


class Span(NamedTuple):
    """``length`` neighbouring positions, from ``start`` on, that have the same value."""

    value: str
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class Mask:
    """The attention mask of one sequence of L positions.

    :param allowed: Bool ``[L, L]``; rows attend to columns.
    :param labels: The token of each position.
    :param blocks: "A", "EOS" or "B" for each position.
    """

    allowed: np.ndarray
    labels: Sequence[str]
    blocks: Sequence[str]

    @classmethod
    def parse(cls, sample: Mapping[str, Sequence[str]]) -> "Mask":
        """Read the mask of ``run.json``, whose rows are strings of 0 and 1."""
        allowed = np.array([[cell == "1" for cell in row] for row in sample["allowed"]])
        return cls(allowed, sample["labels"], sample["blocks"])

    def condensed(self) -> "Mask":
        """Return the mask with fewer positions to draw, if it is longer than ``SHOWN_WHOLE``.

        Neighbours that attend to, and are attended to by, the same positions are merged: those with the same label
        ("256 × <|image_pad|>") and, in a long sequence of them, all after the first ``SHOWN_POSITIONS`` ("… 40 more").
        """
        if len(self.labels) <= SHOWN_WHOLE:
            return self
        patterns = [
            (block, row.tobytes(), column.tobytes())
            for block, row, column in zip(self.blocks, self.allowed, self.allowed.T, strict=True)
        ]
        kept: list[int] = []
        labels: list[str] = []
        start = 0
        for _, alike in groupby(patterns):
            length = len(list(alike))
            shown = [
                (span.start, span.value if span.length == 1 else f"{span.length} × {span.value}")
                for span in spans(self.labels[start : start + length])
            ]
            if len(shown) > 2 * SHOWN_POSITIONS:
                first = shown[SHOWN_POSITIONS][0]
                shown = [*shown[:SHOWN_POSITIONS], (first, f"… {length - first} more")]
            kept += [start + offset for offset, _ in shown]
            labels += [label for _, label in shown]
            start += length
        return Mask(self.allowed[np.ix_(kept, kept)], labels, [self.blocks[position] for position in kept])

    def rows(self) -> list[list[Span]]:
        """Return the allowed cells of each row, with neighbours of one kind ("a", "eos", "b" or "leak") merged."""
        cells = (zip(self.blocks, allowed, strict=True) for allowed in self.allowed)
        kinds = (
            [_kind(reader, read) if yes else "" for read, yes in row]
            for reader, row in zip(self.blocks, cells, strict=True)
        )
        return [[span for span in spans(row) if span.value] for row in kinds]

    def attends(self, reader: str, read: str) -> bool:
        """Return whether any position of the block ``reader`` attends to one of the block ``read``."""
        blocks = np.array(self.blocks)
        return bool(self.allowed[np.ix_(blocks == reader, blocks == read)].any())

    @property
    def is_causal(self) -> bool:
        """Whether no position attends to a later one."""
        return len(self.labels) > 1 and not bool(np.triu(self.allowed, 1).any())


def _kind(reader: str, read: str) -> str:
    if "EOS" in (reader, read):
        return "eos"
    return reader.lower() if reader == read else "leak"


def spans(values: Sequence[str]) -> list[Span]:
    """Return the runs of equal neighbouring values, in order."""
    found, start = [], 0
    for value, group in groupby(values):
        length = len(list(group))
        found.append(Span(value, start, length))
        start += length
    return found
