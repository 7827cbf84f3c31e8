"""A collection in a folder, in Qdrant Edge: a server's engine in this process, one process at a time."""

from __future__ import annotations

import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import Timeout

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable, require
from cocoa_embed.folders import write_atomically
from cocoa_embed.integrations.qdrant.stores import base
from cocoa_embed.integrations.qdrant.stores.base import Point, Query, Replacement, Signature
from cocoa_embed.integrations.qdrant.stores.foreign import EDGE_COLLECTION, EDGE_MARKER, refuse_foreign_index
from cocoa_embed.integrations.qdrant.stores.locks import folder_lock, in_use
from cocoa_embed.integrations.qdrant.stores.options import TURBO_BITS, StoreOptions
from cocoa_embed.integrations.qdrant.stores.store import Store

require("qdrant_edge", "edge")

import qdrant_edge as edge  # noqa: E402 - after the error that names the extra

from cocoa_embed.integrations.qdrant.stores.edge_filters import to_edge_filter  # noqa: E402

if TYPE_CHECKING:
    from qdrant_client import models

Answer = TypeVar("Answer")

LOCK_FILE = ".cocoa-lock"
SIGNATURE_FILE = "signature.json"
SNAPSHOT_FILE = "snapshot.tar"
SCRATCH = "creating:"
"""An unfinished shard; no collection can have this name."""
RESERVE = 128 * 2**20
"""Free bytes that the disk must have before a write: if the engine's mapped files find no room, the kernel kills the
process. An empty shard is 200 MB of sparse files, of which some file systems allocate 100 MB."""
READING_RESERVE = 32 * 2**20
"""Free bytes that the disk must have before a shard is opened."""
BYTES_PER_BYTE = 4
"""Bytes that the engine may take for each byte of a point: log, payload, vector, indexes."""
FLUSH_SECONDS = 5.0
"""The time between two flushes, as in a server. The engine's log survives a kill; a flush is for power failures, takes
up to a second on a busy disk and blocks all threads."""


def open_collection(folder: str | Path, collection: str, options: StoreOptions) -> EdgeStore:
    """Return a collection in a folder of shards; nothing is opened or created yet."""
    options.refuse("Qdrant Edge", ("prefer_grpc", "shards", "replicas"), "the url of a server")
    return EdgeStore(Path(folder), collection, options)


class EdgeStore(Store):
    """A shard in a folder of shards; it gets its name when it is complete."""

    def __init__(self, folder: Path, collection: str, options: StoreOptions) -> None:
        """Name a folder and a shard."""
        self._folder = folder.absolute()  # it is opened later, maybe in another working folder
        super().__init__(printable(folder), collection, options, str(self._folder))
        self._shard_folder = self._folder / collection
        self._last_flush = 0.0

    def collections(self) -> list[str]:
        """Return the names of all collections in this place."""
        return sorted(
            file.parent.name for file in self._folder.glob(f"*/{EDGE_COLLECTION}") if file.parent.name != SCRATCH
        )

    def create_payload_index(self, field: str, kind: str) -> None:
        """Create an index for filters on a field, unless there is one."""
        operation = edge.UpdateOperation.create_field_index(field, payload_schema(kind))
        if field not in self._call(lambda shard: shard.info()).payload_schema:
            self._update(operation, 0)

    def signature(self) -> Signature | None:
        """Return the signature of the collection, or None if there is no such collection."""
        with self._readable_errors():
            if not self._exists():
                self._refuse_foreign_folders()
                return None
            named = read_json(self._shard_folder / EDGE_COLLECTION).get("vectors", {})
            cosine = [each for each in named.values() if each.get("distance") == "Cosine"]
            sizes = {each["size"] for each in cosine if not each.get("multivector_config")}
            file = self._shard_folder / SIGNATURE_FILE
            self._signed = self._read_signature(read_json(file) if file.exists() else None, named, sizes)
            return self._signed

    def create(self, signature: Signature, snapshot: Callable[[Path], object] | None = None) -> None:
        """Create the collection with its signature, or sign an existing one without a signature.

        :param snapshot: Writes the snapshot of a server's shard, from which a new collection is made, to a file.
        """
        with self._readable_errors():
            self._refuse_foreign_folders()
            self._folder.mkdir(parents=True, exist_ok=True)
            with folder_lock(self._folder / EDGE_MARKER):
                found = self.signature()
                if found is not None and snapshot is not None:
                    raise UsageError(f"{self.name} exists already; give another collection, or another folder")
                if found is not None:
                    if self._needs_signature(found, signature):
                        write_atomically(self._shard_folder / SIGNATURE_FILE, json.dumps(asdict(signature)))
                else:
                    self._require_room(RESERVE)
                    self._build(self._folder / SCRATCH, signature, snapshot)
                    os.replace(self._folder / SCRATCH, self._shard_folder)
        self._signed = signature

    def count(self, condition: models.Filter | None = None) -> int:
        """Return the number of points."""
        return self._call(lambda shard: shard.count(edge.CountRequest(exact=True, filter=to_edge_filter(condition))))

    def finish(self) -> None:
        """Build the search index, without which a search takes longer the more points there are.

        Every other thread of the process is blocked meanwhile.

        :raises CocoaError: If the disk has no room for it.
        """

        def optimize(shard: edge.EdgeShard) -> None:
            info = shard.info()
            if info.indexed_vectors_count < info.points_count:
                # Segments are rewritten next to the old ones, which the next flush deletes; mapped files are sparse.
                files = filter(Path.is_file, self._shard_folder.glob("segments/**/*"))
                self._require_room(RESERVE + sum(file.stat().st_blocks * 512 for file in files))
            shard.optimize()
            shard.flush()

        self._call(optimize)

    def close(self) -> None:
        """Close the shard and release its folder."""
        with self._readable_errors():
            super().close()

    def _scroll(self, condition: models.Filter | None, *, with_vectors: bool, **page: Any) -> tuple[Sequence[Any], Any]:
        request = edge.ScrollRequest(filter=to_edge_filter(condition), with_vector=with_vectors, **page)
        return self._call(lambda shard: shard.scroll(request))

    def _retrieve(self, ids: Sequence[str]) -> Sequence[Any]:
        return self._call(lambda shard: shard.retrieve(list(ids), True, False))

    def _insert(self, points: Sequence[Point], sizes: Sequence[int]) -> None:
        structs = [edge.Point(point.id, point.vectors(self.embed), point.payload) for point in points]
        operation = edge.UpdateOperation.upsert_points(structs, update_mode=edge.UpdateMode.InsertOnly)
        self._update(operation, sum(sizes))

    def _replace(self, replacements: Sequence[Replacement]) -> None:
        # The lock on the folder keeps other writers out: there is no revision to check.
        for id_, _, payload, size, vector in replacements:
            if vector is not None and vector.values is None:
                self._update(edge.UpdateOperation.delete_vectors([id_], [vector.name]), 0)
            elif vector is not None:
                vectors = [edge.PointVectors(id_, vector.named)]
                self._update(edge.UpdateOperation.update_vectors(vectors), size)
            operation = (
                edge.UpdateOperation.delete_points([id_])
                if payload is None
                else edge.UpdateOperation.overwrite_payload([id_], payload)
            )
            self._update(operation, size)

    def _search(self, queries: Sequence[Query]) -> Sequence[Sequence[Any]]:
        batch = edge.QueryBatchRequest([query_request(query, self.embed == base.BOTH) for query in queries])
        return self._call(lambda shard: shard.query_batch(batch))

    def _exists(self) -> bool:
        return (self._shard_folder / EDGE_COLLECTION).exists()

    def _build(self, scratch: Path, signature: Signature, snapshot: Callable[[Path], object] | None) -> None:
        """Create a complete shard in a scratch folder."""
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        if snapshot is None:
            shard = edge.EdgeShard.create(str(scratch), shard_config(signature, self.options))
        else:
            snapshot(scratch / SNAPSHOT_FILE)
            edge.EdgeShard.unpack_snapshot(str(scratch / SNAPSHOT_FILE), str(scratch))
            (scratch / SNAPSHOT_FILE).unlink()
            shard = edge.EdgeShard.load(str(scratch))
        there = shard.info().payload_schema
        for key, kind in self.options.payload_indexes().items():
            if key not in there:
                shard.update(edge.UpdateOperation.create_field_index(key, payload_schema(kind)))
        flush_and_close(shard)
        write_atomically(scratch / SIGNATURE_FILE, json.dumps(asdict(signature)))

    def _update(self, operation: edge.UpdateOperation, size: int) -> None:
        def update(shard: edge.EdgeShard) -> None:
            self._require_room(RESERVE + BYTES_PER_BYTE * size)
            shard.update(operation)
            if time.monotonic() - self._last_flush > FLUSH_SECONDS:
                shard.flush()
                self._last_flush = time.monotonic()

        self._call(update)

    def _refuse_foreign_folders(self) -> None:
        """Refuse to look for or create a shard in a folder that holds something else.

        :raises CocoaError: If the folder of shards or the shard's own does.
        """
        refuse_foreign_index(self._folder, markers=(EDGE_MARKER,))
        refuse_foreign_index(self._shard_folder, markers=(EDGE_COLLECTION,))

    def _require_room(self, needed: int) -> None:
        """Check that the disk has ``needed`` free bytes.

        :raises CocoaError: If it has not.
        """
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise CocoaError(
                f"the disk of {self.location} is full: {free // 2**20} MiB are free, but Qdrant Edge needs"
                f" {-(-needed // 2**20)} MiB; what was stored so far is safe"
            )

    def _call(self, call: Callable[[edge.EdgeShard], Answer]) -> Answer:
        """Return the result of a call of the open shard, which only one thread uses at a time.

        :raises CocoaError: If it cannot be opened or fails.
        """
        with self._lock, self._readable_errors():
            shard = self._open()
            try:
                return call(shard)
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
        except Timeout as error:
            raise in_use(self.location) from error
        except OSError as error:
            raise CocoaError(f"the index {self.location} cannot be used ({one_line(error)})") from error
        except Exception as error:  # the engine raises nothing more specific
            if "WouldBlock" in str(error):
                raise in_use(self.location) from error
            raise CocoaError(f"Qdrant Edge at {self.location} failed: {one_line(error)}") from error

    def _open(self) -> edge.EdgeShard:
        if self._opened is None:
            if not self._exists():
                self._refuse_foreign_folders()
                raise self._no_collection()
            with ExitStack() as stack:
                stack.enter_context(folder_lock(self._shard_folder / LOCK_FILE))
                self._require_room(READING_RESERVE)
                shard = edge.EdgeShard.load(str(self._shard_folder))
                stack.callback(flush_and_close, shard)
                self._opened, self._closing = shard, weakref.finalize(self, stack.pop_all().close)
            self._last_flush = time.monotonic()
        return self._opened


RRF_K = 2
"""The constant of Reciprocal Rank Fusion, as in a server and in the local mode."""
HNSW_DEFAULTS = (16, 100, 10_000)
"""The engine's defaults: edges, candidates while building, and the KB below which there is no graph."""
TEXT_INDEX = edge.TextIndexParams(tokenizer=edge.TokenizerType.Word, lowercase=True, phrase_matching=True)


def query_request(query: Query, is_fused: bool) -> edge.QueryRequest:
    """Return a query for the engine: of one vector, or of two whose hits are fused.

    Diversity chooses among the best of both, by the vector of the image.
    """
    if not is_fused:
        search = nearest(query, base.ALL_VECTORS if query.vectors > 1 else None)
        if query.vectors > 1 and not query.exact:
            search["prefetches"] = [edge.Prefetch(**nearest(query.of_first_vector, None))]
        return edge.QueryRequest(**search, offset=query.offset, with_payload=True)
    names = (base.IMAGE_VECTOR, base.CAPTION_VECTOR)
    each = [edge.Prefetch(**nearest(query.of_each_vector, name)) for name in names]
    fused: dict[str, Any] = {"prefetches": each, "query": edge.Fusion.Rrf(RRF_K)}
    if query.diversity is not None:
        best = edge.Prefetch(**fused, limit=query.candidates)
        fused = {"prefetches": [best], "query": nearest(query, base.IMAGE_VECTOR)["query"]}
    return edge.QueryRequest(**fused, limit=query.limit, offset=query.offset, with_payload=True)


def nearest(query: Query, name: str | None) -> dict[str, Any]:
    """Return the search of one vector."""
    vector = query.vector.tolist()
    rescored: dict[str, Any] = {"rescore": True, "oversampling": base.oversampling(query.limit + query.offset)}
    quantization = edge.QuantizationSearchParams(**({"ignore": True} if query.exact else rescored))
    return {
        "limit": query.limit,
        "query": edge.Query.Nearest(vector, name)
        if query.diversity is None
        else edge.Mmr(vector, 1 - query.diversity, query.candidates, name),
        "filter": to_edge_filter(query.filter),
        "score_threshold": query.score_threshold,
        "params": edge.SearchParams(hnsw_ef=query.hnsw_ef, exact=query.exact, quantization=quantization),
    }


def payload_schema(kind: str) -> Any:  # noqa: ANN401
    """Return the engine's name for a type of payload index."""
    if kind == base.TENANT:
        return edge.KeywordIndexParams(is_tenant=True)
    return TEXT_INDEX if kind == base.TEXT else getattr(edge.PayloadSchemaType, kind.capitalize())


def flush_and_close(shard: edge.EdgeShard) -> None:
    """Write a shard's memory to disk and release it."""
    shard.flush()
    shard.close()


def shard_config(signature: Signature, options: StoreOptions) -> edge.EdgeConfig:
    """Return the settings of a new shard."""
    pinned = edge.Memory.Pinned
    quantization: dict[str | None, Any] = {
        "scalar": edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, quantile=0.99, memory=pinned),
        "binary": edge.BinaryQuantizationConfig(memory=pinned),
    }
    for kind, bits in TURBO_BITS.items():
        size = getattr(edge.TurboQuantBitSize, f"Bits{bits}")
        quantization[kind] = edge.TurboQuantQuantizationConfig(bits=size, memory=pinned)
    kept: dict[str, Any] = {
        "size": signature.dimension,
        "distance": edge.Distance.Cosine,
        "datatype": options.vectors and getattr(edge.VectorStorageDatatype, options.vectors.capitalize()),
        "memory": options.memory and getattr(edge.Memory, options.memory.capitalize()),
    }
    vectors = edge.EdgeVectorParams(
        **kept,
        quantization_config=quantization.get(options.quantization),
        hnsw_config=options.graph
        and edge.HnswIndexConfig(*HNSW_DEFAULTS, memory=getattr(edge.Memory, options.graph.capitalize())),
    )
    named = {base.IMAGE_VECTOR: vectors, base.CAPTION_VECTOR: vectors}
    if signature.vectors > 1:  # only the first is searched, and only the first has a graph and is quantized
        comparator = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
        several = edge.EdgeVectorParams(
            **kept, multivector_config=comparator, hnsw_config=edge.HnswIndexConfig(0, *HNSW_DEFAULTS[1:])
        )
        named = {"": vectors, base.ALL_VECTORS: several}
    is_one = signature.embed != base.BOTH and signature.vectors == 1
    return edge.EdgeConfig(vectors=vectors if is_one else named)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    :raises CocoaError: If it holds anything else.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CocoaError(f"{printable(file)} does not hold a JSON object; the index cannot be opened") from error
