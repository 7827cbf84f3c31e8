"""The bridge's mask as coloured runs, and in words: who may look at whom."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from cocoa_embed.report.content import BridgeMask

SHOWN_WHOLE = 40
"""Positions of a mask that is shown as it is."""

SHOWN_POSITIONS = 12
"""Positions of a block that a picture of a mask shows one by one, where the block has many."""


class Run(NamedTuple):
    """``length`` equal cells of a mask's row from ``column`` on; ``kind`` is "a", "eos", "b", "leak" or "pad"."""

    row: int
    column: int
    length: int
    kind: str


class Span(NamedTuple):
    """``length`` neighbouring positions from ``start`` on that belong to one block."""

    block: str
    start: int
    length: int


def condensed(mask: BridgeMask) -> BridgeMask:
    """Return ``mask`` with fewer positions, so that it can be seen, where that leaves out nothing of what it allows.

    Up to ``SHOWN_WHOLE`` positions stay as they are. Of more, neighbours that see, and are seen by, the same
    positions are put together: those with one label ("256 × <|image_pad|>"), and of longer rows of them all but the
    first ``SHOWN_POSITIONS`` ("… 40 more").
    """
    if len(mask.labels) <= SHOWN_WHOLE:
        return mask
    allowed = mask.allowed
    patterns = [
        (block, row.tobytes(), column.tobytes())
        for block, row, column in zip(mask.blocks, allowed, allowed.T, strict=True)
    ]
    kept, labels = [], []
    start = 0
    for _, alike in groupby(patterns):
        length = len(list(alike))
        shown = _labelled(mask.labels[start : start + length])
        if len(shown) > 2 * SHOWN_POSITIONS:
            rest = length - shown[SHOWN_POSITIONS][0]
            shown = [*shown[:SHOWN_POSITIONS], (shown[SHOWN_POSITIONS][0], f"… {rest} more")]
        kept += [start + offset for offset, _ in shown]
        labels += [label for _, label in shown]
        start += length
    return BridgeMask(allowed[np.ix_(kept, kept)], labels, [mask.blocks[position] for position in kept])


def _labelled(labels: Sequence[str]) -> list[tuple[int, str]]:
    """Return the first position of each run of one label, and what the run is called."""
    return [
        (span.start, span.block if span.length == 1 else f"{span.length} × {span.block}") for span in _spans(labels)
    ]


def mask_runs(mask: BridgeMask) -> list[Run]:
    """Return the allowed cells of ``mask`` as horizontal runs of one kind, row by row."""
    runs = []
    for row, allowed in enumerate(mask.allowed):
        kinds = [_kind(mask.blocks[row], block) if yes else "" for block, yes in zip(mask.blocks, allowed, strict=True)]
        runs += [Run(row, start, length, kind) for kind, start, length in _spans(kinds) if kind]
    return runs


def block_spans(blocks: Sequence[str]) -> list[Span]:
    """Return the neighbouring positions of one block, in order."""
    return _spans(blocks)


def block_table(mask: BridgeMask) -> dict[str, dict[str, str]]:
    """Return, for each reading block and each block read: "yes", "no" or "partly", as the mask has it."""
    blocks = np.array(mask.blocks)
    names = [name for name in ("A", "EOS", "B") if name in mask.blocks]
    words = {(True, True): "yes", (False, False): "no", (False, True): "partly"}

    def view(reader: str, read: str) -> str:
        cells = mask.allowed[np.ix_(blocks == reader, blocks == read)]
        return words[bool(cells.all()), bool(cells.any())]

    return {reader: {read: view(reader, read) for read in names} for reader in names}


def is_causal(mask: BridgeMask) -> bool:
    """Tell whether no position looks at a later one, as in a model that was left causal."""
    return len(mask.labels) > 1 and not bool(np.triu(mask.allowed, 1).any())


def _kind(reader: str, read: str) -> str:
    pair = {reader, read}
    if "pad" in pair:
        return "pad"
    if "EOS" in pair:
        return "eos"
    return "leak" if len(pair) == 2 else reader.lower()


def _spans(values: Sequence[str]) -> list[Span]:
    spans, start = [], 0
    for value, group in groupby(values):
        length = len(list(group))
        spans.append(Span(value, start, length))
        start += length
    return spans
