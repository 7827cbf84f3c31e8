"""The interface of the storage backends, and what they have in common."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from cocoa_embed.errors import CocoaError, UsageError, did_you_mean
from cocoa_embed.integrations.qdrant.points import REVISION, Payload
from cocoa_embed.integrations.qdrant.stores import base, checks
from cocoa_embed.integrations.qdrant.stores.base import (
    Hit,
    NewVector,
    Point,
    Query,
    Replacement,
    Signature,
    StoredPoint,
)
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions

if TYPE_CHECKING:
    from qdrant_client import models


class Store(ABC):
    """One collection of points in a storage backend.

    A store opens at first use and raises ``CocoaError`` for every failure. Threads may share it; when a call returns,
    its effect is visible to all of them.
    """

    parallel = 1
    """The number of threads that should write at once."""
    scroll_limit = 1000
    """Points per page of a scan."""

    def __init__(self, location: str, collection: str, options: StoreOptions, place: str | None) -> None:
        """Name a location and a collection; nothing is opened or created yet.

        :param location: The folder or address, for messages.
        :param place: Names the location for all processes of this machine; None if it is this process's memory.
        """
        self.location = location
        self.place = place
        self.collection = collection
        self.name = f"collection {collection!r} in {location}"
        self.options = options
        self._lock = threading.RLock()
        self._opened: Any = None
        """The client or the shard, while it is open."""
        self._closing: weakref.finalize | None = None
        """Closes what this store has opened, at the latest when the interpreter exits."""
        self._signed: Signature | None = None
        """The signature, once it is known."""

    @abstractmethod
    def signature(self) -> Signature | None:
        """Return the signature of the collection, or None if there is no such collection.

        :raises CocoaError: If its vectors are not of the expected layout, or not compared by cosine.
        """

    @property
    def embed(self) -> str:
        """What the collection embeds for an image: one of ``EMBEDS``."""
        return self._required_signature().embed

    def require_signature(self) -> Signature:
        """Return the signature of a collection that must exist.

        :raises CocoaError: If it does not exist.
        """
        signature = self.signature()
        if signature is None:
            raise self._no_collection()
        return signature

    @abstractmethod
    def create(self, signature: Signature) -> None:
        """Create the collection with its signature and payload indexes, or add those that an existing one lacks.

        :raises CocoaError: If it exists with another signature or another dimension.
        """

    def scan(
        self, keys: Sequence[str] | None, condition: models.Filter | None = None, *, limit: int | None = None
    ) -> Iterator[tuple[str, Payload]]:
        """Yield the id of every point and the values of ``keys`` in its payload; the whole payload if they are None.

        :param condition: Yield only these points.
        :param limit: The maximum number of points; None for all.
        """
        fields: Any = True if keys is None else list(keys) or False
        page = min(limit or self.scroll_limit, self.scroll_limit)
        for record in islice(self._records(condition, page, with_payload=fields, with_vectors=False), limit):
            yield str(record.id), record.payload or {}

    def retrieve(self, ids: Sequence[str]) -> dict[str, Payload]:
        """Return the payloads of points by id; ids that do not exist are left out."""
        return {str(record.id): record.payload or {} for record in self._retrieve(ids)} if ids else {}

    def by_paths(self, paths: Sequence[str]) -> dict[str, Payload]:
        """Return the payloads, by id, of the points that have one of these among their ``paths``."""
        return dict(self.scan(None, base.with_any_of("paths", paths))) if paths else {}

    @abstractmethod
    def count(self, condition: models.Filter | None = None) -> int:
        """Return the number of points.

        :param condition: Count only these points.
        """

    def insert(self, points: Sequence[Point]) -> None:
        """Store points whose ids do not exist yet, and wait until they are stored; the others stay as they are.

        :raises CocoaError: If a vector or a payload cannot be stored; then nothing was written.
        """
        sizes = checks.check_points(points, self._required_signature().shape)
        if points:
            self._insert(points, sizes)

    def replace_payloads(
        self, changes: Sequence[tuple[str, Payload, Payload | None]], vectors: Mapping[str, NewVector] | None = None
    ) -> None:
        """Replace payloads and wait until they are stored; a point that something else has changed stays as it is.

        :param changes: The id of a point, its payload as it was read, and the new one; None deletes the point.
        :param vectors: New vectors by id, replaced at the same time. They are stored before the payload, which says
            what they embed.
        :raises CocoaError: If a vector or a payload cannot be stored; then nothing was written.
        """
        replacements = []
        for id_, before, after in changes:
            revision = before.get(REVISION)
            new = None if after is None else {**after, REVISION: (revision or 0) + 1}
            size = 0 if new is None else checks.payload_size(f"point {id_}", new)
            vector = (vectors or {}).get(id_)
            if vector is not None and vector.values is not None:
                size += checks.vector_size(f"point {id_}", vector.values, self._required_signature().shape)
            replacements.append(Replacement(id_, revision, new, size + checks.BYTES_PER_POINT, vector))
        if replacements:
            self._replace(replacements)

    def search(self, query: Query) -> list[Hit]:
        """Return the points nearest to the query's vector by cosine, best first."""
        return self.search_batch([query])[0]

    def search_batch(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Return the hits of several queries, with one request.

        In a collection with two vectors, an image is found by both, and its score is that of Reciprocal Rank Fusion
        (RRF): the sum of 1 / (2 + rank), with ranks from 0.

        :raises UsageError: If a number in a query is not one that every backend takes.
        """
        shape = self._required_signature().shape
        checked = [checks.check_query(query, shape) for query in queries]
        found = self._search(checked) if checked else []
        return [
            [self._hit(point, each.vectors) for point in points] for each, points in zip(checked, found, strict=True)
        ]

    @staticmethod
    def _hit(point: Any, count: int) -> Hit:  # noqa: ANN401
        payload = point.payload or {}
        return Hit(str(point.id), float(point.score) / count, base.image_path(payload), payload)

    def points(
        self, query_filter: models.Filter | None = None, *, limit: int | None = None, with_vectors: bool = False
    ) -> Iterator[StoredPoint]:
        """Yield the points that a filter lets through, in no order that means anything.

        :param limit: The maximum number of points; None for all.
        :param with_vectors: Whether to read their vectors too.
        """
        page = min(limit or self.scroll_limit, self.scroll_limit)
        records = self._records(query_filter, page, with_payload=True, with_vectors=with_vectors)
        return map(stored_point, islice(records, limit))

    def _records(self, condition: models.Filter | None, limit: int, **fields: Any) -> Iterator[Any]:
        """Yield the records that a condition lets through, read in pages of ``limit``."""
        offset = None
        while True:
            records, offset = self._scroll(condition, limit=limit, offset=offset, **fields)
            yield from records
            if offset is None:
                return

    @abstractmethod
    def collections(self) -> list[str]:
        """Return the names of all collections in this place."""

    def aliases(self) -> dict[str, str]:
        """Return the collection that each alias in this place names."""
        return {}

    def set_alias(self, alias: str) -> str | None:
        """Make a name an alias of this collection, in one step for all clients; return what it referred to before.

        :param alias: Any command and any client accepts it as the name of the collection.
        :raises UsageError: If a collection has this name, or the backend has no aliases.
        """
        raise UsageError(
            f"{self.location} has no aliases ({alias!r}); a server (url) and a local store (path) have them"
        )

    def payload_indexes(self) -> Mapping[str, str] | None:
        """Return the types of the payload indexes by field, if only those can be in a filter; None if any field can."""
        return None

    def create_payload_index(self, field: str, kind: str) -> None:  # noqa: B027 - a local store has none
        """Create an index for filters on a field, unless there is one.

        :param field: The path of the field in Qdrant's notation.
        :param kind: The type of the field, such as ``KEYWORD``.
        """

    def finish(self) -> None:  # noqa: B027 - most backends have nothing to do
        """Do the work that follows many writes: build the search index, if that was put off."""

    def close(self) -> None:
        """Release files, locks and connections; the next use opens the store again. A given client stays open."""
        with self._lock:
            if self._closing is not None:
                closing, self._closing, self._opened = self._closing, None, None
                closing()

    @abstractmethod
    def _scroll(self, condition: models.Filter | None, *, with_vectors: bool, **page: Any) -> tuple[Sequence[Any], Any]:
        """Return a page of records with ``id``, ``payload`` and ``vector``, and the offset of the next page.

        :param page: ``limit``, ``offset`` and ``with_payload``, as the clients of Qdrant take them.
        """

    @abstractmethod
    def _retrieve(self, ids: Sequence[str]) -> Sequence[Any]: ...

    @abstractmethod
    def _insert(self, points: Sequence[Point], sizes: Sequence[int]) -> None: ...

    @abstractmethod
    def _replace(self, replacements: Sequence[Replacement]) -> None: ...

    @abstractmethod
    def _search(self, queries: Sequence[Query]) -> Sequence[Sequence[Any]]:
        """Return for each query its records with ``id``, ``score`` and ``payload``."""

    def _required_signature(self) -> Signature:
        """Return the signature of the collection, as it was when it was last read.

        :raises CocoaError: If there is no such collection.
        """
        return self._signed or self.require_signature()

    def _no_collection(self) -> CocoaError:
        try:
            others = self.collections()
        except CocoaError:
            others = []
        known = f" {did_you_mean(self.collection, others)}" if others else ""
        return CocoaError(
            f"there is no {self.name}{known}; run cocoa-embed index first, or give another location or collection"
        )

    def _read_signature(
        self, fields: Mapping[str, Any] | None, names: Collection[str], sizes: Collection[int]
    ) -> Signature:
        """Return the signature of a collection by its JSON object, the names of its vectors, and their one size.

        :param sizes: The sizes of the vectors that are compared by cosine.
        :raises CocoaError: If it holds other vectors.
        """
        known = fields or {"model": "an unknown model", "fingerprint": None}
        is_both, vectors = set(names) == {base.IMAGE_VECTOR, base.CAPTION_VECTOR}, known.get("vectors", 1)
        if not (is_both or set(names) == ({""} if vectors == 1 else {"", base.ALL_VECTORS})) or len(sizes) != 1:
            raise CocoaError(
                f"{self.name} does not hold one unnamed vector per point (or two, named image and caption), compared by"
                " cosine; choose another collection"
            )
        (dimension,) = sizes
        embed = base.BOTH if is_both else known.get("embed", base.IMAGE)
        return Signature(known["model"], known["fingerprint"], dimension, embed, vectors)

    def _needs_signature(self, found: Signature, signature: Signature) -> bool:
        """Return whether an existing collection has no signature yet.

        :raises CocoaError: If it has the signature of another model, or another dimension.
        """
        needs = found.fingerprint is None
        is_open = needs and base.BOTH not in (found.embed, signature.embed)
        (replace(found, embed=signature.embed) if is_open else found).require(signature, self.name, "collection")
        return needs


def stored_point(record: Any) -> StoredPoint:  # noqa: ANN401
    """Return a record of a client as a point."""
    vectors = record.vector if isinstance(record.vector, dict) else {"": record.vector}
    unnamed, image, caption, several = (
        None if (values := vectors.get(name)) is None else np.asarray(values, dtype=np.float32)
        for name in ("", base.IMAGE_VECTOR, base.CAPTION_VECTOR, base.ALL_VECTORS)
    )
    return StoredPoint(str(record.id), record.payload or {}, image if unnamed is None else unnamed, caption, several)
