"""A collection on a Qdrant server: bounded requests, retries, payload indexes, quantization."""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from cocoa_embed.errors import CocoaError, UsageError, require
from cocoa_embed.integrations.qdrant.stores import base
from cocoa_embed.integrations.qdrant.stores.base import Point, Query, Replacement, Signature
from cocoa_embed.integrations.qdrant.stores.checks import check_url
from cocoa_embed.integrations.qdrant.stores.client import FAILURES, HNSW_KEY, Answer, ClientStore
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions

require("tenacity", "qdrant")

from grpc import Call, RpcError  # noqa: E402
from grpc import StatusCode as Status  # noqa: E402
from httpx import (  # noqa: E402 - qdrant-client brings it
    HTTPError,
    LocalProtocolError,
    TransportError,
    UnsupportedProtocol,
    stream,
)
from qdrant_client import QdrantClient, models  # noqa: E402
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse  # noqa: E402
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse  # noqa: E402
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential, wait_random  # noqa: E402

HNSW_M = 16
"""Qdrant's default number of edges per point in the search index."""
SNAPSHOT_SECONDS = 600
"""The time until a server begins to send a snapshot, and between two parts of it."""
TIMEOUT_SECONDS = 60
"""Qdrant's default of 5 is short for a batch of large vectors."""
MAX_BATCH_BYTES = 2**20
"""The maximum per request. A server accepts 32 MiB, but a proxy in front of it often accepts no more than this."""
ATTEMPTS = 6
FIRST_ATTEMPTS = 3
"""Attempts until the server has answered once, so that a wrong address is reported soon."""
MAX_WAIT_SECONDS = 60.0
"""The maximum time between two attempts, even if the server asks for more."""

TEMPORARY_CODES = frozenset(
    (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.RESOURCE_EXHAUSTED, Status.ABORTED, Status.INTERNAL)
)
TOO_LARGE = re.compile(r"message (length )?(too large|larger than max)", re.IGNORECASE)
"""Matches the error of gRPC for a request above the client's or the server's limit."""

Sent = TypeVar("Sent")
SIGNATURE_SECONDS = 30.0
"""How long a search trusts what it knows about a collection, which another process may have recreated."""

back_off = wait_exponential(multiplier=0.5, max=20) + wait_random(0, 0.5)


def open_collection(url: str, collection: str, options: StoreOptions) -> ServerStore:
    """Return a collection on a server; nothing is sent yet.

    :raises UsageError: If the address or the API key is invalid.
    """
    check_url(url)
    key = options.api_key
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError("the API key holds characters that cannot be sent; is there a line break at its end?")
    return ServerStore(url, collection, options, url)


class ServerStore(ClientStore):
    """A collection on a server, which several threads use at once."""

    parallel = 4
    _has_answered = False
    _known: Signature | None = None
    _known_until = 0.0

    def create(self, signature: Signature) -> None:
        """Create the collection with its signature and its payload indexes, or sign an existing one."""
        super().create(signature)
        stored = self.signature()
        if stored is None or stored.fingerprint != signature.fingerprint:
            raise CocoaError(
                f"Qdrant at {self.location} does not store a collection's metadata; run version 1.16 or newer"
            )
        # The process that created the collection may have been killed before the last index.
        for key, kind in self.options.payload_indexes().items():
            self._create_payload_index(key, kind)

    def finish(self) -> None:
        """Have the server build the search index that this run, or a killed one, has put off (``hnsw=after``)."""
        if self.signature() is None or not (self._info.config.metadata or {}).get(HNSW_KEY):
            return
        graph = models.HnswConfigDiff(m=HNSW_M) if self._info.config.hnsw_config.m == 0 else None
        done = {HNSW_KEY: None}
        self._call(lambda client: client.update_collection(self.collection, hnsw_config=graph, metadata=done))

    def write_snapshot(self, file: Path) -> None:
        """Write a snapshot of the collection, which has one shard, to a file.

        :raises CocoaError: If it has more, or the file cannot be written.
        """
        self.require_signature()
        if (shards := self._info.config.params.shard_number) not in (None, 1):
            raise CocoaError(
                f"{self.name} has {shards} shards, but Qdrant Edge takes one; load the embeddings with --edge instead"
            )
        key, name = self.options.api_key, quote(self.aliases().get(self.collection, self.collection), safe="")
        address = f"{self.location.rstrip('/')}/collections/{name}/shards/0/snapshot"
        headers = {} if key is None else {"api-key": key}
        try:
            with file.open("wb") as out, stream("GET", address, headers=headers, timeout=SNAPSHOT_SECONDS) as answer:
                answer.raise_for_status()
                for part in answer.iter_bytes():
                    out.write(part)
        except (HTTPError, OSError) as error:
            raise self._failure(error) from error

    def require_signature(self) -> Signature:
        """Return the signature of a collection that must exist; it is read again after ``SIGNATURE_SECONDS``.

        :raises CocoaError: If it does not exist.
        """
        known = self._known
        if known is None or time.monotonic() > self._known_until:
            self._known = known = super().require_signature()
            self._known_until = time.monotonic() + SIGNATURE_SECONDS
        return known

    def signature(self) -> Signature | None:
        """Return the signature of the collection, or None if there is no such collection."""
        self._known = None
        return super().signature()

    def payload_indexes(self) -> Mapping[str, str] | None:
        """Return the types of the payload indexes by field, if the server takes filters on no other field."""
        self.require_signature()
        strict = self._info.config.strict_mode_config
        if not (strict and strict.enabled and strict.unindexed_filtering_retrieve is False):
            return None
        return {field: index.data_type.value for field, index in self._info.payload_schema.items()}

    def create_payload_index(self, field: str, kind: str) -> None:
        """Create an index for filters on a field, unless there is one."""
        self.signature()
        self._create_payload_index(field, kind)

    def _create_payload_index(self, field: str, kind: str) -> None:
        if field not in self._info.payload_schema:
            schema = SCHEMAS.get(kind) or models.PayloadSchemaType(kind)
            self._call(methodcaller("create_payload_index", self.collection, field, schema, wait=True))
            self._known = None

    def _search(self, queries: Sequence[Query]) -> Sequence[Sequence[models.ScoredPoint]]:
        try:
            return super()._search(queries)
        except CocoaError:
            if self._known is not None:
                self._known = None
                self.require_signature()  # raises a clearer error if the collection is gone
            raise

    def _insert(self, points: Sequence[Point], sizes: Sequence[int]) -> None:
        """Store points, in several requests if one would be too large."""
        for batch in bounded_batches(points, sizes):
            halving(lambda part: super(ServerStore, self)._insert(part, ()), batch)

    def _replace(self, replacements: Sequence[Replacement]) -> None:
        for batch in bounded_batches(replacements, [each.size for each in replacements]):
            halving(super()._replace, batch)

    def _search_params(self, query: Query) -> models.SearchParams:
        # Without effect in a collection that is not quantized.
        rescored = {"rescore": True, "oversampling": base.oversampling(query.limit + query.offset)}
        quantization = models.QuantizationSearchParams(**({"ignore": True} if query.exact else rescored))
        return models.SearchParams(hnsw_ef=query.hnsw_ef, exact=query.exact or None, quantization=quantization)

    def _call(self, call: Callable[[QdrantClient], Answer]) -> Answer:
        client = self._connected()
        retrying = Retrying(retry=retry_if_exception(is_temporary), stop=self._is_last, wait=wait, reraise=True)
        try:
            answer = retrying(call, client)
        except FAILURES as error:
            raise self._failure(error, retrying.statistics["attempt_number"]) from error
        self._has_answered = True
        return answer

    def _is_last(self, state: RetryCallState) -> bool:
        """Return whether an attempt is the last; an error status is an answer too."""
        error = state.outcome.exception() if state.outcome is not None else None
        self._has_answered = self._has_answered or isinstance(error, (UnexpectedResponse, QdrantException))
        if isinstance(error, Call):
            self._has_answered |= error.code() not in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED)
        return state.attempt_number >= (ATTEMPTS if self._has_answered else FIRST_ATTEMPTS)

    def _connected(self) -> QdrantClient:
        with self._lock:
            if self._opened is None:
                key = self.options.api_key
                client = QdrantClient(
                    url=self.location,
                    api_key=key,
                    prefer_grpc=self.options.prefer_grpc,
                    timeout=TIMEOUT_SECONDS,
                    check_compatibility=False,
                )
                self._opened, self._closing = client, weakref.finalize(self, client.close)
            return self._opened


SCHEMAS = {
    base.TEXT: models.TextIndexParams(
        type=models.TextIndexType.TEXT, tokenizer=models.TokenizerType.WORD, lowercase=True, phrase_matching=True
    ),
    base.TENANT: models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True),
}


def is_temporary(error: BaseException) -> bool:
    """Return whether a retry may succeed: no connection, no answer, too many requests, status 5xx or the like."""
    if isinstance(error, RpcError):
        return isinstance(error, Call) and error.code() in TEMPORARY_CODES and not is_too_large(error)
    if isinstance(error, UnexpectedResponse):
        return error.status_code is not None and (error.status_code == 429 or error.status_code >= 500)
    if isinstance(error, ResponseHandlingException):
        mistakes = (UnsupportedProtocol, LocalProtocolError)
        return isinstance(error.source, TransportError) and not isinstance(error.source, mistakes)
    # The client raises it only for status 429 with a Retry-After, whether or not that is a number.
    return isinstance(error, QdrantException)


def wait(state: RetryCallState) -> float:
    """Return the seconds to wait before the next attempt: longer each time, and as long as the server asks."""
    error = state.outcome.exception() if state.outcome is not None else None
    retry_after = float(error.retry_after_s) if isinstance(error, ResourceExhaustedResponse) else 0.0
    return min(max(back_off(state), retry_after), MAX_WAIT_SECONDS)


def halving(send: Callable[[Sequence[Sent]], object], parts: Sequence[Sent]) -> None:
    """Send a request, or several smaller ones if the server or a proxy refuses the size."""
    try:
        send(parts)
    except CocoaError as error:
        if len(parts) == 1 or not is_too_large(error.__cause__):
            raise
        middle = len(parts) // 2
        halving(send, parts[:middle])
        halving(send, parts[middle:])


def is_too_large(error: BaseException | None) -> bool:
    """Return whether a request was refused because of its size."""
    if isinstance(error, RpcError):
        return isinstance(error, Call) and TOO_LARGE.search(error.details() or "") is not None
    return isinstance(error, UnexpectedResponse) and error.status_code == 413


def bounded_batches(points: Sequence[Sent], sizes: Sequence[int]) -> Iterator[Sequence[Sent]]:
    """Yield points in batches of at most ``MAX_BATCH_BYTES``; a larger point goes alone.

    :param sizes: The size of each point in bytes.
    """
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > MAX_BATCH_BYTES:
            yield points[start:index]
            start, total = index, 0
        total += size
    if start < len(points):
        yield points[start:]
