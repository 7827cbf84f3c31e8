"""A collection in a folder, by qdrant-client's local mode: exact search, one process at a time."""

from __future__ import annotations

import contextlib
import json
import pickle
import sqlite3
import weakref
from pathlib import Path
from typing import IO

from qdrant_client import QdrantClient
from qdrant_client.local.qdrant_local import QdrantLocal

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.folders import is_scratch_of, refuse_foreign_folder, write_atomically
from cocoa_embed.integrations.qdrant.stores.base import Signature, StoreOptions
from cocoa_embed.integrations.qdrant.stores.client import ClientStore
from cocoa_embed.integrations.qdrant.stores.locks import in_use, lock_file

META_FILE = "meta.json"
"""Where the client lists its collections; what makes a folder a local store."""
LOCK_FILE = ".cocoa-lock"
"""The client's own lock is taken only after it has read everything, which another process may be writing."""
UNOPENABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, sqlite3.Error, pickle.PickleError)
"""What the client raises over files that are not, or not wholly, its own."""


class LocalStore(ClientStore):
    """A collection in a folder. All of it is in memory while it is open."""

    # Each page of a scroll sorts all ids and looks at all payloads, so a few large ones it is.
    scroll_limit = 10_000

    def __init__(self, path: Path, collection: str) -> None:
        """Name a folder and a collection; nothing is opened or created yet."""
        super().__init__(collection, StoreOptions(), client=None, place=printable(path))
        self._path = path
        self._lock_handle: IO[str] | None = None
        self._closing: weakref.finalize | None = None

    def collections(self) -> list[str] | None:
        """Return the names of the collections, sorted; None if the folder is no store."""
        return super().collections() if self._exists() else None

    def signature(self) -> Signature | None:
        """Return what the collection says of its model, or None if there is no such collection."""
        return super().signature() if self._exists() else None

    def create(self, signature: Signature) -> None:
        """Create the collection, signed, and the folder if needed."""
        with self._lock:
            client = self._open(create=True)
            super().create(signature)
            write_ahead(client, self.collection)

    def close(self) -> None:
        """Close the client and release the folder."""
        with self._lock:
            if self._closing is not None:
                self._closing()
            self._client = self._closing = None
            if self._lock_handle is not None:
                self._lock_handle.close()
                self._lock_handle = None

    def _exists(self) -> bool:
        try:
            refuse_foreign_store(self._path)
            return (self._path / META_FILE).is_file()
        except OSError as error:
            raise CocoaError(f"the index {self.place} cannot be opened ({one_line(error)})") from error

    def _connected(self) -> QdrantClient:
        if self._client is None and not self._exists():
            raise CocoaError(f"there is no index in {self.place}; run cocoa-embed index first, or name another place")
        return self._open(create=False)

    def _open(self, *, create: bool) -> QdrantClient:
        if self._client is not None:
            return self._client
        try:
            refuse_foreign_store(self._path)
            if create:
                self._path.mkdir(parents=True, exist_ok=True)
            self._lock_handle = lock_file(self._path / LOCK_FILE, self.place)
            lay_foundations(self._path)
            # The lock of this class is what SQLite's own check stands for: one thread at a time.
            self._client = QdrantClient(path=str(self._path), force_disable_check_same_thread=True)
        except RuntimeError as error:
            self.close()
            raise in_use(self.place) from error
        except UNOPENABLE as error:
            self.close()
            raise CocoaError(f"the index {self.place} cannot be opened ({one_line(error)})") from error
        # Left open, the client's own destructor may run too late in the interpreter's exit to do its work.
        self._closing = weakref.finalize(self, self._client.close)
        write_ahead(self._client, self.collection)
        return self._client


def refuse_foreign_store(path: Path) -> None:
    """Refuse a path that is a file, or a folder that holds something else than the beginnings of a local store.

    :raises CocoaError: If it is one.
    """
    if path.is_dir() and all(
        entry.name in (LOCK_FILE, META_FILE) or is_scratch_of(entry.name, META_FILE) for entry in path.iterdir()
    ):
        return
    refuse_foreign_folder(path, marker=META_FILE)


def lay_foundations(path: Path) -> None:
    """Write the list of collections of a new store: the client, if killed while it does, leaves an empty file.

    Only whoever has the store's lock may do so.

    :raises OSError: If it cannot be written.
    """
    meta = path / META_FILE
    if not meta.exists() or (meta.stat().st_size == 0 and not (path / "collection").exists()):
        write_atomically(meta, json.dumps({"collections": {}, "aliases": {}}))


def write_ahead(client: QdrantClient, collection: str) -> None:
    """Have SQLite write what changes into a log beside the file, without waiting for the disk at each point.

    The client commits every point by itself, which the waiting makes slow. A kill loses nothing of it, a power failure
    the last points at most, which the next indexing run finds missing. The log is gone when the file is
    closed. A file system that cannot have it, or a client that is built otherwise, is slower and no more.
    """
    with contextlib.suppress(AttributeError, KeyError, sqlite3.Error):
        local = client._client
        storage = local.collections[collection].storage if isinstance(local, QdrantLocal) else None
        if storage is not None:
            storage.storage.execute("PRAGMA journal_mode = WAL")
            storage.storage.execute("PRAGMA synchronous = NORMAL")
