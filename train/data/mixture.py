"""Mixes the rows of a stage's sources: checked, weighted, and identified by a fingerprint."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cocoa_embed.data.rows import ItemImage, Row
from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.train.data.image_check import CheckedImages, ImageSize, check_images
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import BadRow
from cocoa_embed.train.data.sources import read_subset
from cocoa_embed.train.settings import SourceSettings

BAD_ROW_LIMIT = 0.01
"""The fraction of a stage's rows that may be left out."""

SHOWN_BAD_ROWS = 3

OnBadRow = Literal["stop", "skip"]


@dataclass(frozen=True)
class ReadRows:
    """The rows of a stage.

    :param rows: In the order of the subsets, each repeated by its weight.
    :param bad: The rows that were left out.
    :param sizes: Width and height in pixels of every usable image, upright.
    :param counts: The number of ``rows`` of each subset.
    :param fingerprint: SHA-256 of the rows' texts and image names, in order.
    :param left_out: The number of rows of each subset that the stage cannot use.
    """

    rows: RowTable
    bad: list[BadRow]
    sizes: dict[ItemImage, ImageSize]
    counts: dict[str, int]
    fingerprint: str
    left_out: dict[str, int] = field(default_factory=dict)


def read_rows(
    sources: Mapping[str, SourceSettings],
    *,
    on_bad_row: OnBadRow,
    seed: int,
    workers: int = 0,
    checked: CheckedImages | None = None,
    refuse: Callable[[Row], str | None] | None = None,
) -> ReadRows:
    """Read the rows of several sources, by the names of their subsets, and check every image.

    :param on_bad_row: ``stop`` raises at rows that cannot be used, those with broken images included; ``skip`` leaves
        out up to 1 % of all rows.
    :param seed: Draws, with a subset's name, the rows of a fractional weight.
    :param workers: Processes to decode images in; 0 is this one.
    :param checked: The results of earlier image checks; new ones are added.
    :param refuse: Returns why a stage cannot use a row, or None.
    :raises CocoaError: If a source cannot be read, too many rows cannot be used, or a subset is left without rows.
    """
    bad: list[BadRow] = []
    subsets = {name: read_subset(name, source, bad) for name, source in sources.items()}
    if refuse is not None:
        subsets = _leave_out(subsets, refuse, bad)
    _refuse_bad_rows(bad, sum(map(len, subsets.values())), on_bad_row)
    images = (image for rows in subsets.values() for row in rows for image in row.images())
    found = check_images(images, workers, checked)
    subsets = _leave_out(subsets, lambda row: _broken_image(row, found), bad)
    _refuse_bad_rows(bad, sum(map(len, subsets.values())), on_bad_row)
    sizes = {image: size for image, size in found.items() if not isinstance(size, str)}
    weighted = {name: weigh(rows, sources[name].weight, seed=seed, subset=name) for name, rows in subsets.items()}
    for name, rows in weighted.items():
        if not rows:
            usable = f"{len(subsets[name])} usable rows"
            raise CocoaError(f"Subset {name!r} has {usable}, and none to draw at the weight {sources[name].weight}.")
    table = RowTable.of(row for of_subset in weighted.values() for row in of_subset)
    counts = {name: len(of_subset) for name, of_subset in weighted.items()}
    return ReadRows(table, bad, sizes, counts, fingerprint(table))


def _leave_out(
    subsets: Mapping[str, Sequence[Row]], refuse: Callable[[Row], str | None], bad: list[BadRow]
) -> dict[str, list[Row]]:
    """Return the rows that are not refused, and add the others to ``bad``."""
    kept: dict[str, list[Row]] = {name: [] for name in subsets}
    for name, rows in subsets.items():
        for row in rows:
            reason = refuse(row)
            if reason is None:
                kept[name].append(row)
            else:
                bad.append(BadRow(name, row.source, reason))
    return kept


def _broken_image(row: Row, found: CheckedImages) -> str | None:
    broken = (image for image in row.images() if isinstance(found[image], str))
    return next((f"the image {printable(str(image))} {found[image]}" for image in broken), None)


def _refuse_bad_rows(bad: Sequence[BadRow], usable: int, on_bad_row: OnBadRow) -> None:
    sentences = [f"{str(row).rstrip('.')}." for row in bad[:SHOWN_BAD_ROWS]]
    if bad and on_bad_row == "stop":
        others = f" ({len(bad) - 1} more rows cannot be used either)" if len(bad) > 1 else ""
        raise CocoaError(f"{sentences[0]}{others} Repair it, or leave such rows out by data.on_bad_row=skip.")
    total = usable + len(bad)
    if len(bad) > BAD_ROW_LIMIT * total:
        raise CocoaError(
            f"{len(bad)} of {total} rows cannot be used; at most {BAD_ROW_LIMIT:.0%} may be left out. First: "
            f"{' '.join(sentences)}"
        )


def weigh(rows: Sequence[Row], weight: float, *, seed: int, subset: str) -> list[Row]:
    """Return the rows repeated by ``weight``: at 2.5, all rows twice, then half of them once more.

    The rows of a fraction are drawn by ``seed`` and the subset's name, and stay in order.
    """
    whole = int(weight)
    generator = random.Random(f"{seed} {subset}")
    drawn = generator.sample(range(len(rows)), k=round((weight - whole) * len(rows)))
    return [*rows] * whole + [rows[index] for index in sorted(drawn)]


def fingerprint(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of all rows in order: subsets, texts, and the names of images, not their pixels."""
    digest = hashlib.sha256()
    for row in rows:
        items = [(item.full_text, *map(str, item.images)) for item in row.items()]
        digest.update(json.dumps([row.subset, items]).encode() + b"\n")
    return digest.hexdigest()
