"""A collection in a folder, in Qdrant Edge: a server's engine in this process, one process at a time."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from cocoa_embed.errors import CocoaError, one_line, printable, require
from cocoa_embed.folders import refuse_foreign_folder, write_atomically
from cocoa_embed.integrations.qdrant.stores import base, checks
from cocoa_embed.integrations.qdrant.stores.base import Hit, Payload, Point, Query, Signature, StoreOptions
from cocoa_embed.integrations.qdrant.stores.locks import in_use, lock_file

require("qdrant_edge", "edge")

import qdrant_edge as edge  # noqa: E402 - after the error that names the extra

from cocoa_embed.integrations.qdrant.stores.edge_filters import to_edge_filter  # noqa: E402

MARKER = ".cocoa-edge"
"""Marks a folder of shards; locked while a shard is created in it."""
LOCK_FILE = ".cocoa-lock"
CONFIG_FILE = "edge_config.json"
"""The engine's own file in each shard."""
SIGNATURE_FILE = "signature.json"
SCRATCH = "creating:"
"""An unfinished shard; no collection can have this name."""
SCROLL_LIMIT = 1000
RESERVE = 128 * 2**20
"""Free bytes that the disk must have before a write: where the engine's mapped files find no room, the kernel kills the
process. An empty shard is 200 MB of holes, 100 MB of which some file systems fill."""
READING_RESERVE = 32 * 2**20
"""Free bytes that the disk must have before a shard is opened."""
BYTES_PER_BYTE = 4
"""Bytes that the engine may take for each byte of a point: log, payload, vector, indexes."""
FLUSH_SECONDS = 5.0
"""Between two flushes, as in a server. The engine's log survives a kill; a flush is for power failures, takes up to a
second on a busy disk and blocks all threads."""


def open_collection(folder: str | Path, collection: str, options: StoreOptions) -> EdgeStore:
    """Return a collection in a folder of shards; nothing is opened or created yet."""
    return EdgeStore(Path(folder), collection, options)


class EdgeStore:
    """A shard in a folder of shards; it gets its name when it is complete."""

    parallel = 1

    def __init__(self, folder: Path, collection: str, options: StoreOptions) -> None:
        """Name a folder and a shard; nothing is opened or created yet."""
        self.location = printable(folder)
        self.collection = collection
        self.options = options
        self._folder = folder
        self._shard_folder = folder / collection
        self._shard: edge.EdgeShard | None = None
        self._dimension: int | None = None
        self._file_lock: FileLock | None = None
        self._closing: weakref.finalize | None = None
        self._last_flush = 0.0
        self._lock = threading.RLock()

    def collections(self) -> list[str] | None:
        """Return the names of all collections, sorted; None if there is no such folder."""
        with self._readable_errors():
            if not self._folder.is_dir():
                return None
            names = (file.parent.name for file in self._folder.glob(f"*/{CONFIG_FILE}"))
            return sorted(name for name in names if name != SCRATCH)

    def signature(self) -> Signature | None:
        """Return the signature of the collection, or None if there is no such collection."""
        with self._readable_errors():
            if not self._exists():
                self._refuse_foreign_folders()
                return None
            vectors = read_json(self._shard_folder / CONFIG_FILE).get("vectors", {})
            if list(vectors) != [""]:
                raise checks.other_vectors(self, f"named vectors ({', '.join(vectors)})")
            size, distance = int(vectors[""]["size"]), vectors[""]["distance"]
            if distance != "Cosine" or vectors[""].get("multivector_config"):
                raise checks.other_vectors(self, f"vectors of {size} dimensions ({distance})")
            self._dimension = size
            file = self._shard_folder / SIGNATURE_FILE
            return base.read_signature(read_json(file) if file.exists() else None, self._dimension)

    def create(self, signature: Signature) -> None:
        """Create the collection with its signature, or sign an existing one without a signature."""
        with self._readable_errors():
            self._refuse_foreign_folders()
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = lock_file(self._folder / MARKER, self.location)
            try:
                found = self.signature()
                if found is not None:
                    checks.check_may_sign(self, found, signature)
                    write_signature(self._shard_folder, signature)
                else:
                    self._require_room(RESERVE)
                    self._build(self._folder / SCRATCH, signature)
                    os.replace(self._folder / SCRATCH, self._shard_folder)
            finally:
                lock.release()
        self._dimension = signature.dimension

    def scan(self, keys: Sequence[str]) -> Iterator[tuple[str, Payload]]:
        """Yield the id of every point and, of ``keys``, those that its payload has."""
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
        """Return the payloads of points by id; ids that do not exist are left out."""
        with self._engine() as shard:
            records = shard.retrieve(list(ids), True, False)
        return {str(record.id): record.payload or {} for record in records}

    def count(self) -> int:
        """Return the number of points."""
        with self._engine() as shard:
            return shard.count(edge.CountRequest(exact=True))

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points and wait until they are in the engine's log."""
        # The engine, unlike a server, takes vectors that are not finite, and half of a batch with a wrong dimension.
        sizes = checks.check_points(points, self._required_dimension())
        if points:
            structs = [edge.Point(point.id, point.vector.tolist(), point.payload) for point in points]
            self._update(edge.UpdateOperation.upsert_points(structs), sum(sizes))

    def overwrite_payload(self, id_: str, payload: Payload) -> None:
        """Replace the payload of a stored point and wait until it is stored."""
        size = checks.payload_size(f"point {id_}", payload)
        self._update(edge.UpdateOperation.overwrite_payload([id_], payload), size)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete points and wait until they are deleted."""
        self._update(edge.UpdateOperation.delete_points(list(ids)), 100 * len(ids))

    def search(self, query: Query) -> list[Hit]:
        """Return the points nearest to the query's vector by cosine, best first."""
        oversampling = base.oversampling(query.limit + query.offset)
        quantization = edge.QuantizationSearchParams(rescore=True, oversampling=oversampling)
        request = edge.QueryRequest(
            limit=query.limit,
            offset=query.offset,
            query=edge.Query.Nearest(checks.query_values(query, self._required_dimension())),
            filter=None if query.filter is None else to_edge_filter(query.filter),
            score_threshold=base.lower_bound(query.score_threshold),
            params=edge.SearchParams(quantization=quantization),
            with_payload=True,
        )
        with self._engine() as shard:
            return [base.make_hit(point.id, point.score, point.payload) for point in shard.query(request)]

    def finish(self) -> None:
        """Build the search index, without which a search takes longer the more points there are.

        Every other thread of the process is blocked meanwhile.

        :raises CocoaError: If the disk has no room for it.
        """
        with self._engine() as shard:
            info = shard.info()
            if info.indexed_vectors_count < info.points_count:
                # Segments are rewritten beside the old ones, which the next flush deletes.
                self._require_room(RESERVE + allocated_bytes(self._shard_folder / "segments"))
            shard.optimize()
            shard.flush()

    def close(self) -> None:
        """Close the shard and release its folder."""
        with self._lock:
            closing, self._closing, self._shard = self._closing, None, None
            try:
                if closing is not None:
                    with self._readable_errors():
                        closing()
            finally:
                if self._file_lock is not None:
                    self._file_lock.release()
                    self._file_lock = None

    def _exists(self) -> bool:
        return (self._shard_folder / CONFIG_FILE).exists()

    def _build(self, scratch: Path, signature: Signature) -> None:
        """Create a complete shard in a scratch folder."""
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        shard = edge.EdgeShard.create(str(scratch), shard_config(signature.dimension, self.options))
        for key, kind in base.PAYLOAD_INDEXES.items():
            shard.update(edge.UpdateOperation.create_field_index(key, FIELD_INDEXES[kind]))
        flush_and_close(shard)
        write_signature(scratch, signature)

    def _update(self, operation: edge.UpdateOperation, size: int) -> None:
        with self._engine() as shard:
            self._require_room(RESERVE + BYTES_PER_BYTE * size)
            shard.update(operation)
            if time.monotonic() - self._last_flush > FLUSH_SECONDS:
                shard.flush()
                self._last_flush = time.monotonic()

    def _required_dimension(self) -> int:
        if self._dimension is None and self.signature() is None:
            raise base.no_collection(self)
        assert self._dimension is not None
        return self._dimension

    def _refuse_foreign_folders(self) -> None:
        """Refuse to create a shard in a folder that holds something else.

        :raises CocoaError: If the folder of shards or the shard's own does.
        """
        refuse_foreign_folder(self._folder, marker=MARKER)
        refuse_foreign_folder(self._shard_folder, marker=CONFIG_FILE)

    def _require_room(self, needed: int) -> None:
        """Check that the disk has ``needed`` free bytes.

        :raises CocoaError: If it has not.
        """
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise CocoaError(
                f"the disk of {self.location} is full: {free // 2**20} MiB are free, Qdrant Edge needs"
                f" {-(-needed // 2**20)} MiB; what was stored so far is safe"
            )

    @contextmanager
    def _engine(self) -> Iterator[edge.EdgeShard]:
        """Give the open shard to one thread at a time.

        :raises CocoaError: If it cannot be opened or fails.
        """
        with self._lock, self._readable_errors():
            shard = self._open()
            try:
                yield shard
            except BaseException:
                # Memory and log may differ after a failed write; the next use loads the log.
                with suppress(CocoaError):
                    self.close()
                raise

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        """Turn errors of the file system and of the engine into ``CocoaError``."""
        try:
            yield
        except CocoaError:
            raise
        except OSError as error:
            raise CocoaError(f"the index {self.location} cannot be used ({one_line(error)})") from error
        except Exception as error:  # the engine raises nothing more specific
            if "WouldBlock" in str(error):
                raise in_use(self.location) from error
            raise CocoaError(f"Qdrant Edge at {self.location} failed: {one_line(error)}") from error

    def _open(self) -> edge.EdgeShard:
        if self._shard is None:
            if not self._exists():
                raise base.no_collection(self)
            self._file_lock = lock_file(self._shard_folder / LOCK_FILE, self.location)
            try:
                self._require_room(READING_RESERVE)
                self._shard = edge.EdgeShard.load(str(self._shard_folder))
            except BaseException:
                self.close()
                raise
            self._last_flush = time.monotonic()
            self._closing = weakref.finalize(self, flush_and_close, self._shard)
        return self._shard


FIELD_INDEXES: dict[str, Any] = {
    base.KEYWORD: edge.PayloadSchemaType.Keyword,
    base.INTEGER: edge.PayloadSchemaType.Integer,
    base.FLOAT: edge.PayloadSchemaType.Float,
    base.TEXT: edge.TextIndexParams(tokenizer=edge.TokenizerType.Word, lowercase=True, phrase_matching=True),
}


def flush_and_close(shard: edge.EdgeShard) -> None:
    """Write a shard's memory to disk and release it."""
    shard.flush()
    shard.close()


def shard_config(dimension: int, options: StoreOptions) -> edge.EdgeConfig:
    """Return how a new shard keeps its vectors."""
    in_memory = edge.Memory.Pinned
    quantization: dict[str | None, Any] = {
        "scalar": edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, quantile=0.99, memory=in_memory),
        "binary": edge.BinaryQuantizationConfig(memory=in_memory),
    }
    vectors = edge.EdgeVectorParams(
        size=dimension,
        distance=edge.Distance.Cosine,
        memory=edge.Memory.Cold if options.on_disk else None,
        quantization_config=quantization.get(options.quantization),
    )
    return edge.EdgeConfig(vectors=vectors)


def write_signature(shard_folder: Path, signature: Signature) -> None:
    """Write the signature of a shard atomically.

    :raises OSError: If it cannot be written.
    """
    write_atomically(shard_folder / SIGNATURE_FILE, json.dumps(asdict(signature)))


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    :raises CocoaError: If it holds anything else.
    :raises OSError: If it cannot be read.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CocoaError(f"{printable(file)} holds no JSON object; the index cannot be opened")
    return value


def allocated_bytes(folder: Path) -> int:
    """Return the bytes on disk of the files below a folder, without the holes in mapped files."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
