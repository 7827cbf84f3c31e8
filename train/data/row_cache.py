"""The rows of sources as one table, which is kept in the cache and read again only if the sources change."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import one_line, printable
from cocoa_embed.train.data.cache import replace_atomically, rows_folder, warn_without_cache
from cocoa_embed.train.data.row_table import FORMAT_VERSION, RowTable
from cocoa_embed.train.data.rows import BadRow
from cocoa_embed.train.data.sources import read_subset, source_version
from cocoa_embed.train.settings import SourceSettings

VERSION = (1, FORMAT_VERSION)
"""Changes when readers make other rows of a source, and with the format of tables."""

UNUSED_DAYS = 30
"""Tables that no run has opened for this many days are removed from the cache."""

TABLE, ENTRIES, ERRORS = "rows.arrow", "entries.npy", "errors.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceRows:
    """All rows of several sources.

    :param table: The rows, in the order of the sources.
    :param entries: The number of each row's entry in its source (an image of a folder, else a row), int64 ``[rows]``.
    :param bad: The rows that cannot be used, each with the number of its entry.
    :param counts: The number of entries of each source, bad ones included, by subset.
    """

    table: RowTable
    entries: np.ndarray
    bad: list[tuple[int, BadRow]]
    counts: dict[str, int]


def read_sources(sources: Mapping[str, SourceSettings]) -> SourceRows:
    """Return the rows of sources, by the names of their subsets, from the cache if it has them.

    If the cache cannot be written, this warns, and keeps the rows in a temporary file or in memory.

    :raises CocoaError: If a source cannot be read.
    """
    folder = rows_folder() / _key(sources)
    try:
        return _open(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s cannot be used (%s); the data are read again.", printable(folder), one_line(error))
    temporary = Path(tempfile.gettempdir()) / f"cocoa-rows-{os.getpid()}"
    for place in (folder, temporary / folder.name):
        try:
            replace_atomically(place, partial(_write, sources))
        except OSError as error:
            warn_without_cache(error)
            continue
        if place is folder:
            _remove_unused(folder.parent)
        else:
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return _open(place)
    read = _Reading(sources)
    table = RowTable.of(read.rows())
    return SourceRows(table, np.array(read.entries), read.bad, read.counts)


def _key(sources: Mapping[str, SourceSettings]) -> str:
    described = [(name, source_version(name, source)) for name, source in sources.items()]
    return hashlib.sha256(json.dumps([VERSION, described]).encode()).hexdigest()[:32]


@dataclass
class _Reading:
    """Reads sources row by row, and collects what is not in the rows themselves."""

    sources: Mapping[str, SourceSettings]
    entries: array[int] = field(default_factory=lambda: array("q"))
    bad: list[tuple[int, BadRow]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        for subset, source in self.sources.items():
            entry = -1
            read = tqdm(read_subset(subset, source), f"reading {subset}", unit="row", leave=False, delay=5)
            for entry, row in read:
                if isinstance(row, Row):
                    self.entries.append(entry)
                    yield row
                else:
                    self.bad.append((entry, BadRow(subset, row.source, row.reason)))
            self.counts[subset] = entry + 1


def _write(sources: Mapping[str, SourceSettings], folder: Path) -> None:
    folder.mkdir()
    read = _Reading(sources)
    RowTable.write(folder / TABLE, read.rows())
    np.save(folder / ENTRIES, np.array(read.entries))
    bad = [(entry, row.subset, row.source, row.reason) for entry, row in read.bad]
    (folder / ERRORS).write_text(json.dumps({"bad": bad, "counts": read.counts}), encoding="utf-8")


def _open(folder: Path) -> SourceRows:
    """Open a folder that ``_write`` has written.

    :raises OSError: If it cannot be read.
    :raises ValueError: If it is broken, or of another version.
    """
    errors = json.loads((folder / ERRORS).read_text(encoding="utf-8"))
    entries, table = np.load(folder / ENTRIES), RowTable.open(folder / TABLE)
    if len(entries) != len(table):
        raise ValueError(f"it has {len(table)} rows and {len(entries)} entries")
    if os.access(folder, os.W_OK):
        os.utime(folder)
    return SourceRows(table, entries, [(entry, BadRow(*row)) for entry, *row in errors["bad"]], errors["counts"])


def _remove_unused(root: Path) -> None:
    """Remove tables that no run has opened for ``UNUSED_DAYS``, also those of runs that were killed while writing."""
    for table in (*root.glob(f"*/{TABLE}"), *root.glob(f".*/*/{TABLE}")):
        folder = root / table.relative_to(root).parts[0]
        with suppress(FileNotFoundError):  # another run removes it
            if time.time() - folder.stat().st_mtime > UNUSED_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)
