"""A collection behind a qdrant-client; the local store and the server build on it."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from cocoa_embed.errors import CocoaError, one_line, require
from cocoa_embed.integrations.qdrant.stores import base, checks
from cocoa_embed.integrations.qdrant.stores.base import Hit, Payload, Point, Query, Signature, StoreOptions

require("qdrant_client", "qdrant")

from grpc import RpcError  # noqa: E402 - after the error that names the extra
from qdrant_client import QdrantClient, models  # noqa: E402
from qdrant_client.common.client_exceptions import QdrantException  # noqa: E402
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse  # noqa: E402

Answer = TypeVar("Answer")

SIGNATURE_KEY = "cocoa_embed"
"""The key of the signature in the metadata of a collection."""

REFUSALS = (ValueError, KeyError, RuntimeError, AssertionError)
"""Raised by the local client's checks, and by the remote one for an answer that Qdrant does not give."""
FAILURES = (ApiException, QdrantException, RpcError, sqlite3.Error, OSError, *REFUSALS)
"""What a client raises."""


class ClientStore:
    """A collection behind a client, which one thread at a time uses."""

    parallel = 1
    scroll_limit = 1000
    """Points per page of a scan."""

    def __init__(
        self, location: str, collection: str, options: StoreOptions, *, client: QdrantClient | None = None
    ) -> None:
        """Name a collection; the client is not used yet."""
        self.location = location
        self.collection = collection
        self.options = options
        self._client = client
        self._lock = threading.RLock()
        self._dimension: int | None = None

    def collections(self) -> list[str] | None:
        """Return the names of all collections, sorted."""
        found = self._call(lambda client: client.get_collections())
        return sorted(collection.name for collection in found.collections)

    def signature(self) -> Signature | None:
        """Return the signature of the collection, or None if there is no such collection."""
        if not self._call(lambda client: client.collection_exists(self.collection)):
            return None
        config = self._call(lambda client: client.get_collection(self.collection)).config
        self._dimension = self._read_dimension(config.params.vectors)
        return base.read_signature((config.metadata or {}).get(SIGNATURE_KEY), self._dimension)

    def create(self, signature: Signature) -> None:
        """Create the collection with its signature, or sign an existing one without a signature."""
        metadata = {SIGNATURE_KEY: asdict(signature)}
        found = self.signature()
        if found is not None:
            checks.check_may_sign(self, found, signature)
            self._call(lambda client: client.update_collection(self.collection, metadata=metadata))
            return
        settings = self._vector_settings(signature.dimension)
        try:
            self._call(lambda client: client.create_collection(self.collection, metadata=metadata, **settings))
        except CocoaError as error:
            # It may exist by now: the answer to an earlier attempt was lost, or another process created it.
            if not is_conflict(error.__cause__) or self.signature() != signature:
                raise
        self._dimension = signature.dimension

    def scan(self, keys: Sequence[str]) -> Iterator[tuple[str, Payload]]:
        """Yield the id of every point and, of ``keys``, those that its payload has."""
        offset: Any = None

        def next_page(client: QdrantClient) -> tuple[list[models.Record], Any]:
            return client.scroll(
                self.collection,
                limit=self.scroll_limit,
                offset=offset,
                with_payload=list(keys) or False,
                with_vectors=False,
            )

        while True:
            records, offset = self._call(next_page)
            yield from ((str(record.id), record.payload or {}) for record in records)
            if offset is None:
                return

    def retrieve(self, ids: Sequence[str]) -> dict[str, Payload]:
        """Return the payloads of points by id; ids that do not exist are left out."""
        records = self._call(lambda client: client.retrieve(self.collection, list(ids), with_payload=True))
        return {str(record.id): record.payload or {} for record in records}

    def count(self) -> int:
        """Return the number of points."""
        return self._call(lambda client: client.count(self.collection, exact=True)).count

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points and wait until they are stored."""
        checks.check_points(points, self._known_dimension())
        if points:
            self._send(points)

    def overwrite_payload(self, id_: str, payload: Payload) -> None:
        """Replace the payload of a stored point and wait until it is stored."""
        checks.payload_size(f"point {id_}", payload)
        self._call(lambda client: client.overwrite_payload(self.collection, payload=payload, points=[id_], wait=True))

    def delete(self, ids: Sequence[str]) -> None:
        """Delete points and wait until they are deleted."""
        selector = models.PointIdsList(points=list(ids))
        if ids:
            self._call(lambda client: client.delete(self.collection, selector, wait=True))

    def search(self, query: Query) -> list[Hit]:
        """Return the points nearest to the query's vector by cosine, best first."""
        vector = checks.query_values(query, self._known_dimension())
        answer = self._call(
            lambda client: client.query_points(
                self.collection,
                query=vector,
                query_filter=query.filter,
                limit=query.limit,
                offset=query.offset,
                score_threshold=base.lower_bound(query.score_threshold),
                search_params=self._search_params(query.limit + query.offset),
                with_payload=True,
            )
        )
        return [base.make_hit(point.id, point.score, point.payload) for point in answer.points]

    def finish(self) -> None:
        """Do nothing: a local store has no index, a server builds its own."""

    def close(self) -> None:
        """Do nothing: the caller closes a given client."""

    def _vector_settings(self, dimension: int) -> dict[str, Any]:
        """Return how a new collection keeps its vectors, as arguments of ``create_collection``."""
        return {"vectors_config": models.VectorParams(size=dimension, distance=models.Distance.COSINE)}

    def _search_params(self, limit: int) -> models.SearchParams | None:
        return None

    def _known_dimension(self) -> int | None:
        """Return the dimension of the collection's vectors; None if there is no collection."""
        if self._dimension is None:
            self.signature()
        return self._dimension

    def _read_dimension(self, vectors: models.VectorsConfig | None) -> int:
        """Return the dimension of a collection's vectors.

        :raises CocoaError: If it holds other vectors than this indexer writes.
        """
        if not isinstance(vectors, models.VectorParams):
            raise checks.other_vectors(self, f"named vectors ({', '.join(vectors or {})})")
        distance = vectors.distance.value if vectors.multivector_config is None else "several per point"
        if distance != models.Distance.COSINE.value:
            raise checks.other_vectors(self, f"vectors of {vectors.size} dimensions ({distance})")
        return vectors.size

    def _send(self, points: Sequence[Point]) -> None:
        structs = [
            models.PointStruct(id=point.id, vector=point.vector.tolist(), payload=point.payload) for point in points
        ]
        self._call(lambda client: client.upsert(self.collection, points=structs, wait=True))

    def _call(self, call: Callable[[QdrantClient], Answer]) -> Answer:
        """Return the result of a call of the client.

        :raises CocoaError: If it fails.
        """
        with self._lock:
            client = self._connected()
            try:
                return call(client)
            except FAILURES as error:
                raise self._failure(error) from error

    def _connected(self) -> QdrantClient:
        assert self._client is not None
        return self._client

    def _failure(self, error: BaseException, attempts: int = 1) -> CocoaError:
        tried = f" (tried {attempts} times)" if attempts > 1 else ""
        return CocoaError(f"Qdrant at {self.location} failed: {reason(error)}{tried}")


def is_conflict(error: BaseException | None) -> bool:
    """Return whether a collection could not be created because it exists; a local client raises ``ValueError``."""
    return isinstance(error, ValueError) or (isinstance(error, UnexpectedResponse) and error.status_code in (400, 409))


def reason(error: BaseException) -> str:
    """Return the message of a client's error on one line."""
    if isinstance(error, KeyError):
        return f"there is no {one_line(error)}"
    if isinstance(error, (json.JSONDecodeError, AssertionError)):
        return f"the answer is not one of Qdrant's ({one_line(error)})"
    if isinstance(error, UnexpectedResponse):
        try:
            message = error.structured()["status"]["error"]
        except (ValueError, TypeError, KeyError):
            return one_line(error)
        return f"{error.status_code} {error.reason_phrase}: {' '.join(str(message).split())}"
    return one_line(error)
