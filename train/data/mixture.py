"""A stage's rows: those of all its sources, checked, weighted, and summed up in a fingerprint."""

import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.folders import write_whole
from cocoa_embed.train.data.image_check import ImageSize, check_images, known_sizes
from cocoa_embed.train.data.readers import read_source
from cocoa_embed.train.data.rows import BadRow, Row, RowImage
from cocoa_embed.train.settings import SourceSettings

BAD_ROW_LIMIT = 0.01
"""The share of a stage's rows that may be left out."""

SHOWN_BAD_ROWS = 3


@dataclass(frozen=True)
class ReadRows:
    """The rows of a stage.

    :param rows: In the order of the subsets, each as often as its weight says.
    :param bad: The rows that were left out.
    :param sizes: Width and height in pixels of every image, upright; empty where images were not checked.
    :param counts: How many of ``rows`` are of each subset.
    :param fingerprint: SHA-256 of the rows' texts and image names, in their order.
    """

    rows: list[Row]
    bad: list[BadRow]
    sizes: dict[RowImage, ImageSize]
    counts: dict[str, int]
    fingerprint: str


def read_rows(
    sources: Mapping[str, SourceSettings],
    *,
    on_bad_row: Literal["stop", "skip"],
    check_images: bool,
    seed: int,
    workers: int = 0,
    progress: bool = False,
    checked: dict[RowImage, ImageSize | str] | None = None,
    refuse: Callable[[Row], str | None] | None = None,
    known_bad: Collection[BadRow] = (),
) -> ReadRows:
    """Read the rows of several sources, by the names of the subsets that they are.

    :param on_bad_row: ``stop`` raises at rows that cannot be used; ``skip`` leaves out up to 1 % of all rows.
    :param check_images: Decode every image.
    :param seed: Decides with a subset's name which rows a weight draws.
    :param workers: Processes to decode images in; 0 is this one.
    :param progress: Show a progress bar on standard error.
    :param refuse: Says why a row is of no use to a stage, None where it is.
    :param checked: What earlier calls have found of images, which need no second look; what this one finds is added.
    :param known_bad: What an earlier reading of the same sources has left out. Rows whose images it could not use are
        left out again, before a weight draws, though images are not checked.
    :raises CocoaError: If a source cannot be read, too many rows cannot be used, or a subset is left without rows.
    """
    bad: list[BadRow] = []
    subsets = {name: read_source(name, source, bad) for name, source in sources.items()}
    if refuse is not None:
        subsets = {name: _without_refused(rows, bad, refuse) for name, rows in subsets.items()}
    _refuse_bad_rows(bad, sum(map(len, subsets.values())), on_bad_row)
    sizes: dict[RowImage, ImageSize] = {}
    if check_images:
        subsets, sizes = _without_bad_images(subsets, bad, workers, progress, {} if checked is None else checked)
        _refuse_bad_rows(bad, sum(map(len, subsets.values())), on_bad_row)
    subsets = {name: _without_known(rows, bad, known_bad) for name, rows in subsets.items()}
    weighted = {name: weigh(rows, sources[name].weight, seed=seed, subset=name) for name, rows in subsets.items()}
    for name, rows in weighted.items():
        if not rows:
            usable = f"{len(subsets[name])} usable rows"
            raise CocoaError(f"Subset {name!r} has {usable}, and none to draw at the weight {sources[name].weight}.")
    rows = [row for of_subset in weighted.values() for row in of_subset]
    counts = {name: len(of_subset) for name, of_subset in weighted.items()}
    return ReadRows(rows, bad, sizes, counts, fingerprint(rows))


def _without_refused(rows: Sequence[Row], bad: list[BadRow], refuse: Callable[[Row], str | None]) -> list[Row]:
    reasons = [refuse(row) for row in rows]
    bad += [BadRow(row.subset, row.source, why) for row, why in zip(rows, reasons, strict=True) if why is not None]
    return [row for row, why in zip(rows, reasons, strict=True) if why is None]


def _without_bad_images(
    subsets: Mapping[str, Sequence[Row]],
    bad: list[BadRow],
    workers: int,
    progress: bool,
    checked: dict[RowImage, ImageSize | str],
) -> tuple[dict[str, list[Row]], dict[RowImage, ImageSize]]:
    """Return the rows whose images can all be used, and the images' sizes; the other rows go to ``bad``."""
    images = (image for rows in subsets.values() for row in rows for image in row.images())
    found = check_images(images, workers, progress=progress, known=checked)
    checked.update(found)
    kept: dict[str, list[Row]] = {name: [] for name in subsets}
    for name, rows in subsets.items():
        for row in rows:
            broken = next((image for image in row.images() if isinstance(found[image], str)), None)
            if broken is None:
                kept[name].append(row)
            else:
                bad.append(BadRow(name, row.source, f"the image {printable(str(broken))} {found[broken]}"))
    return kept, known_sizes(found)


def _without_known(rows: Sequence[Row], bad: list[BadRow], known_bad: Collection[BadRow]) -> list[Row]:
    """Return the rows but those that are known to be bad; they go to ``bad``.

    A source may have several rows, as an image with several captions has. What is found bad anew is out already; what
    is not was bad for its image, which rows of text alone do not have.
    """
    found = {(row.subset, row.source, row.reason) for row in bad}
    known = {(row.subset, row.source): row for row in known_bad if (row.subset, row.source, row.reason) not in found}
    kept: list[Row] = []
    for row in rows:
        before = known.get((row.subset, row.source)) if row.images() else None
        if before is None:
            kept.append(row)
        else:
            bad.append(before)
    return kept


def _refuse_bad_rows(bad: Sequence[BadRow], usable: int, on_bad_row: Literal["stop", "skip"]) -> None:
    if not bad:
        return
    if on_bad_row == "stop":
        others = f" ({len(bad) - 1} more rows cannot be used either)" if len(bad) > 1 else ""
        raise CocoaError(f"{_sentence(bad[0])}{others} Repair it, or leave such rows out by data.on_bad_row=skip.")
    total = usable + len(bad)
    if len(bad) > BAD_ROW_LIMIT * total:
        shown = " ".join(map(_sentence, bad[:SHOWN_BAD_ROWS]))
        raise CocoaError(
            f"{len(bad)} of {total} rows cannot be used; at most {BAD_ROW_LIMIT:.0%} may be left out. First: {shown}"
        )


def _sentence(row: BadRow) -> str:
    return f"{str(row).rstrip('.')}."


def weigh(rows: Sequence[Row], weight: float, *, seed: int, subset: str) -> list[Row]:
    """Return the rows as often as ``weight`` says: 2.5 is all of them twice, then half of them once more.

    The rows of a fraction are drawn by ``seed`` and the subset's name, and stay in their order.
    """
    whole = int(weight)
    generator = random.Random(f"{seed} {subset}")
    drawn = generator.sample(range(len(rows)), k=round((weight - whole) * len(rows)))
    return [*rows] * whole + [rows[index] for index in sorted(drawn)]


def fingerprint(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of all rows, in their order: subsets, texts, and the names of images, not their pixels."""
    digest = hashlib.sha256()
    for row in rows:
        items = [(item.text, None if item.image is None else str(item.image)) for item in row.items()]
        digest.update(json.dumps([row.subset, items]).encode() + b"\n")
    return digest.hexdigest()


def write_bad_rows(path: Path, bad: Sequence[BadRow]) -> None:
    """Write a line of JSON (``subset``, ``source``, ``reason``, ``stages``) for each row left out; no file without any.

    The file is there whole or not at all.
    """
    if not bad:
        path.unlink(missing_ok=True)
        return
    write_whole(path, "".join(f"{json.dumps(_told(row))}\n" for row in bad))


def _told(row: BadRow) -> dict[str, Any]:
    told: dict[str, Any] = {"subset": row.subset, "source": row.source, "reason": row.reason}
    return {**told, "stages": list(row.stages)} if row.stages else told
