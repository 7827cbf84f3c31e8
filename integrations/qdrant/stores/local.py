"""A collection in a folder, in qdrant-client's local mode: exact search in memory, one process at a time."""

from __future__ import annotations

import contextlib
import json
import pickle
import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout
from qdrant_client import QdrantClient
from qdrant_client.local.qdrant_local import QdrantLocal

from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.folders import write_atomically
from cocoa_embed.integrations.qdrant.points import Payload
from cocoa_embed.integrations.qdrant.stores.base import MEMORY, Point, Replacement, Signature
from cocoa_embed.integrations.qdrant.stores.client import ClientStore
from cocoa_embed.integrations.qdrant.stores.foreign import (
    LOCAL_LOCK,
    LOCAL_META,
    OWN_MARKERS,
    refuse_foreign_index,
)
from cocoa_embed.integrations.qdrant.stores.locks import folder_lock, in_use
from cocoa_embed.integrations.qdrant.stores.options import CREATE_KEYS, StoreOptions

UNOPENABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, sqlite3.Error, pickle.PickleError)
"""What the client raises for broken files."""


def open_collection(path: str | Path, collection: str, options: StoreOptions) -> ClientStore:
    """Return a collection in a folder, or in memory (``:memory:``); nothing is opened or created yet.

    :raises UsageError: If ``options`` has any that a local store does not support.
    """
    options.refuse("a local store (path)", ("prefer_grpc", *CREATE_KEYS), "the url of a server, or edge")
    if str(path) == MEMORY:
        return InMemoryStore("memory", collection, options, client=QdrantClient(MEMORY))
    return LocalStore(printable(path), collection, options, path=Path(path))


class InMemoryStore(ClientStore):
    """A collection accessed through a local client, which has no indexes: filters look at every point."""

    _ids_by_path: dict[str, set[str]] | None = None
    """The points that have, or have had, a path; None until they are needed."""

    def create(self, signature: Signature) -> None:
        """Create the collection with its signature, or sign an existing one without a signature."""
        self._ids_by_path = None  # between two runs, others may have used the client
        super().create(signature)

    def by_paths(self, paths: Sequence[str]) -> dict[str, Payload]:
        """Return the payloads, by id, of the points that have one of these among their ``paths``."""
        with self._lock:
            if self._ids_by_path is None:
                self._ids_by_path = {}
                for id_, payload in self.scan(["paths"]):
                    self._note(id_, payload)
            ids = {id_ for path in paths for id_ in self._ids_by_path.get(path, ())}
            found = self.retrieve(sorted(ids))
        return {id_: payload for id_, payload in found.items() if not set(paths).isdisjoint(payload.get("paths") or ())}

    def _insert(self, points: Sequence[Point], sizes: Sequence[int]) -> None:
        with self._lock:
            super()._insert(points, sizes)
            for point in points:
                self._note(point.id, point.payload)

    def _replace(self, replacements: Sequence[Replacement]) -> None:
        with self._lock:
            for each in replacements:
                self._note(each.id, each.payload or {})
            super()._replace(replacements)

    def _selected(self, replacement: Replacement) -> dict[str, Any]:
        # No other process can change a point meanwhile, and a filter by the revision would read every point.
        return {"points": [replacement.id]}

    def _note(self, id_: str, payload: Payload) -> None:
        if self._ids_by_path is not None:
            for path in payload.get("paths") or ():
                self._ids_by_path.setdefault(path, set()).add(id_)


class LocalStore(InMemoryStore):
    """A collection in a folder, all of it in memory while it is open."""

    # Each page of a scroll sorts all ids and reads all payloads, so pages are large.
    scroll_limit = 10_000

    def __init__(self, location: str, collection: str, options: StoreOptions, *, path: Path) -> None:
        """Name a folder and a collection."""
        self._path = path.absolute()  # it is opened later, maybe in another working folder
        super().__init__(location, collection, options, str(self._path))

    def create(self, signature: Signature) -> None:
        """Create the collection with its signature, and the folder if needed."""
        with self._lock:
            client = self._open()
            super().create(signature)
            use_write_ahead_log(client, self.collection)

    def _exists(self) -> bool:
        with self._readable_errors():
            refuse_foreign_index(self._path, markers=OWN_MARKERS["path"])
            return (self._path / LOCAL_META).is_file()

    def _connected(self) -> QdrantClient:
        if self._opened is None and not self._exists():
            raise self._no_collection()
        return self._open()

    def _open(self) -> QdrantClient:
        """Return the client; it is opened, and the folder created, if needed."""
        if self._opened is None:
            with self._readable_errors(), contextlib.ExitStack() as stack:
                refuse_foreign_index(self._path, markers=OWN_MARKERS["path"])
                self._path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(folder_lock(self._path / LOCAL_LOCK))
                write_empty_meta(self._path)
                # This class lets in one thread at a time, which SQLite's own check cannot know.
                client = QdrantClient(path=str(self._path), force_disable_check_same_thread=True)
                # The client's own destructor may run too late in the interpreter's exit.
                stack.callback(client.close)
                self._opened, self._closing = client, weakref.finalize(self, stack.pop_all().close)
            use_write_ahead_log(client, self.collection)
        return self._opened

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except (Timeout, RuntimeError) as error:  # our lock and the client's own
            raise in_use(self.location) from error
        except UNOPENABLE as error:
            raise CocoaError(f"the index {self.location} cannot be opened ({one_line(error)})") from error


def write_empty_meta(path: Path) -> None:
    """Write the list of collections of a new store, because a client that is killed meanwhile leaves an empty file.

    :raises OSError: If it cannot be written.
    """
    meta = path / LOCAL_META
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
