"""What earlier runs found out, in a small SQLite file in the cache: complete shards, and content that cannot be used.

It only saves work: without it, a run reads more, but its result is the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import PIL

from cocoa_embed import __version__
from cocoa_embed.errors import one_line, printable
from cocoa_embed.folders import cache_folder
from cocoa_embed.integrations.qdrant.points import HELD_KEYS, is_in_shard, own_locations
from cocoa_embed.integrations.qdrant.stores.base import with_any_of

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.stores.store import Store

logger = logging.getLogger(__name__)

SCHEMA = """
DROP TABLE IF EXISTS shards; -- as it was in earlier versions
CREATE TABLE IF NOT EXISTS complete_shards
    (key TEXT PRIMARY KEY, version TEXT, records INTEGER, points TEXT, is_unpruned INTEGER);
CREATE TABLE IF NOT EXISTS faults
    (key TEXT PRIMARY KEY, shard TEXT, version TEXT, sha256 TEXT, reason TEXT, software TEXT);
CREATE INDEX IF NOT EXISTS contents ON faults (sha256);
CREATE INDEX IF NOT EXISTS fault_shards ON faults (shard);
"""


SOFTWARE = f"cocoa-embed {__version__}, Pillow {PIL.__version__}"
"""The software that could not read some content; other versions may read it."""

SAMPLED_POINTS = 20
"""Points of a shard that are compared with those that a run has left: if an older collection was restored, or another
one is in its place, nearly all of them differ."""

FORGET_FAULTS = (
    "DELETE FROM complete_shards WHERE key IN (SELECT shard FROM faults WHERE software != ?)",
    "DELETE FROM faults WHERE software != ?",
)


class CompleteShard(NamedTuple):
    """A shard of which every record was indexed or has a fault."""

    version: str
    records: int
    points: str
    """What identifies its points in the collection (``state_of_points``)."""
    is_unpruned: bool
    """Whether some of these points may name images that are no longer in it."""


class Fault(NamedTuple):
    """Why the content of a record cannot be used."""

    key: str
    reason: str


def state_of_points(store: Store, shard: str) -> str:
    """Return what identifies the points of a shard: their number, and a digest of some; empty if there are none.

    The digest is of content and mtimes. Descriptions may be those of other files with the same content.

    :param shard: The key of the shard, as payloads have it.
    """
    condition = with_any_of("shard", [shard])
    sample = list(store.scan(HELD_KEYS, condition, limit=SAMPLED_POINTS))
    if not sample:
        return ""
    count = len(sample) if len(sample) < SAMPLED_POINTS else store.count(condition)
    rows = [
        [id_, [[each.path, each.mtime] for each in own_locations(id_, payload) if is_in_shard(each.path, shard)]]
        for id_, payload in sample
    ]
    return f"{count} {hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()}"


def open_manifest(place: str | None, collection: str, fingerprint: str | None) -> Manifest:
    """Return the manifest of a collection.

    :param place: Where the collection is; None if it is in memory, and then so is its manifest.
    :param fingerprint: The fingerprint of the model that made it.
    """
    return Manifest(None if place is None else manifest_file(f"{place} {collection} {fingerprint}"))


def manifest_file(collection: str) -> Path:
    """Return the file for a collection, in the cache.

    :param collection: Names the collection and where it is.
    """
    name = hashlib.blake2b(collection.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    return cache_folder() / "collections" / f"{name}.sqlite"


class Manifest:
    """The manifest of one collection, for one thread at a time.

    If its file fails, whatever the reason, it continues in memory, with a warning.
    """

    def __init__(self, file: Path | None) -> None:
        """Open or create it; in memory if there is no file, or if it cannot be used."""
        self._file = file
        try:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            self._database = connect(file)
        except (OSError, sqlite3.Error) as error:
            self._warn(error)
            self._database = connect(None)
        self.forget_faults(SOFTWARE)
        self._has_faults = self._first("SELECT 1 FROM faults") is not None
        """Whether there may be any: most collections have none, and then no record has to be looked up."""

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def shard(self, key: str) -> CompleteShard | None:
        """Return what is known of a shard; None if it is not complete."""
        rows = self._execute("SELECT version, records, points, is_unpruned FROM complete_shards WHERE key = ?", key)
        return CompleteShard(*rows[0]) if rows else None

    def complete(self, key: str, shard: CompleteShard) -> None:
        """Remember a complete shard."""
        self._execute("INSERT OR REPLACE INTO complete_shards VALUES (?, ?, ?, ?, ?)", key, *shard)

    def faults_in(self, shard: str) -> list[Fault]:
        """Return the faults of the records of a shard."""
        rows = self._execute("SELECT key, reason FROM faults WHERE shard = ? ORDER BY key", shard)
        return [Fault(*row) for row in rows]

    def fault(self, key: str, version: str) -> str | None:
        """Return why a record could not be used when it had this version."""
        if not self._has_faults:
            return None
        return self._first("SELECT reason FROM faults WHERE key = ? AND version = ?", key, version)

    def content_fault(self, sha256: str) -> str | None:
        """Return why some content could not be used."""
        return self._first("SELECT reason FROM faults WHERE sha256 = ?", sha256) if self._has_faults else None

    def add_fault(self, fault: Fault, shard: str | None, version: str, sha256: str) -> None:
        """Remember why a record cannot be used."""
        self._has_faults = True
        row = [fault.key, shard, version, sha256, fault.reason, SOFTWARE]
        self._execute("INSERT OR REPLACE INTO faults VALUES (?, ?, ?, ?, ?, ?)", *row)

    def keep_fault(self, key: str, shard: str | None) -> None:
        """Note that a record whose fault is known is in a shard, which may have been reopened."""
        self._execute("UPDATE faults SET shard = ? WHERE key = ? AND shard IS NOT ?", shard, key, shard)

    def reopen(self, shard: str) -> None:
        """Forget that a shard is complete and which of its records have faults; their content stays known."""
        self._execute("DELETE FROM complete_shards WHERE key = ?", shard)
        self._execute("UPDATE faults SET shard = NULL WHERE shard = ?", shard)

    def forget_faults(self, but_of: str = "") -> None:
        """Forget all faults but those that ``but_of`` found, and that shards with the forgotten ones are complete."""
        for statement in FORGET_FAULTS:
            self._execute(statement, but_of)

    def _first(self, query: str, *values: str) -> str | None:
        rows = self._execute(query, *values)
        return rows[0][0] if rows else None

    def _execute(self, statement: str, *values: str | int | None) -> list[Any]:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:  # a broken or read-only file, a full disk
            self._warn(error)
            self._database.close()
            self._database = connect(None)
            return self._database.execute(statement, values).fetchall()

    def _warn(self, error: Exception) -> None:
        logger.warning(
            "the manifest %s cannot be used (%s), and remembers nothing of this run; remove it, or set COCOA_CACHE to a"
            " folder that can be written",
            printable(self._file or ""),
            one_line(error),
        )


def connect(file: Path | None) -> sqlite3.Connection:
    """Return the database in a file, or a new one in memory.

    :raises sqlite3.Error: If the file cannot be used.
    """
    database = sqlite3.connect(file or ":memory:", timeout=30, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA synchronous = OFF")
        database.executescript(SCHEMA)
    except sqlite3.Error:
        database.close()
        raise
    return database
