"""A collection in a folder, in qdrant-client's local mode: exact search in memory, one process at a time."""

from __future__ import annotations

import contextlib
import json
import pickle
import sqlite3
import weakref
from pathlib import Path

from filelock import FileLock
from qdrant_client import QdrantClient
from qdrant_client.local.qdrant_local import QdrantLocal

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.folders import is_scratch_of, refuse_foreign_folder, write_atomically
from cocoa_embed.integrations.qdrant.stores.base import Signature, StoreOptions, no_collection
from cocoa_embed.integrations.qdrant.stores.client import ClientStore
from cocoa_embed.integrations.qdrant.stores.locks import in_use, lock_file

META_FILE = "meta.json"
"""The client's list of collections; it marks a folder as a local store."""
LOCK_FILE = ".cocoa-lock"
"""The client takes its own lock only after it has read files that another process may be writing."""
UNOPENABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, sqlite3.Error, pickle.PickleError)
"""What the client raises for broken files."""


def open_collection(path: str | Path, collection: str, options: StoreOptions) -> LocalStore:
    """Return a collection in a folder; nothing is opened or created yet.

    :raises UsageError: If ``options`` has any that a local store does not support.
    """
    if options.quantization is not None or options.on_disk:
        raise UsageError(
            "a local store (path) has no quantization and keeps vectors in memory; give the url of a server, or edge,"
            " for these options"
        )
    return LocalStore(printable(path), collection, options, path=Path(path))


class LocalStore(ClientStore):
    """A collection in a folder, all of it in memory while it is open."""

    # Each page of a scroll sorts all ids and reads all payloads, so pages are large.
    scroll_limit = 10_000

    def __init__(self, location: str, collection: str, options: StoreOptions, *, path: Path) -> None:
        """Name a folder and a collection; nothing is opened or created yet."""
        super().__init__(location, collection, options)
        self._path = path
        self._file_lock: FileLock | None = None
        self._closing: weakref.finalize | None = None

    def collections(self) -> list[str] | None:
        """Return the names of all collections, sorted; None if the folder is no store."""
        return super().collections() if self._exists() else None

    def signature(self) -> Signature | None:
        """Return the signature of the collection, or None if there is no such collection."""
        return super().signature() if self._exists() else None

    def create(self, signature: Signature) -> None:
        """Create the collection with its signature, and the folder if needed."""
        with self._lock:
            client = self._open(create=True)
            super().create(signature)
            use_write_ahead_log(client, self.collection)

    def close(self) -> None:
        """Close the client and release the folder."""
        with self._lock:
            if self._closing is not None:
                self._closing()
            self._client = self._closing = None
            if self._file_lock is not None:
                self._file_lock.release()
                self._file_lock = None

    def _exists(self) -> bool:
        try:
            refuse_foreign_store(self._path)
            return (self._path / META_FILE).is_file()
        except OSError as error:
            raise self._unopenable(error) from error

    def _connected(self) -> QdrantClient:
        if self._client is None and not self._exists():
            raise no_collection(self)
        return self._open(create=False)

    def _open(self, *, create: bool) -> QdrantClient:
        if self._client is not None:
            return self._client
        try:
            refuse_foreign_store(self._path)
            if create:
                self._path.mkdir(parents=True, exist_ok=True)
            self._file_lock = lock_file(self._path / LOCK_FILE, self.location)
            write_empty_meta(self._path)
            # This class lets in one thread at a time, which SQLite's own check cannot know.
            self._client = QdrantClient(path=str(self._path), force_disable_check_same_thread=True)
        except UNOPENABLE as error:
            self.close()
            raise self._unopenable(error) from error
        except RuntimeError as error:  # the client's own lock
            self.close()
            raise in_use(self.location) from error
        # The client's own destructor may run too late in the interpreter's exit.
        self._closing = weakref.finalize(self, self._client.close)
        use_write_ahead_log(self._client, self.collection)
        return self._client

    def _unopenable(self, error: BaseException) -> CocoaError:
        return CocoaError(f"the index {self.location} cannot be opened ({one_line(error)})")


def refuse_foreign_store(path: Path) -> None:
    """Refuse a file, and a folder that holds something other than a local store or the start of one.

    :raises CocoaError: If it is one.
    """
    if path.is_dir() and all(
        entry.name in (LOCK_FILE, META_FILE) or is_scratch_of(entry.name, META_FILE) for entry in path.iterdir()
    ):
        return
    refuse_foreign_folder(path, marker=META_FILE)


def write_empty_meta(path: Path) -> None:
    """Write the list of collections of a new store, because a client that is killed meanwhile leaves an empty file.

    :raises OSError: If it cannot be written.
    """
    meta = path / META_FILE
    if not meta.exists() or (meta.stat().st_size == 0 and not (path / "collection").exists()):
        write_atomically(meta, json.dumps({"collections": {}, "aliases": {}}))


def use_write_ahead_log(client: QdrantClient, collection: str) -> None:
    """Let SQLite append changes to a log without waiting for the disk after each point.

    The client commits every point, which is slow otherwise. A killed process loses nothing; a power failure may lose
    the last points, which the next indexing run adds again. SQLite removes the log when the file is closed. Where a log
    is not possible, the store is slower.
    """
    with contextlib.suppress(AttributeError, KeyError, sqlite3.Error):
        local = client._client
        storage = local.collections[collection].storage if isinstance(local, QdrantLocal) else None
        if storage is not None:
            storage.storage.execute("PRAGMA journal_mode = WAL")
            storage.storage.execute("PRAGMA synchronous = NORMAL")
