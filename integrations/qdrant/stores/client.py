"""A collection accessed through a qdrant-client; the local store and the server build on it."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from cocoa_embed.errors import CocoaError, UsageError, one_line, require
from cocoa_embed.integrations.qdrant.points import REVISION
from cocoa_embed.integrations.qdrant.stores import base
from cocoa_embed.integrations.qdrant.stores.base import Point, Query, Replacement, Signature
from cocoa_embed.integrations.qdrant.stores.checks import check_collection_name
from cocoa_embed.integrations.qdrant.stores.options import TURBO_BITS, StoreOptions
from cocoa_embed.integrations.qdrant.stores.store import Store

require("qdrant_client", "qdrant")

from grpc import Call, RpcError  # noqa: E402 - after the error that names the extra
from qdrant_client import QdrantClient, models  # noqa: E402
from qdrant_client.common.client_exceptions import QdrantException  # noqa: E402
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse  # noqa: E402

Answer = TypeVar("Answer")

SIGNATURE_KEY = "cocoa_embed"
"""The key of the signature in the metadata of a collection."""

UNINDEXED = re.compile(r'Index required but not found for \\?"(.+?)\\?" of one of the following types: \[(.*?)\]')
"""The error of a server in strict mode, as hosted ones are, for a filter on a field without an index."""

REFUSALS = (ValueError, KeyError, RuntimeError, AssertionError)
"""Raised by the local client's checks, and by the remote client for an answer that is not from Qdrant."""
FAILURES = (ApiException, QdrantException, RpcError, sqlite3.Error, OSError, *REFUSALS)
"""What a client raises."""

COSINE = models.Distance.COSINE
MAX_SIM = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
PINNED: dict[str, Any] = {"always_ram": True, "memory": models.Memory.PINNED}
QUANTIZATION: dict[str | None, models.QuantizationConfig] = {
    "scalar": models.ScalarQuantization(
        scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, **PINNED)
    ),
    "binary": models.BinaryQuantization(binary=models.BinaryQuantizationConfig(**PINNED)),
}
for _kind, _bits in TURBO_BITS.items():
    _size = models.TurboQuantBitSize(f"bits{_bits}")
    QUANTIZATION[_kind] = models.TurboQuantization(turbo=models.TurboQuantQuantizationConfig(bits=_size, **PINNED))
HNSW_KEY = "cocoa_embed_hnsw"
"""The key, in the metadata of a collection, that says that its search index is still to be built."""


class ClientStore(Store):
    """A collection accessed through a client that one thread at a time uses."""

    def __init__(
        self,
        location: str,
        collection: str,
        options: StoreOptions,
        place: str | None = None,
        *,
        client: QdrantClient | None = None,
    ) -> None:
        """Name a collection; the client is not used yet."""
        super().__init__(location, collection, options, place)
        self._opened = client
        self._info: models.CollectionInfo
        """The information about the collection that ``signature`` has read."""

    def collections(self) -> list[str]:
        """Return the names of all collections in this place."""
        if not self._exists():
            return []
        return sorted(each.name for each in self._call(lambda client: client.get_collections()).collections)

    def aliases(self) -> dict[str, str]:
        """Return the collection that each alias in this place names."""
        if not self._exists():
            return {}
        found = self._call(lambda client: client.get_aliases()).aliases
        return {each.alias_name: each.collection_name for each in found}

    def set_alias(self, alias: str) -> str | None:
        """Make a name an alias of this collection, in one step for all clients; return what it referred to before."""
        self.require_signature()
        check_collection_name(alias)
        if alias in self.collections():
            raise UsageError(f"{alias!r} is a collection in {self.location}, not an alias; give another name")
        aliases = self.aliases()
        target = aliases.get(self.collection, self.collection)
        delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))
        create = models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=target, alias_name=alias))
        steps: list[models.AliasOperations] = [delete, create] if alias in aliases else [create]
        self._call(lambda client: client.update_collection_aliases(steps))
        return aliases.get(alias)

    def signature(self) -> Signature | None:
        """Return the signature of the collection, or None if there is no such collection."""
        if not self._exists() or not self._call(lambda client: client.collection_exists(self.collection)):
            return None
        self._info = self._call(lambda client: client.get_collection(self.collection))
        config = self._info.config
        vectors = config.params.vectors
        named = vectors if isinstance(vectors, dict) else {} if vectors is None else {"": vectors}
        sizes = {each.size for each in named.values() if each.distance == COSINE and not each.multivector_config}
        self._signed = self._read_signature((config.metadata or {}).get(SIGNATURE_KEY), named, sizes)
        return self._signed

    def create(self, signature: Signature) -> None:
        """Create the collection with its signature, or sign an existing one without a signature."""
        metadata: dict[str, Any] = {SIGNATURE_KEY: asdict(signature)}
        found = self.signature()
        if found is not None:
            if self._needs_signature(found, signature):
                self._call(lambda client: client.update_collection(self.collection, metadata=metadata))
            return
        settings = creation(signature, self.options)
        if self.options.hnsw == "after":
            metadata[HNSW_KEY] = "to be built"
        try:
            self._call(lambda client: client.create_collection(self.collection, metadata=metadata, **settings))
        except CocoaError:
            # It may exist by now: the answer to an earlier attempt was lost, or another process created it.
            if self.signature() != signature:
                raise
        self._signed = signature

    def count(self, condition: models.Filter | None = None) -> int:
        """Return the number of points."""
        return self._call(lambda client: client.count(self.collection, condition, exact=True)).count

    def _scroll(self, condition: models.Filter | None, **page: Any) -> tuple[Sequence[models.Record], Any]:
        return self._call(lambda client: client.scroll(self.collection, condition, **page))

    def _retrieve(self, ids: Sequence[str]) -> Sequence[models.Record]:
        return self._call(lambda client: client.retrieve(self.collection, list(ids), with_payload=True))

    def _insert(self, points: Sequence[Point], sizes: Sequence[int]) -> None:
        structs = [
            models.PointStruct(id=point.id, vector=point.vectors(self.embed), payload=point.payload) for point in points
        ]
        mode = models.UpdateMode.INSERT_ONLY
        self._call(lambda client: client.upsert(self.collection, points=structs, wait=True, update_mode=mode))

    def _replace(self, replacements: Sequence[Replacement]) -> None:
        operations = [operation for each in replacements for operation in self._operations(each)]
        self._call(lambda client: client.batch_update_points(self.collection, operations, wait=True))

    def _operations(self, replacement: Replacement) -> Iterator[models.UpdateOperation]:
        """Yield the operations of a replacement, each of which does nothing if the point has another revision."""
        id_, _, payload, _, vector = replacement
        selected = self._selected(replacement)
        if vector is not None and vector.values is None:
            delete = models.DeleteVectors(vector=[vector.name], **selected)
            yield models.DeleteVectorsOperation(delete_vectors=delete)
        elif vector is not None:
            vectors = [models.PointVectors(id=id_, vector=vector.named)]
            update = models.UpdateVectors(points=vectors, update_filter=selected.get("filter"))
            yield models.UpdateVectorsOperation(update_vectors=update)
        if payload is None:
            yield models.DeleteOperation.model_validate({"delete": selected})
        else:
            overwrite = models.SetPayload(payload=payload, **selected)
            yield models.OverwritePayloadOperation(overwrite_payload=overwrite)

    def _selected(self, replacement: Replacement) -> dict[str, Any]:
        """Return what an operation selects: the point, if its payload still has the revision."""
        if replacement.revision is None:
            field: models.Condition = models.IsEmptyCondition(is_empty=models.PayloadField(key=REVISION))
        else:
            field = models.FieldCondition(key=REVISION, match=models.MatchValue(value=replacement.revision))
        return {"filter": models.Filter(must=[models.HasIdCondition(has_id=[replacement.id]), field])}

    def _search(self, queries: Sequence[Query]) -> Sequence[Sequence[models.ScoredPoint]]:
        made = map(self._fused if self.embed == base.BOTH else self._best, queries)
        requests = [
            models.QueryRequest(**search, limit=query.limit, offset=query.offset, with_payload=True)
            for query, search in zip(queries, made, strict=True)
        ]
        answers = self._call(lambda client: client.query_batch_points(self.collection, requests))
        return [answer.points for answer in answers]

    def _nearest(self, query: Query) -> dict[str, Any]:
        """Return the search of one vector."""
        search = {"filter": query.filter, "score_threshold": query.score_threshold}
        return {"query": nearest(query), "params": self._search_params(query), **search}

    def _best(self, query: Query) -> dict[str, Any]:
        """Return the search by one vector, or by several among the best points of the first."""
        if query.vectors == 1:
            return self._nearest(query)
        rescored = {**self._nearest(query), "using": base.ALL_VECTORS}
        if query.exact:
            return rescored
        first = query.of_first_vector
        rescored["params"] = self._search_params(query._replace(exact=True, hnsw_ef=None))
        return {**rescored, "prefetch": models.Prefetch(**self._nearest(first), limit=first.limit)}

    def _fused(self, query: Query) -> dict[str, Any]:
        """Return the search of both vectors; diversity chooses among the best of both, by the image's vector."""
        each = query.of_each_vector
        names = (base.IMAGE_VECTOR, base.CAPTION_VECTOR)
        both = [models.Prefetch(**self._nearest(each), limit=each.limit, using=name) for name in names]
        fused: dict[str, Any] = {"prefetch": both, "query": models.FusionQuery(fusion=models.Fusion.RRF)}
        if query.diversity is None:
            return fused
        best = models.Prefetch(**fused, limit=query.candidates)
        return {"prefetch": best, "query": nearest(query), "using": base.IMAGE_VECTOR}

    def _search_params(self, query: Query) -> models.SearchParams | None:
        if query.hnsw_ef is not None:
            raise UsageError("a local store compares all vectors and has no hnsw_ef; give url or edge for that")
        return None

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

    def _exists(self) -> bool:
        return True

    def _connected(self) -> QdrantClient:
        return self._opened

    def _failure(self, error: BaseException, attempts: int = 1) -> CocoaError:
        tried = f" (tried {attempts} times)" if attempts > 1 else ""
        if unindexed := UNINDEXED.search(reason(error)):
            return self._no_index(*unindexed.groups())
        return CocoaError(f"Qdrant at {self.location} failed: {reason(error)}{tried}")

    def _no_index(self, field: str, kinds: str) -> UsageError:
        """Return the error for a filter on a field that has no payload index, or one of another type."""
        key = field.removeprefix("metadata.")
        if index := self._info.payload_schema.get(field):
            return UsageError(
                f"{self.name} takes filters on indexed fields only, and the {index.data_type.value} index of {key} does"
                f" not serve this condition, which needs one of: {kinds}"
            )
        return UsageError(
            f"{self.name} takes filters on indexed fields only, and {key} has no index; run: cocoa-embed filterable"
            f" {shlex.quote(key)} --url URL --collection {shlex.quote(self.collection)}, or in Python"
            f" QdrantIndexer.create_payload_index({key!r})"
        )


def creation(signature: Signature, options: StoreOptions) -> dict[str, Any]:
    """Return the settings of a new collection.

    Servers before 1.19 do not know memory tiers, only ``on_disk`` and ``always_ram``, which newer ones then ignore.
    """
    vectors = models.VectorParams(
        size=signature.dimension,
        distance=COSINE,
        datatype=options.vectors and models.Datatype(options.vectors),
        memory=options.memory and models.Memory(options.memory),
        on_disk=options.memory and options.memory == "cold",
    )
    graph = models.HnswConfigDiff(
        m=0 if options.hnsw == "after" else None,  # without a graph, and without waiting for one
        memory=options.graph and models.Memory(options.graph),
        on_disk=options.graph and options.graph == "cold",
    )
    quantization = QUANTIZATION.get(options.quantization)
    named: Any = vectors
    if signature.embed == base.BOTH:
        named = {base.IMAGE_VECTOR: vectors, base.CAPTION_VECTOR: vectors}
    elif signature.vectors > 1:  # only the first is searched, and only the first has a graph and is quantized
        several = {"multivector_config": MAX_SIM, "hnsw_config": models.HnswConfigDiff(m=0)}
        first = vectors.model_copy(update={"quantization_config": quantization})
        named, quantization = {"": first, base.ALL_VECTORS: vectors.model_copy(update=several)}, None
    return {
        "vectors_config": named,
        "hnsw_config": graph if options.graph or options.hnsw == "after" else None,
        "quantization_config": quantization,
        "shard_number": options.shards,
        "replication_factor": options.replicas,
    }


def nearest(query: Query) -> models.NearestQuery:
    """Return what a query searches for."""
    mmr = query.diversity is not None and models.Mmr(diversity=query.diversity, candidates_limit=query.candidates)
    return models.NearestQuery(nearest=query.vector.tolist(), mmr=mmr or None)


def reason(error: BaseException) -> str:
    """Return the message of a client's error on one line."""
    if isinstance(error, Call):
        return f"{error.code().name}: {' '.join((error.details() or '').split())}"
    if isinstance(error, (json.JSONDecodeError, AssertionError)):
        return f"the answer is not one of Qdrant's ({one_line(error)})"
    if isinstance(error, UnexpectedResponse):
        try:
            message = error.structured()["status"]["error"]
        except (ValueError, TypeError, KeyError):
            return one_line(error)
        return f"{error.status_code} {error.reason_phrase}: {' '.join(str(message).split())}"
    return one_line(error)
