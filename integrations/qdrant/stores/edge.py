"""A collection in a folder, by Qdrant Edge: the engine of a server in this process, one process at a time."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cocoa_embed.errors import CocoaError, one_line, printable, require
from cocoa_embed.folders import refuse_foreign_folder, write_atomically
from cocoa_embed.integrations.qdrant.stores.base import (
    FLOAT,
    ID_BATCH,
    INTEGER,
    KEYWORD,
    PAYLOAD_INDEXES,
    TEXT,
    Hit,
    Payload,
    Point,
    Signature,
    StoreOptions,
    batches,
    hit,
    lower_bound,
    oversampling,
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
from cocoa_embed.integrations.qdrant.stores.locks import in_use, lock_file

require("qdrant_edge", "edge")

import qdrant_edge as edge  # noqa: E402 - after the error that names the extra

from cocoa_embed.integrations.qdrant.stores.edge_filters import to_edge_filter  # noqa: E402

if TYPE_CHECKING:
    import numpy as np
    from qdrant_client import models

MARKER = ".cocoa-edge"
"""What makes a folder one of shards; locked while one is created in it."""
LOCK_FILE = ".cocoa-lock"
CONFIG_FILE = "edge_config.json"
"""The engine's own, in each shard."""
SIGNATURE_FILE = "signature.json"
SCRATCH = "creating:"
"""A shard that is not whole yet; no collection can have this name."""
SCROLL_LIMIT = 1000
RESERVE = 128 * 2**20
"""Bytes that have to be free on the disk before the engine is let write: where its mapped files find no room, the
kernel ends the whole process. An empty shard is 200 MB of holes, 100 of which some file systems fill."""
FLUSH_SECONDS = 5.0
"""Between two flushes, as in a server. The engine's log keeps what a kill would lose; a flush is for power failures,
takes up to a second on a busy disk, and lets no other thread of the process run meanwhile."""
READING_RESERVE = 32 * 2**20
"""Bytes that have to be free before a shard is opened."""
ROOM = 4
"""Times the bytes of points that the engine may take for them: log, payloads, vectors, indexes."""


class EdgeStore:
    """A shard of its own in a folder of shards, which is made whole before it has its name."""

    parallel = 1

    def __init__(self, folder: Path, collection: str, options: StoreOptions) -> None:
        """Name a folder of shards and one in it; nothing is opened or created yet."""
        self.place = printable(folder)
        self.collection = collection
        self.options = options
        self._folder = folder
        self._shard_folder = folder / collection
        self._shard: edge.EdgeShard | None = None
        self._dimension: int | None = None
        self._lock_handle: IO[str] | None = None
        self._closing: weakref.finalize | None = None
        self._flushed = 0.0
        self._lock = threading.RLock()

    def collections(self) -> list[str] | None:
        """Return the names of the collections, sorted; None if there is no such folder."""
        with self._files():
            if not self._folder.is_dir():
                return None
            names = (file.parent.name for file in self._folder.glob(f"*/{CONFIG_FILE}"))
            return sorted(name for name in names if name != SCRATCH)

    def signature(self) -> Signature | None:
        """Return what the collection says of its model, or None if there is no such collection."""
        with self._files():
            if not (self._shard_folder / CONFIG_FILE).exists():
                self._refuse_foreign_folders()
                return None
            vectors = read_json(self._shard_folder / CONFIG_FILE).get("vectors", {})
            params = vectors.get("", {})
            distance = "several a point" if params.get("multivector_config") else params.get("distance", "")
            check_vectors(self, list(vectors), size=params.get("size", 0), distance=distance)
            self._dimension = int(params["size"])
            signature_file = self._shard_folder / SIGNATURE_FILE
            fields = read_json(signature_file) if signature_file.exists() else None
        return read_signature(fields, self._dimension)

    def create(self, signature: Signature) -> None:
        """Create the collection with its payload indexes, and the folder if needed."""
        with self._files():
            self._refuse_foreign_folders()
            self._folder.mkdir(parents=True, exist_ok=True)
            with lock_file(self._folder / MARKER, self.place):
                if (self._shard_folder / CONFIG_FILE).exists():
                    self.sign(signature)
                    return
                self._require_room(RESERVE)
                self._build(self._folder / SCRATCH, signature)
                os.replace(self._folder / SCRATCH, self._shard_folder)
        self._dimension = signature.dimension

    def sign(self, signature: Signature) -> None:
        """Write the signature into a collection that has none."""
        check_may_sign(self, self.signature(), signature)
        with self._files():
            write_atomically(self._shard_folder / SIGNATURE_FILE, json.dumps(signature_fields(signature)))

    def scan(self, keys: Sequence[str]) -> Iterator[tuple[str, Payload]]:
        """Yield the id of every point with those fields of its payload that it has, page by page."""
        offset = None
        while True:
            request = edge.ScrollRequest(
                limit=SCROLL_LIMIT, offset=offset, with_payload=list(keys) or False, with_vector=False
            )
            with self._engine() as shard:
                records, offset = shard.scroll(request)
            yield from ((str(record.id), record.payload or {}) for record in records)
            if offset is None:
                return

    def retrieve(self, ids: Sequence[str]) -> dict[str, Payload]:
        """Return the payloads of points by id; those that are not there are missing."""
        found: dict[str, Payload] = {}
        for some in batches([point_key(id_) for id_ in ids], ID_BATCH):
            with self._engine() as shard:
                records = shard.retrieve(list(some), True, False)
            found.update({str(record.id): record.payload or {} for record in records})
        return found

    def count(self) -> int:
        """Return the number of points."""
        with self._engine() as shard:
            return shard.count(edge.CountRequest(exact=True))

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, and wait until they are in the engine's log."""
        # The engine, unlike a server, takes vectors that are not finite, and half of a batch with a wrong dimension.
        sizes = check_points(points, self._required_dimension())
        if points:
            structs = [edge.Point(point.id, point.vector.tolist(), point.payload) for point in points]
            self._update(edge.UpdateOperation.upsert_points(structs), sum(sizes))

    def overwrite_payload(self, id_: str, payload: Payload) -> None:
        """Give a stored point another payload, and wait until it has it."""
        size = payload_size(f"point {id_}", payload)
        self._update(edge.UpdateOperation.overwrite_payload([point_key(id_)], payload), size)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove points, and wait until they are gone."""
        for some in batches([point_key(id_) for id_ in ids], ID_BATCH):
            self._update(edge.UpdateOperation.delete_points(list(some)), 100 * len(some))

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
        quantization = edge.QuantizationSearchParams(rescore=True, oversampling=oversampling(limit + offset))
        request = edge.QueryRequest(
            limit=limit,
            offset=offset,
            query=edge.Query.Nearest(query_values(vector, self._required_dimension())),
            filter=None if query_filter is None else to_edge_filter(query_filter),
            score_threshold=lower_bound(score_threshold),
            params=edge.SearchParams(quantization=quantization),
            with_payload=True,
        )
        with self._engine() as shard:
            return [hit(point.id, point.score, point.payload) for point in shard.query(request)]

    def finish(self) -> None:
        """Build the search index. What was stored can be found without it, but slower the more there is.

        Every other thread of the process stands still meanwhile.

        :raises CocoaError: If there is no room on the disk to do so.
        """
        with self._engine(writes=True) as shard:
            info = shard.info()
            if info.indexed_vectors_count < info.points_count:
                # Segments are written anew beside the old ones, which go at the next flush.
                self._require_room(RESERVE + allocated_bytes(self._shard_folder / "segments"))
            shard.optimize()
            shard.flush()

    def close(self) -> None:
        """Close the shard and release its folder."""
        with self._lock:
            closing, self._closing, self._shard = self._closing, None, None
            try:
                if closing is not None:
                    with self._files():
                        closing()
            finally:
                if self._lock_handle is not None:
                    self._lock_handle.close()
                    self._lock_handle = None

    def _build(self, scratch: Path, signature: Signature) -> None:
        """Make a whole shard in a folder that has another's place until it is."""
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        shard = edge.EdgeShard.create(str(scratch), shard_config(signature.dimension, self.options))
        for field, kind in PAYLOAD_INDEXES.items():
            shard.update(edge.UpdateOperation.create_field_index(field, FIELD_INDEXES[kind]))
        flush_and_close(shard)
        write_atomically(scratch / SIGNATURE_FILE, json.dumps(signature_fields(signature)))

    def _update(self, operation: edge.UpdateOperation, size: int) -> None:
        with self._engine(writes=True) as shard:
            self._require_room(RESERVE + ROOM * size)
            shard.update(operation)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                shard.flush()
                self._flushed = time.monotonic()

    def _required_dimension(self) -> int:
        if self._dimension is None and self.signature() is None:
            raise self._missing()
        assert self._dimension is not None
        return self._dimension

    def _missing(self) -> CocoaError:
        return CocoaError(
            f"there is no collection {self.collection!r} in {self.place}; run cocoa-embed index first, or name another"
            " place"
        )

    def _refuse_foreign_folders(self) -> None:
        """Refuse to create a shard among what is something else.

        :raises CocoaError: If the folder of shards or the shard's holds it.
        """
        refuse_foreign_folder(self._folder, marker=MARKER)
        refuse_foreign_folder(self._shard_folder, marker=CONFIG_FILE)

    def _require_room(self, needed: int) -> None:
        """Check that the disk has so many free bytes.

        :raises CocoaError: If it has not.
        """
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise CocoaError(
                f"the disk of {self.place} is full: {free // 2**20} MiB are free, Qdrant Edge needs"
                f" {-(-needed // 2**20)} MiB to go on; what was stored so far is safe"
            )

    @contextmanager
    def _engine(self, *, writes: bool = False) -> Iterator[edge.EdgeShard]:
        """Lend the open shard to one thread at a time.

        :raises CocoaError: If it cannot be opened, or does not do what it is asked.
        """
        with self._lock, self._files():
            shard = self._open()
            try:
                yield shard
            except BaseException:
                if writes:
                    # What is in memory may not be what the log says; loading it again brings them together.
                    with suppress(CocoaError):
                        self.close()
                raise

    @contextmanager
    def _files(self) -> Iterator[None]:
        """Turn what the file system and the engine raise into what people read."""
        try:
            yield
        except CocoaError:
            raise
        except OSError as error:
            raise CocoaError(f"the index {self.place} cannot be used ({one_line(error)})") from error
        except Exception as error:  # the engine raises nothing that is more exact
            if "WouldBlock" in str(error):
                raise in_use(self.place) from error
            raise CocoaError(f"Qdrant Edge at {self.place} did not do what was asked: {one_line(error)}") from error

    def _open(self) -> edge.EdgeShard:
        if self._shard is None:
            if not (self._shard_folder / CONFIG_FILE).exists():
                raise self._missing()
            self._lock_handle = lock_file(self._shard_folder / LOCK_FILE, self.place)
            try:
                self._require_room(READING_RESERVE)
                self._shard = edge.EdgeShard.load(str(self._shard_folder))
            except BaseException:
                self.close()
                raise
            self._flushed = time.monotonic()
            self._closing = weakref.finalize(self, flush_and_close, self._shard)
        return self._shard


FIELD_INDEXES: dict[str, Any] = {
    KEYWORD: edge.PayloadSchemaType.Keyword,
    INTEGER: edge.PayloadSchemaType.Integer,
    FLOAT: edge.PayloadSchemaType.Float,
    TEXT: edge.TextIndexParams(tokenizer=edge.TokenizerType.Word, lowercase=True, phrase_matching=True),
}


def flush_and_close(shard: edge.EdgeShard) -> None:
    """Write out what a shard has in memory, and release it."""
    shard.flush()
    shard.close()


def shard_config(dimension: int, options: StoreOptions) -> edge.EdgeConfig:
    """Return how a new shard keeps its vectors."""
    quantization: Any = None
    if options.quantization == "scalar":
        quantization = edge.ScalarQuantizationConfig(
            type=edge.ScalarType.Int8, quantile=0.99, memory=edge.Memory.Pinned
        )
    elif options.quantization == "binary":
        quantization = edge.BinaryQuantizationConfig(memory=edge.Memory.Pinned)
    vectors = edge.EdgeVectorParams(
        size=dimension,
        distance=edge.Distance.Cosine,
        memory=edge.Memory.Cold if options.on_disk else None,
        quantization_config=quantization,
    )
    return edge.EdgeConfig(vectors=vectors)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    :raises CocoaError: If it holds anything else.
    :raises OSError: If it cannot be read.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CocoaError(f"{printable(file)} is not JSON ({one_line(error)}); the index cannot be opened") from error
    if not isinstance(value, dict):
        raise CocoaError(f"{printable(file)} holds no JSON object; the index cannot be opened")
    return value


def allocated_bytes(folder: Path) -> int:
    """Return the bytes on the disk that the files below a folder take: those mapped ahead take none yet."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
