"""Index folders of images into a Qdrant collection, and search it by text, by image, or by both."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from cocoa_embed.encoder import Encoder, make_item
from cocoa_embed.errors import CocoaError, UsageError, require
from cocoa_embed.folders import refuse_foreign_folder
from cocoa_embed.images import ImageSource, one_line, printable
from cocoa_embed.integrations.indexing import IndexRun, Point, StoredPoint, find_image_files
from cocoa_embed.integrations.points import Description, described_payload
from cocoa_embed.loading import load_model

require("qdrant_client", "qdrant")

from qdrant_client import QdrantClient, models  # noqa: E402 - after the error that names the extra
from qdrant_client.http.exceptions import ApiException  # noqa: E402

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_PATH = "cocoa-index"
SERVER_TIMEOUT = 60
"""Seconds to wait for a server's answer; Qdrant's own default of 5 is short for a batch of large vectors."""
MAX_COLLECTION_NAME = 255
"""Bytes in the name of a collection, which is a folder's name in a local store."""
SCROLL_LIMIT = 1000
"""Points asked for at once when the collection's contents are listed."""


@dataclass(frozen=True)
class IndexSummary:
    """What an indexing run did. Every file counts once: indexed, unchanged, updated, replaced or failed."""

    collection: str
    indexed: int
    """Files with new content, now points."""
    unchanged: int
    """Files whose content was a point already, from an earlier run or from another file of this one."""
    updated: int
    """Files whose content was a point already, which now has their path, or their new caption and metadata."""
    replaced: int
    """Files whose content had changed: the new content is a point, the old is none."""
    pruned: int
    """Points removed because their files are gone; 0 as yet, nothing is removed unasked."""
    failed: list[dict[str, str]]
    """The files left out, as ``{"path", "reason"}``."""
    seconds: float
    """Without the time that loading the model took."""
    images_per_second: float
    """Images embedded and stored, by ``seconds``."""


@dataclass(frozen=True)
class Hit:
    """A point that a search found, with the cosine of its vector and the query's as ``score``."""

    id: str
    score: float
    path: str
    payload: dict[str, Any]


class QdrantIndexer:
    """A collection of images in Qdrant, and the multimodal model that embeds what goes in and what is asked.

    The client and the model are opened at first use. Threads may share an indexer. It is a context manager.
    """

    def __init__(
        self,
        model: SentenceTransformer | Encoder | str | Path,
        *,
        client: QdrantClient | None = None,
        path: str | Path | None = None,
        url: str | None = None,
        api_key: str | None = None,
        collection: str = "images",
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        """Name the model and the collection; nothing is opened yet.

        :param model: Any SentenceTransformer that embeds text and images, or the folder or hub name of one.
        :param client: A client to use as it is; closing it remains the caller's.
        :param path: The folder of a local store, created if needed; ``cocoa-index`` if no other place is given.
        :param url: The address of a Qdrant server.
        :param api_key: What the server wants to see, if anything.
        :param collection: Created at the first indexing.
        :param batch_size: Images to embed and to store at once.
        :param device: The torch device, for a model that is to be loaded.
        :raises UsageError: If more than one of ``client``, ``path`` and ``url`` is given, ``batch_size`` is not
            positive, ``collection`` is no name for one, or ``url`` no address.
        """
        if sum(place is not None for place in (client, path, url)) > 1:
            raise UsageError("more than one place to store points was given; give one of client, path and url")
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; it must be 1 or more")
        check_collection_name(collection)
        if url is not None:
            check_url(url)
        self.collection = collection
        self.batch_size = batch_size
        self._model = model
        self._device = device
        self._client = client
        self._owns_client = client is None
        self._path = None if client is not None or url is not None else Path(path or DEFAULT_PATH)
        self._url = url
        self._api_key = api_key
        self._encoder: Encoder | None = None
        self._lock = threading.RLock()

    @property
    def place(self) -> str:
        """Where the points are, for people to read."""
        return self._url or (printable(self._path) if self._path is not None else "the given client")

    @property
    def encoder(self) -> Encoder:
        """The model, loaded at first use.

        :raises CocoaError: If it cannot be loaded, or embeds no images.
        """
        with self._lock:
            if self._encoder is None:
                if isinstance(self._model, Encoder):
                    encoder = self._model
                elif isinstance(self._model, (str, Path)):
                    encoder = Encoder(load_model(self._model, self._device), printable(self._model))
                else:
                    encoder = Encoder(self._model)
                encoder.require_images()
                self._encoder = encoder
            return self._encoder

    def index(self, paths: str | Path | Iterable[str | Path], *, progress: bool = True) -> IndexSummary:
        """Embed the images among and below ``paths`` and store them; what is stored already is not embedded again.

        Captions and other columns of a folder's ``metadata.jsonl`` go into the payload, not into the embedding. A file
        that cannot be used is left out and listed in the summary.

        :param paths: A folder or a file, or several.
        :param progress: Whether to draw a progress bar on standard error.
        :raises CocoaError: If there is no image at all, a ``metadata.jsonl`` is malformed, the model embeds no images,
            or the collection cannot hold its embeddings.
        """
        files = find_image_files([paths] if isinstance(paths, (str, Path)) else paths)
        self._ensure_collection()
        started = time.perf_counter()
        run = IndexRun(self, self.encoder, self.batch_size, self._stored_points())
        for file in tqdm(files, desc=f"indexing into {self.collection}", unit="image", disable=not progress):
            run.add(file)
        run.finish()
        seconds = time.perf_counter() - started
        return IndexSummary(
            collection=self.collection,
            indexed=run.indexed,
            unchanged=len(files) - run.indexed - run.updated - run.replaced - len(run.failed),
            updated=run.updated,
            replaced=run.replaced,
            pruned=0,
            failed=run.failed,
            seconds=seconds,
            images_per_second=(run.indexed + run.replaced) / seconds,
        )

    def search(
        self,
        text: str | None = None,
        image: ImageSource | None = None,
        *,
        limit: int = 10,
        offset: int = 0,
        score_threshold: float | None = None,
        query_filter: models.Filter | None = None,
    ) -> list[Hit]:
        """Return the images nearest to a text, to an image, or to both taken as one query, best first.

        :param text: Always taken as text, even if it is the name of a file or an address.
        :param image: A path, bytes, a ``BytesIO`` or a PIL image.
        :param limit: The most hits to return.
        :param offset: How many of the best to leave out.
        :param score_threshold: The least cosine of a hit.
        :param query_filter: A Qdrant filter on the payload.
        :raises UsageError: If neither text nor image is given, or ``limit`` or ``offset`` make no sense.
        :raises CocoaError: If there is no such collection, or it holds another model's kind of vectors.
        """
        if limit < 1 or offset < 0:
            raise UsageError(f"limit is {limit} and offset {offset}; limit must be 1 or more, offset 0 or more")
        item = make_item(text, image)
        self._require_collection()
        (vector,) = self.encoder.embed_queries([item])
        with self._session() as client:
            self._check_collection(client)
            points = client.query_points(
                self.collection,
                query=vector.tolist(),
                query_filter=query_filter,
                limit=limit,
                offset=offset,
                score_threshold=score_threshold,
                with_payload=True,
            ).points
        return [hit(point) for point in points]

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, and wait until they are."""
        structs = [models.PointStruct(id=point.id, vector=point.vector, payload=point.payload) for point in points]
        with self._session() as client:
            client.upsert(self.collection, points=structs, wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove points, and wait until they are gone."""
        with self._session() as client:
            client.delete(self.collection, points_selector=models.PointIdsList(points=list(ids)), wait=True)

    def describe(self, id_: str, description: Description) -> None:
        """Give a stored point the path of another file of the same content, or other words about it."""
        with self._session() as client:
            (point,) = client.retrieve(self.collection, [id_], with_payload=True)
            described = described_payload(point.payload or {}, description)
            client.overwrite_payload(self.collection, payload=described, points=[id_], wait=True)

    def close(self) -> None:
        """Close the client, unless it was given; the next use opens it again."""
        with self._lock:
            if self._owns_client and self._client is not None:
                self._client.close()
                self._client = None

    def __enter__(self) -> QdrantIndexer:
        """Return the indexer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the client."""
        self.close()

    @contextmanager
    def _session(self) -> Iterator[QdrantClient]:
        with self._lock:
            try:
                yield self._open()
            except (ApiException, sqlite3.Error) as error:
                raise CocoaError(f"Qdrant at {self.place} did not do what was asked: {one_line(error)}") from error

    def _open(self) -> QdrantClient:
        if self._client is None:
            self._client = self._open_server() if self._path is None else self._open_folder(self._path)
        return self._client

    def _open_server(self) -> QdrantClient:
        try:
            return QdrantClient(url=self._url, api_key=self._api_key, timeout=SERVER_TIMEOUT, check_compatibility=False)
        except ValueError as error:
            raise UsageError(f"{self._url!a} is no address of a Qdrant server ({one_line(error)})") from error

    def _open_folder(self, path: Path) -> QdrantClient:
        refuse_foreign_folder(path, marker="meta.json")
        try:
            # The lock of this class is what SQLite's own check stands for: one thread at a time.
            return QdrantClient(path=str(path), force_disable_check_same_thread=True)
        except RuntimeError as error:
            raise CocoaError(
                f"the index {self.place} is in use by another process;"
                " wait for it, or run a Qdrant server and give its --url"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, sqlite3.Error) as error:
            raise CocoaError(f"the index {self.place} cannot be opened ({one_line(error)})") from error

    def _ensure_collection(self) -> None:
        vectors = models.VectorParams(size=self.encoder.dimension, distance=models.Distance.COSINE)
        with self._session() as client:
            if not client.collection_exists(self.collection):
                client.create_collection(self.collection, vectors_config=vectors)
            self._check_collection(client)

    def _require_collection(self) -> None:
        remedy = "run cocoa-embed index first, or name another place"
        if self._path is not None and not self._path.is_dir():
            raise CocoaError(f"there is no index in {self.place}; {remedy}")
        with self._session() as client:
            if not client.collection_exists(self.collection):
                names = sorted(collection.name for collection in client.get_collections().collections)
                there = f"it holds {', '.join(names)}" if names else "it is empty"
                raise CocoaError(f"there is no collection {self.collection!r} in {self.place} ({there}); {remedy}")

    def _check_collection(self, client: QdrantClient) -> None:
        found = client.get_collection(self.collection).config.params.vectors
        if not isinstance(found, models.VectorParams):
            raise CocoaError(
                f"collection {self.collection!r} in {self.place} holds named vectors ({', '.join(found or {})}),"
                " not the one unnamed vector that this indexer writes; choose another collection"
            )
        dimension = self.encoder.dimension
        if found.size != dimension or found.distance != models.Distance.COSINE:
            raise CocoaError(
                f"collection {self.collection!r} in {self.place} holds vectors of {found.size} dimensions"
                f" ({found.distance.value}), {self.encoder.name} makes {dimension} (Cosine);"
                " choose another collection, or the model that it was made with"
            )

    def _stored_points(self) -> dict[str, StoredPoint]:
        """Return where every point in the collection has its file, and the words about it, by id."""
        stored: dict[str, StoredPoint] = {}
        offset = None
        while True:
            with self._session() as client:
                points, offset = client.scroll(
                    self.collection,
                    limit=SCROLL_LIMIT,
                    offset=offset,
                    with_payload=["path", "caption", "metadata"],
                    with_vectors=False,
                )
            stored.update({str(point.id): stored_point(point.payload or {}) for point in points})
            if offset is None:
                return stored


def check_collection_name(name: str) -> None:
    """Refuse a name that Qdrant refuses, or that would be a path of its own in a local store.

    :raises UsageError: If it is one.
    """
    length = len(name.encode(errors="replace"))
    if not name.strip(".") or length > MAX_COLLECTION_NAME or not name.isprintable() or set(name) & set('<>:"/\\|?*'):
        raise UsageError(
            f"{name!a} is no name for a collection; use 1 to {MAX_COLLECTION_NAME} bytes, printable, and none of"
            ' < > : " / \\ | ? *'
        )


def check_url(url: str) -> None:
    """Refuse an address that is not of the form ``http://host:port``.

    :raises UsageError: If it is one.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"{url!r} is no address of a Qdrant server; give one such as http://localhost:6333")


def stored_point(payload: dict[str, Any]) -> StoredPoint:
    """Return what an indexing run has to know of a point that is there already."""
    words = {"caption": payload.get("caption"), "metadata": payload.get("metadata") or {}}
    return StoredPoint(path=str(payload.get("path", "")), words=words)


def hit(point: models.ScoredPoint) -> Hit:
    """Return a scored point as a :class:`Hit`."""
    stored = point.payload or {}
    return Hit(id=str(point.id), score=point.score, path=str(stored.get("path", "")), payload=stored)
