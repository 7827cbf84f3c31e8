"""A collection on a Qdrant server: batches by bytes, passing failures tried again, payload indexes, quantization."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cocoa_embed.errors import CocoaError, UsageError, one_line, require
from cocoa_embed.integrations.qdrant.stores.base import (
    PAYLOAD_INDEXES,
    TEXT,
    Point,
    Signature,
    StoreOptions,
    oversampling,
)
from cocoa_embed.integrations.qdrant.stores.checks import check_points
from cocoa_embed.integrations.qdrant.stores.client import FAILURES, Answer, ClientStore

require("tenacity", "qdrant")

from httpx import LocalProtocolError, TransportError, UnsupportedProtocol  # noqa: E402 - qdrant-client brings it
from qdrant_client import QdrantClient, models  # noqa: E402
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse  # noqa: E402
from qdrant_client.http import SyncApis  # noqa: E402
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse  # noqa: E402
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential, wait_random  # noqa: E402

SERVER_TIMEOUT = 60
"""Seconds to wait for a server's answer; Qdrant's own default of 5 is short for a batch of large vectors."""
BATCH_POINTS = 256
BATCH_BYTES = 8 * 2**20
"""In one request. A server takes 32 MiB; smaller ones lose less to a time-out."""
ATTEMPTS = 6
FIRST_ATTEMPTS = 3
"""Before the server has answered once: a wrong address should not take half a minute to be told."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts at most, whatever the server asks for."""
FIRST_WITH_METADATA = "1.16"
"""The first version of the server that keeps a collection's metadata."""
PARALLEL = 4

back_off = wait_exponential(multiplier=0.5, max=20) + wait_random(0, 0.5)


class ServerStore(ClientStore):
    """A collection on a server. Threads may ask it at once."""

    parallel = PARALLEL

    def __init__(
        self,
        url: str | None,
        collection: str,
        options: StoreOptions,
        *,
        api_key: str | None = None,
        client: QdrantClient | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Name a server, or give a client that is connected to one; it is asked nothing yet.

        :param sleep: Waits for some seconds.
        :raises UsageError: If the key cannot be sent.
        """
        super().__init__(collection, options, client=client, place=url or "the given client")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError("the API key holds characters that cannot be sent; is there a line break at its end?")
        self._url = url
        self._api_key = api_key
        self._closing: weakref.finalize | None = None
        self._has_answered = False
        self._has_indexes = False
        self._retrying = Retrying(
            retry=retry_if_exception(is_passing),
            stop=lambda state: state.attempt_number >= (ATTEMPTS if self._has_answered else FIRST_ATTEMPTS),
            wait=waiting_time,
            sleep=sleep,
            reraise=True,
        )

    def create(self, signature: Signature) -> None:
        """Create the collection, signed, and its payload indexes."""
        super().create(signature)
        self._index_payloads()

    def upsert(self, points: Sequence[Point]) -> None:
        """Store points, and wait until they are there; several requests, if they take more bytes than one should."""
        sizes = check_points(points, self._known_dimension())
        # Whoever created the collection may have been killed before the last index.
        self._index_payloads()
        for batch in batches_by_bytes(points, sizes):
            self._send_halving(batch)

    def close(self) -> None:
        """Close the connections, unless the client was given."""
        with self._lock:
            if self._closing is not None:
                self._closing()
                self._client = self._closing = None

    def _parameters(self, dimension: int) -> dict[str, Any]:
        vectors = models.VectorParams(
            size=dimension, distance=models.Distance.COSINE, on_disk=self.options.on_disk or None
        )
        return {"vectors_config": vectors, "quantization_config": quantization_config(self.options)}

    def _search_params(self, limit: int) -> models.SearchParams:
        # Means nothing where vectors are not quantized, which only the collection knows.
        return models.SearchParams(
            quantization=models.QuantizationSearchParams(rescore=True, oversampling=oversampling(limit))
        )

    def _read_back(self, signature: Signature) -> None:
        found = self.signature()
        if found is not None and found.fingerprint is None:
            version = self._ask(lambda client: client.info()).version
            raise CocoaError(
                f"Qdrant at {self.place} is of version {version}, which does not keep a collection's metadata;"
                f" run {FIRST_WITH_METADATA} or newer"
            )
        super()._read_back(signature)

    def _index_payloads(self) -> None:
        """Create the payload indexes that the collection has not."""
        with self._lock:
            if self._has_indexes:
                return
            indexed = self._ask(lambda client: client.get_collection(self.collection)).payload_schema
            for field, kind in PAYLOAD_INDEXES.items():
                if field not in indexed:
                    self._index_payload(field, kind)
            self._has_indexes = True

    def _index_payload(self, field: str, kind: str) -> None:
        schema = TEXT_INDEX if kind == TEXT else models.PayloadSchemaType(kind)
        self._ask(lambda client: client.create_payload_index(self.collection, field, field_schema=schema, wait=True))

    def _send_halving(self, points: Sequence[Point]) -> None:
        """Send points; in smaller requests where something between here and the server takes no more."""
        try:
            self._send(points)
        except CocoaError as error:
            cause = error.__cause__
            if len(points) == 1 or not isinstance(cause, UnexpectedResponse) or cause.status_code != 413:
                raise
            middle = len(points) // 2
            self._send_halving(points[:middle])
            self._send_halving(points[middle:])

    def _ask(self, question: Callable[[QdrantClient], Answer]) -> Answer:
        client = self._connected()
        attempts = 0

        def attempt() -> Answer:
            nonlocal attempts
            attempts += 1
            try:
                answer = question(client)
            except (UnexpectedResponse, QdrantException):
                self._has_answered = True
                raise
            self._has_answered = True
            return answer

        try:
            return self._retrying(attempt)
        except FAILURES as error:
            raise self._failure(error, attempts) from error

    def _connected(self) -> QdrantClient:
        with self._lock:
            if self._client is None:
                try:
                    self._client = QdrantClient(
                        url=self._url, api_key=self._api_key, timeout=SERVER_TIMEOUT, check_compatibility=False
                    )
                except ValueError as error:
                    raise UsageError(f"{self._url!a} is no address of a Qdrant server ({one_line(error)})") from error
                self._closing = weakref.finalize(self, self._client.close)
            return self._client


TEXT_INDEX = models.TextIndexParams(
    type=models.TextIndexType.TEXT, tokenizer=models.TokenizerType.WORD, lowercase=True, phrase_matching=True
)


def given_store(client: QdrantClient, collection: str, options: StoreOptions) -> ClientStore:
    """Return a collection behind a client that was given, which may be connected to a server or not."""
    try:
        is_remote = isinstance(client.http, SyncApis)
    except NotImplementedError:
        is_remote = False
    if is_remote:
        return ServerStore(None, collection, options, client=client)
    return ClientStore(collection, options, client=client)


def quantization_config(options: StoreOptions) -> models.QuantizationConfig | None:
    """Return how a new collection quantizes its vectors."""
    if options.quantization == "scalar":
        scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
        return models.ScalarQuantization(scalar=scalar)
    if options.quantization == "binary":
        return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
    return None


def is_passing(error: BaseException) -> bool:
    """Say whether a failure may be over at the next attempt: no connection, no answer, too much to do, 5xx."""
    if isinstance(error, UnexpectedResponse):
        return error.status_code is not None and (error.status_code == 429 or error.status_code >= 500)
    if isinstance(error, ResponseHandlingException):
        mistakes = (UnsupportedProtocol, LocalProtocolError)
        return isinstance(error.source, TransportError) and not isinstance(error.source, mistakes)
    # Only ever of a 429 with a Retry-After, in seconds or not.
    return isinstance(error, QdrantException)


def waiting_time(state: RetryCallState) -> float:
    """Return the seconds to wait before the next attempt: longer each time, and as long as the server says."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = float(error.retry_after_s) if isinstance(error, ResourceExhaustedResponse) else 0.0
    return min(max(back_off(state), asked), LONGEST_WAIT)


def batches_by_bytes(points: Sequence[Point], sizes: Sequence[int]) -> Iterator[Sequence[Point]]:
    """Yield points in lots of at most ``BATCH_POINTS`` and ``BATCH_BYTES``; a larger point goes alone.

    :param sizes: The bytes of each.
    """
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == BATCH_POINTS or total + size > BATCH_BYTES):
            yield points[start:index]
            start, total = index, 0
        total += size
    if start < len(points):
        yield points[start:]
