"""Where points are kept: one small interface over the homes of a collection, and what they have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from cocoa_embed.errors import CocoaError, UsageError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

Payload = dict[str, Any]
Element = TypeVar("Element")

KEYWORD, INTEGER, FLOAT, TEXT = "keyword", "integer", "float", "text"
PAYLOAD_INDEXES = {
    "path": KEYWORD,
    "relative_path": KEYWORD,
    "paths": KEYWORD,
    "sha256": KEYWORD,
    "mime": KEYWORD,
    "width": INTEGER,
    "height": INTEGER,
    "bytes": INTEGER,
    "mtime": FLOAT,
    "caption": TEXT,
}
"""The fields of a payload that are indexed, and as what, in the homes that have payload indexes."""

UNKNOWN_MODEL = "an unknown model"
"""What made the vectors of a collection that bears no signature."""
MAX_INTEGER_ID = 2**64 - 1
ID_BATCH = 1000
"""Points asked for, or removed, by their ids at once."""
CANDIDATES = 200
OVERSAMPLING = 3.0


class Point(NamedTuple):
    """What is stored of an image."""

    id: str
    """A UUID, in lower case and with hyphens."""
    vector: np.ndarray
    """float32, of shape (dimension,)."""
    payload: Payload
    """A JSON object."""


@dataclass(frozen=True)
class Hit:
    """A point that a search found, with the cosine of its vector and the query's as ``score``."""

    id: str
    score: float
    path: str
    payload: Payload

    @property
    def caption(self) -> str:
        """The words about the image; empty, if there are none, or if what others wrote there is no text."""
        caption = self.payload.get("caption")
        return caption if isinstance(caption, str) else ""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a collection says of the model that made its vectors."""

    model: str
    """The name that people know it by."""
    fingerprint: str | None
    """In hexadecimal; None in a collection that others made."""
    dimension: int


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How a server and Qdrant Edge keep vectors; a collection stays as it was created."""

    quantization: Literal["scalar", "binary"] | None = None
    """Search among vectors of a byte, or of a bit, a dimension, then among the best by the vectors themselves."""
    on_disk: bool = False
    """Whether the vectors themselves stay on the disk instead of in memory."""

    def __post_init__(self) -> None:
        if self.quantization not in (None, "scalar", "binary"):
            raise UsageError(f"quantization is {self.quantization!r}; it can be scalar, binary or none")


class Store(Protocol):
    """A collection of points. It is opened at first use, and whatever goes wrong in it is a ``CocoaError``.

    Threads may share one; what a call does for one of them, the others see when it has returned.
    """

    place: str
    """Where the points are, for people to read: a folder or an address."""
    collection: str
    parallel: int
    """How many threads may gainfully upsert at once."""

    def collections(self) -> list[str] | None:
        """Return the names of the collections in this place, sorted; None if there is no such place."""

    def signature(self) -> Signature | None:
        """Return what the collection says of its model, or None if there is no such collection.

        :raises CocoaError: If it holds anything but one unnamed vector a point, compared by the cosine.
        """

    def create(self, signature: Signature) -> None:
        """Create the collection with its payload indexes, or find that another process has just made the same.

        :raises CocoaError: If there is one with another signature.
        """

    def sign(self, signature: Signature) -> None:
        """Write the signature into a collection that has none.

        :raises CocoaError: If it has another one, or holds vectors of another dimension.
        """

    def scan(self, keys: Sequence[str]) -> Iterator[tuple[str, Payload]]:
        """Yield the id of every point with those fields of its payload that it has, page by page."""

    def retrieve(self, ids: Sequence[str]) -> dict[str, Payload]:
        """Return the payloads of points by id; those that are not there are missing."""

    def count(self) -> int:
        """Return the number of points."""

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, in place of those with the same ids, and wait until they are there.

        :raises CocoaError: If the vector or the payload of one cannot be stored; then nothing was written.
        """

    def overwrite_payload(self, id_: str, payload: Payload) -> None:
        """Give a stored point another payload, and wait until it has it."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove points, and wait until they are gone; those that are not there are no error."""

    def search(
        self,
        vector: np.ndarray,
        *,
        limit: int,
        offset: int = 0,
        score_threshold: float | None = None,
        query_filter: models.Filter | None = None,
    ) -> list[Hit]:
        """Return the points whose vectors are nearest to ``vector`` by the cosine, best first.

        :param limit: The most hits to return.
        :param offset: How many of the best to leave out.
        :param score_threshold: The least cosine of a hit.
        :param query_filter: What the payload of a hit has to be like.
        """

    def finish(self) -> None:
        """Do what is best done once after many writes: Qdrant Edge builds its search index."""

    def close(self) -> None:
        """Let go of files, locks and connections; the next use opens the store again."""


def open_store(
    *,
    client: QdrantClient | None = None,
    path: str | Path | None = None,
    url: str | None = None,
    edge: str | Path | None = None,
    api_key: str | None = None,
    collection: str,
    options: StoreOptions | None = None,
) -> Store:
    """Return a collection in one of the homes of points; nothing is opened yet.

    :param client: A client to use as it is; closing it remains the caller's.
    :param path: The folder of a local store, which one process at a time can use.
    :param url: The address of a Qdrant server.
    :param edge: The folder of Qdrant Edge shards, one a collection.
    :param api_key: What the server wants to see, if anything.
    :param options: What a local store knows nothing of is refused there; in a given client it is passed on.
    :raises UsageError: If not exactly one place is given, or what is given makes no sense.
    :raises MissingExtraError: If a package is not installed that the place needs.
    """
    places = {"client": client, "path": path, "url": url, "edge": edge}
    given = [name for name, place in places.items() if place is not None]
    if len(given) > 1:
        raise UsageError("more than one place to store points was given; give one of client, path, url and edge")
    if not given:
        raise UsageError("no place to store points was given; give one of client, path, url and edge")
    from cocoa_embed.integrations.qdrant.stores.checks import check_collection_name, check_url

    check_collection_name(collection)
    options = options or StoreOptions()
    if path is not None:
        if options != StoreOptions():
            raise UsageError(
                "a local store (path) has no quantization and keeps vectors in memory; give the url of a server, or"
                " edge, for these options"
            )
        from cocoa_embed.integrations.qdrant.stores.local import LocalStore

        return LocalStore(Path(path), collection)
    if edge is not None:
        from cocoa_embed.integrations.qdrant.stores.edge import EdgeStore

        return EdgeStore(Path(edge), collection, options)
    from cocoa_embed.integrations.qdrant.stores.server import ServerStore, given_store

    if url is not None:
        check_url(url)
        return ServerStore(url, collection, options, api_key=api_key)
    assert client is not None
    return given_store(client, collection, options)


def require_signature(store: Store) -> Signature:
    """Return the signature of a collection that has to be there.

    :raises CocoaError: If it is not, with what is there instead.
    """
    signature = store.signature()
    if signature is not None:
        return signature
    remedy = "run cocoa-embed index first, or name another place"
    names = store.collections()
    if names is None:
        raise CocoaError(f"there is no index in {store.place}; {remedy}")
    there = f"it holds {', '.join(names)}" if names else "it is empty"
    raise CocoaError(f"there is no collection {store.collection!r} in {store.place} ({there}); {remedy}")


def point_key(id_: str) -> int | str:
    """Return an id as Qdrant has it: the integers among them are written in digits here."""
    return int(id_) if id_.isdecimal() and len(id_) <= len(str(MAX_INTEGER_ID)) else id_


def lower_bound(score_threshold: float | None) -> float | None:
    """Return what a score has to be above to be at least ``score_threshold``: Qdrant leaves equal ones out."""
    if score_threshold is None:
        return None
    return float(np.nextafter(np.float32(score_threshold), np.float32(-np.inf)))


def oversampling(limit: int) -> float:
    """Return how many candidates a search for ``limit`` quantized vectors takes for each to look at closer.

    With vectors of a bit a dimension, twice as many as are asked for do not hold the nearest; comparing a few hundred
    vectors more costs little.
    """
    return max(OVERSAMPLING, CANDIDATES / limit)


def hit(id_: object, score: float, payload: Payload | None) -> Hit:
    """Return a ``Hit`` of what a search has given."""
    stored = payload or {}
    return Hit(id=str(id_), score=float(score), path=image_path(stored), payload=stored)


def image_path(payload: Payload) -> str:
    """Return the path of a point's image; that of a node which LlamaIndex wrote, if need be; empty if there is none."""
    if "path" in payload or "_node_content" not in payload:
        return str(payload.get("path", ""))
    try:
        return str(json.loads(payload["_node_content"]).get("image_path") or "")
    except (ValueError, TypeError, AttributeError):  # what others wrote may be anything
        return ""


def signature_fields(signature: Signature) -> Payload:
    """Return a signature as a JSON object."""
    return asdict(signature)


def read_signature(fields: object, dimension: int) -> Signature:
    """Return the signature that is written as a JSON object; of an unknown model if ``fields`` is no such thing."""
    if isinstance(fields, Mapping):
        model, fingerprint = fields.get("model"), fields.get("fingerprint")
        if isinstance(model, str) and isinstance(fingerprint, str):
            return Signature(model=model, fingerprint=fingerprint, dimension=dimension)
    return Signature(model=UNKNOWN_MODEL, fingerprint=None, dimension=dimension)


def batches(elements: Sequence[Element], size: int) -> Iterator[Sequence[Element]]:
    """Yield ``elements`` in lots of ``size``, the last one smaller."""
    for start in range(0, len(elements), size):
        yield elements[start : start + size]
