"""Mix the rows of a stage's sources: limit, check and weight them, all as row numbers of one table."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.train.data.broken_rows import REMEDY
from cocoa_embed.train.data.image_check import ImageCheck, ImageSizes
from cocoa_embed.train.data.row_cache import SourceRows, read_sources
from cocoa_embed.train.data.row_table import RowTable, image_id
from cocoa_embed.train.data.rows import BadRow
from cocoa_embed.train.settings import OnBadRow, SourceSettings

BAD_ROW_LIMIT = 0.01
"""The fraction of a stage's rows that may be left out."""

SHOWN_BAD_ROWS = 3

Check: TypeAlias = Literal["all", "sample"]
"""Which images are checked before a run."""


@dataclass(frozen=True)
class ReadRows:
    """The rows of a stage.

    :param rows: The rows in the order of the subsets, each repeated by its subset's weight.
    :param bad: The rows that were left out.
    :param sizes: Width and height in pixels of images, upright.
    :param unchecked: The number of images that were not checked.
    :param left_out: The number of rows of each subset that the stage cannot use.
    """

    rows: RowTable
    bad: list[BadRow]
    sizes: ImageSizes
    unchecked: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def read_rows(
    sources: Mapping[str, SourceSettings],
    *,
    on_bad_row: OnBadRow,
    seed: int,
    workers: int = 0,
    check: Check = "all",
    images: ImageCheck | None = None,
    left_out: Collection[tuple[str, str]] | None = None,
) -> ReadRows:
    """Read the rows of several sources, by the names of their subsets, and check their images.

    :param on_bad_row: ``stop`` raises at rows that cannot be used, those with broken images included; ``skip`` leaves
        out up to 1 % of all rows.
    :param seed: Draws, with a subset's name, the entries of a ``limit`` and the rows of a fractional weight.
    :param workers: Images to check at once.
    :param check: ``sample`` checks some images only.
    :param images: The check of an earlier call, which still knows the images of that call even without a cache.
    :param left_out: For a resumed run, the subsets and sources of the rows that it left out when it began. Rows whose
        images have broken since then stay, and training replaces them one by one.
    :raises CocoaError: If a source cannot be read, too many rows cannot be used, or a subset is left without rows.
    """
    read = read_sources(sources)
    rows, bad = _limited(read, sources, seed)
    total = len(bad) + sum(map(len, rows.values()))
    _refuse_bad_rows(bad, len(bad), total, on_bad_row)
    table = read.table.select(np.concatenate(list(rows.values())))
    checked = (images or ImageCheck())(table, workers=workers, sample=seed if check == "sample" else None)
    broken = read.table.with_images(np.array(list(checked.faults), dtype=np.int64))
    unusable = np.concatenate([some[broken[some]] for some in rows.values()]).tolist()
    # The error quotes only the first of them: all images of a large data set may be missing.
    first = [_broken(read.table[number], checked.faults) for number in unusable[:SHOWN_BAD_ROWS]]
    _refuse_bad_rows([*bad, *first], len(bad) + len(unusable), total, on_bad_row)
    if left_out is not None:
        unusable = [number for number in unusable if _name(read.table[number]) in left_out]
        broken = np.isin(np.arange(len(read.table)), unusable)
    bad += [_broken(read.table[number], checked.faults) for number in unusable]
    usable = {name: some[~broken[some]] for name, some in rows.items()}
    weighted = {name: weigh(some, sources[name].weight, seed=seed, subset=name) for name, some in usable.items()}
    for name, some in weighted.items():
        if not len(usable[name]):
            asked = f" with captions={sources[name].captions}" if sources[name].folder else ""
            raise CocoaError(f"Subset {name!r} has no usable row{asked}; give it other data.")
        if not len(some):
            raise CocoaError(
                f"Subset {name!r} has {len(usable[name])} usable rows, and its weight {sources[name].weight} "
                "leaves none of them; give it more usable rows or a larger weight."
            )
    mixed = read.table.select(np.concatenate(list(weighted.values())))
    return ReadRows(mixed, bad, checked.sizes, checked.unchecked)


def _limited(
    read: SourceRows, sources: Mapping[str, SourceSettings], seed: int
) -> tuple[dict[str, np.ndarray], list[BadRow]]:
    """Return the numbers of the rows of the drawn entries, by subset, and the bad rows among these entries."""
    rows, entries = {}, {}
    subset, number_of = read.table.column("subset"), {name: number for number, name in enumerate(read.table.subsets)}
    for name, source in sources.items():
        entries[name] = draw_entries(read.counts[name], source.limit, seed, name)
        rows[name] = np.flatnonzero(subset == number_of.get(name, -1))
        if len(entries[name]) < read.counts[name]:
            rows[name] = rows[name][np.isin(read.entries[rows[name]], list(entries[name]))]
    return rows, [row for entry, row in read.bad if entry in entries[row.subset]]


def _name(row: Row) -> tuple[str, str]:
    return row.subset, row.source


def _broken(row: Row, faults: Mapping[int, str]) -> BadRow:
    image, fault = next((image, faults[image_id(image)]) for image in row.images() if image_id(image) in faults)
    return BadRow(row.subset, row.source, f"the image {printable(str(image))} {fault}")


def _refuse_bad_rows(bad: Sequence[BadRow], count: int, total: int, on_bad_row: OnBadRow) -> None:
    """Refuse bad rows if they are too many.

    :param bad: The first of them, to quote.
    :param count: How many there are, of ``total`` rows.
    :raises CocoaError: If they are too many.
    """
    sentences = [f"{str(row).rstrip('.')}." for row in bad[:SHOWN_BAD_ROWS]]
    if bad and on_bad_row == "stop":
        others = f" ({count - 1} more row{'s' * (count > 2)} cannot be used either)" if count > 1 else ""
        raise CocoaError(f"{sentences[0]}{others} {REMEDY}")
    if count > BAD_ROW_LIMIT * total:
        raise CocoaError(
            f"{count} of {total} rows cannot be used; at most {BAD_ROW_LIMIT:.0%} may be left out. First: "
            f"{' '.join(sentences)}"
        )


def draw_entries(count: int, limit: int | None, seed: int, subset: str) -> Sequence[int] | set[int]:
    """Return the numbers of ``limit`` entries of ``count``, drawn by the seed and the subset's name; by default all."""
    if limit is None or limit >= count:
        return range(count)
    return set(random.Random(f"{seed} {subset} limit").sample(range(count), k=limit))


def weigh(rows: np.ndarray, weight: float, *, seed: int, subset: str) -> np.ndarray:
    """Return numbers of rows repeated by ``weight``: at 2.5, all rows twice, then half of them once more.

    The rows that a fraction adds are drawn by ``seed`` and the subset's name, and stay in order.
    """
    whole = int(weight)
    generator = random.Random(f"{seed} {subset}")
    drawn = sorted(generator.sample(range(len(rows)), k=round((weight - whole) * len(rows))))
    return np.concatenate([rows] * whole + [rows[np.array(drawn, dtype=np.int64)]])
