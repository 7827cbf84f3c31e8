"""A collection behind a qdrant-client, wherever that is connected to; local and remote stores build on it."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cocoa_embed.errors import CocoaError, one_line, require
from cocoa_embed.integrations.qdrant.stores.base import (
    ID_BATCH,
    Hit,
    Payload,
    Point,
    Signature,
    StoreOptions,
    batches,
    hit,
    lower_bound,
    point_key,
    read_signature,
    signature_fields,
)
from cocoa_embed.integrations.qdrant.stores.checks import (
    check_may_sign,
    check_points,
    check_vectors,
    payload_size,
    query_values,
)

require("qdrant_client", "qdrant")

from grpc import RpcError  # noqa: E402 - after the error that names the extra
from qdrant_client import QdrantClient, models  # noqa: E402
from qdrant_client.common.client_exceptions import QdrantException  # noqa: E402
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

Answer = TypeVar("Answer")

SIGNATURE_KEY = "cocoa_embed"
"""Where the signature is in the metadata of a collection, beside what others keep there."""

FAILURES = (
    ApiException,
    QdrantException,
    RpcError,
    sqlite3.Error,
    OSError,
    # The local client's own checks, and the remote one's of answers that are none of Qdrant's.
    ValueError,
    KeyError,
    RuntimeError,
    AssertionError,
)
"""What a client raises."""


class ClientStore:
    """A collection behind a client that was given, which is used by one thread at a time."""

    parallel = 1
    scroll_limit = 1000
    """Points asked for at once when the collection is scanned."""

    def __init__(
        self, collection: str, options: StoreOptions, *, client: QdrantClient | None, place: str = "the given client"
    ) -> None:
        """Name a collection; the client is asked nothing yet."""
        self.place = place
        self.collection = collection
        self.options = options
        self._client = client
        self._lock = threading.RLock()
        self._dimension: int | None = None

    def collections(self) -> list[str] | None:
        """Return the names of the collections, sorted."""
        found = self._ask(lambda client: client.get_collections())
        return sorted(collection.name for collection in found.collections)

    def signature(self) -> Signature | None:
        """Return what the collection says of its model, or None if there is no such collection."""
        if not self._ask(lambda client: client.collection_exists(self.collection)):
            return None
        config = self._ask(lambda client: client.get_collection(self.collection)).config
        self._dimension = self._checked_dimension(config.params.vectors)
        return read_signature((config.metadata or {}).get(SIGNATURE_KEY), self._dimension)

    def create(self, signature: Signature) -> None:
        """Create the collection, signed."""
        try:
            self._ask(
                lambda client: client.create_collection(
                    self.collection, metadata=signature_metadata(signature), **self._parameters(signature.dimension)
                )
            )
        except CocoaError as error:
            # An attempt whose answer was lost may have made it, or another process in the same moment.
            if not is_conflict(error.__cause__) or self.signature() != signature:
                raise
        else:
            self._read_back(signature)
        self._dimension = signature.dimension

    def sign(self, signature: Signature) -> None:
        """Write the signature into a collection that has none."""
        check_may_sign(self, self.signature(), signature)
        metadata = signature_metadata(signature)
        self._ask(lambda client: client.update_collection(self.collection, metadata=metadata))
        self._read_back(signature)

    def scan(self, keys: Sequence[str]) -> Iterator[tuple[str, Payload]]:
        """Yield the id of every point with those fields of its payload that it has, page by page."""
        offset: Any = None
        while True:
            records, offset = self._scroll(keys, offset)
            yield from ((str(record.id), record.payload or {}) for record in records)
            if offset is None:
                return

    def retrieve(self, ids: Sequence[str]) -> dict[str, Payload]:
        """Return the payloads of points by id; those that are not there are missing."""
        found: dict[str, Payload] = {}
        for some in batches([point_key(id_) for id_ in ids], ID_BATCH):
            found.update({str(record.id): record.payload or {} for record in self._retrieve(some)})
        return found

    def count(self) -> int:
        """Return the number of points."""
        return self._ask(lambda client: client.count(self.collection, exact=True)).count

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, and wait until they are there."""
        check_points(points, self._known_dimension())
        if points:
            self._send(points)

    def overwrite_payload(self, id_: str, payload: Payload) -> None:
        """Give a stored point another payload, and wait until it has it."""
        payload_size(f"point {id_}", payload)
        self._ask(
            lambda client: client.overwrite_payload(
                self.collection, payload=payload, points=[point_key(id_)], wait=True
            )
        )

    def delete(self, ids: Sequence[str]) -> None:
        """Remove points, and wait until they are gone."""
        for some in batches([point_key(id_) for id_ in ids], ID_BATCH):
            self._delete(models.PointIdsList(points=list(some)))

    def search(
        self,
        vector: np.ndarray,
        *,
        limit: int,
        offset: int = 0,
        score_threshold: float | None = None,
        query_filter: models.Filter | None = None,
    ) -> list[Hit]:
        """Return the points whose vectors are nearest to ``vector`` by the cosine, best first."""
        query = query_values(vector, self._known_dimension())
        answer = self._ask(
            lambda client: client.query_points(
                self.collection,
                query=query,
                query_filter=query_filter,
                limit=limit,
                offset=offset,
                score_threshold=lower_bound(score_threshold),
                search_params=self._search_params(limit + offset),
                with_payload=True,
            )
        )
        return [hit(point.id, point.score, point.payload) for point in answer.points]

    def finish(self) -> None:
        """Do nothing: a local store builds no index, a server builds its own."""

    def close(self) -> None:
        """Do nothing: a client that was given remains the caller's to close."""

    def _parameters(self, dimension: int) -> dict[str, Any]:
        """Return what a new collection is created with, besides its metadata."""
        return {"vectors_config": models.VectorParams(size=dimension, distance=models.Distance.COSINE)}

    def _known_dimension(self) -> int | None:
        """Return the dimension of the collection's vectors, asking for it if need be; None if there is none."""
        if self._dimension is None:
            self.signature()
        return self._dimension

    def _checked_dimension(self, vectors: models.VectorsConfig | None) -> int:
        """Return the dimension of a collection's vectors.

        :raises CocoaError: If it holds others than those of an indexer.
        """
        if not isinstance(vectors, models.VectorParams):
            check_vectors(self, list(vectors or {}), size=0, distance="")
        assert isinstance(vectors, models.VectorParams)
        distance = vectors.distance.value if vectors.multivector_config is None else "several a point"
        check_vectors(self, [""], size=vectors.size, distance=distance)
        return vectors.size

    def _search_params(self, limit: int) -> models.SearchParams | None:
        return None

    def _read_back(self, signature: Signature) -> None:
        """Check that the signature was kept that has just been written.

        :raises CocoaError: If it was not.
        """
        found = self.signature()
        if found != signature:
            raise CocoaError(
                f"Qdrant at {self.place} did not keep the signature of collection {self.collection!r}:"
                f" {signature} was written, {found} is there"
            )

    def _scroll(self, keys: Sequence[str], offset: Any) -> tuple[list[models.Record], Any]:  # noqa: ANN401 - an id
        return self._ask(
            lambda client: client.scroll(
                self.collection,
                limit=self.scroll_limit,
                offset=offset,
                with_payload=list(keys) or False,
                with_vectors=False,
            )
        )

    def _retrieve(self, ids: Sequence[int | str]) -> list[models.Record]:
        return self._ask(lambda client: client.retrieve(self.collection, ids, with_payload=True))

    def _delete(self, points: models.PointIdsList) -> None:
        self._ask(lambda client: client.delete(self.collection, points, wait=True))

    def _send(self, points: Sequence[Point]) -> None:
        structs = [
            models.PointStruct(id=point.id, vector=point.vector.tolist(), payload=point.payload) for point in points
        ]
        self._ask(lambda client: client.upsert(self.collection, points=structs, wait=True))

    def _ask(self, question: Callable[[QdrantClient], Answer]) -> Answer:
        """Return what the client says.

        :raises CocoaError: If it does not do what it was asked.
        """
        with self._lock:
            client = self._connected()
            try:
                return question(client)
            except FAILURES as error:
                raise self._failure(error) from error

    def _connected(self) -> QdrantClient:
        assert self._client is not None
        return self._client

    def _failure(self, error: BaseException, attempts: int = 1) -> CocoaError:
        tried = f" (tried {attempts} times)" if attempts > 1 else ""
        return CocoaError(f"Qdrant at {self.place} did not do what was asked: {reason(error)}{tried}")


def signature_metadata(signature: Signature) -> Payload:
    """Return the metadata of a collection that bears a signature."""
    return {SIGNATURE_KEY: signature_fields(signature)}


def is_conflict(error: BaseException | None) -> bool:
    """Say whether a client may not have created what is there already: a local one has a ``ValueError`` for that."""
    return isinstance(error, ValueError) or (isinstance(error, UnexpectedResponse) and error.status_code in (400, 409))


def reason(error: BaseException) -> str:
    """Return what a client's error says, on one line, without what is around it."""
    if isinstance(error, KeyError):
        return f"there is no {one_line(error)}"
    if isinstance(error, (json.JSONDecodeError, AssertionError)):
        return f"the answer is not one of Qdrant's ({one_line(error)})"
    if isinstance(error, UnexpectedResponse):
        try:
            said = error.structured()["status"]["error"]
        except (ValueError, TypeError, KeyError):
            return one_line(error)
        return f"{error.status_code} {error.reason_phrase}: {' '.join(str(said).split())}"
    return one_line(error)
