"""A collection on a Qdrant server: bounded requests, retries, payload indexes, quantization."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from typing import Any

from cocoa_embed.errors import CocoaError, UsageError, require
from cocoa_embed.integrations.qdrant.stores import base
from cocoa_embed.integrations.qdrant.stores.base import Point, Signature, StoreOptions
from cocoa_embed.integrations.qdrant.stores.checks import check_url
from cocoa_embed.integrations.qdrant.stores.client import FAILURES, Answer, ClientStore

require("tenacity", "qdrant")

from httpx import LocalProtocolError, TransportError, UnsupportedProtocol  # noqa: E402 - qdrant-client brings it
from qdrant_client import QdrantClient, models  # noqa: E402
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse  # noqa: E402
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse  # noqa: E402
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential, wait_random  # noqa: E402

TIMEOUT_SECONDS = 60
"""Qdrant's default of 5 is short for a batch of large vectors."""
MAX_BATCH_POINTS = 256
MAX_BATCH_BYTES = 8 * 2**20
"""Per request. A server takes 32 MiB; a time-out of a smaller request loses less."""
ATTEMPTS = 6
FIRST_ATTEMPTS = 3
"""Until the server has answered once, so that a wrong address is reported soon."""
MAX_WAIT_SECONDS = 60.0
"""Between two attempts, even if the server asks for more."""
FIRST_VERSION = "1.16"
"""The first version of Qdrant that stores metadata of a collection."""

back_off = wait_exponential(multiplier=0.5, max=20) + wait_random(0, 0.5)


def open_collection(url: str, collection: str, options: StoreOptions) -> ServerStore:
    """Return a collection on a server; nothing is sent yet.

    :raises UsageError: If the address or the API key is invalid.
    """
    check_url(url)
    key = options.api_key
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError("the API key holds characters that cannot be sent; is there a line break at its end?")
    return ServerStore(url, collection, options)


class ServerStore(ClientStore):
    """A collection on a server, which several threads use at once."""

    parallel = 4
    _has_answered = False
    _has_indexes = False

    def create(self, signature: Signature) -> None:
        """Create the collection with its signature and its payload indexes, or sign an existing one."""
        super().create(signature)
        if self.signature() != signature:
            version = self._call(lambda client: client.info()).version
            raise CocoaError(
                f"Qdrant at {self.location} is of version {version}, which does not keep a collection's metadata; run"
                f" {FIRST_VERSION} or newer"
            )
        self._index_payloads()

    def _vector_settings(self, dimension: int) -> dict[str, Any]:
        on_disk = self.options.on_disk or None
        vectors = models.VectorParams(size=dimension, distance=models.Distance.COSINE, on_disk=on_disk)
        return {"vectors_config": vectors, "quantization_config": QUANTIZATION.get(self.options.quantization)}

    def _search_params(self, limit: int) -> models.SearchParams:
        # Without effect in a collection that is not quantized.
        quantization = models.QuantizationSearchParams(rescore=True, oversampling=base.oversampling(limit))
        return models.SearchParams(quantization=quantization)

    def _index_payloads(self) -> None:
        """Create the payload indexes that the collection does not have."""
        with self._lock:
            if self._has_indexes:
                return
            indexed = self._call(lambda client: client.get_collection(self.collection)).payload_schema
            for key, kind in base.PAYLOAD_INDEXES.items():
                if key not in indexed:
                    schema = TEXT_INDEX if kind == base.TEXT else models.PayloadSchemaType(kind)
                    create = methodcaller("create_payload_index", self.collection, key, schema, wait=True)
                    self._call(create)
            self._has_indexes = True

    def _upsert(self, points: Sequence[Point], sizes: Sequence[int]) -> None:
        """Store points, in several requests if one would be too large."""
        # The process that created the collection may have been killed before the last index.
        self._index_payloads()
        for batch in bounded_batches(points, sizes):
            self._upsert_halving(batch)

    def _upsert_halving(self, points: Sequence[Point]) -> None:
        """Send points, in smaller requests if a proxy refuses the size."""
        try:
            super()._upsert(points, ())
        except CocoaError as error:
            cause = error.__cause__
            if len(points) == 1 or not isinstance(cause, UnexpectedResponse) or cause.status_code != 413:
                raise
            middle = len(points) // 2
            self._upsert_halving(points[:middle])
            self._upsert_halving(points[middle:])

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
        return state.attempt_number >= (ATTEMPTS if self._has_answered else FIRST_ATTEMPTS)

    def _connected(self) -> QdrantClient:
        with self._lock:
            if self._opened is None:
                key = self.options.api_key
                client = QdrantClient(
                    url=self.location, api_key=key, timeout=TIMEOUT_SECONDS, check_compatibility=False
                )
                self._opened, self._closing = client, weakref.finalize(self, client.close)
            return self._opened


TEXT_INDEX = models.TextIndexParams(
    type=models.TextIndexType.TEXT, tokenizer=models.TokenizerType.WORD, lowercase=True, phrase_matching=True
)
QUANTIZATION: dict[str | None, models.QuantizationConfig] = {
    "scalar": models.ScalarQuantization(
        scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
    ),
    "binary": models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True)),
}


def is_temporary(error: BaseException) -> bool:
    """Return whether a retry may succeed: no connection, no answer, too many requests, status 5xx."""
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


def bounded_batches(points: Sequence[Point], sizes: Sequence[int]) -> Iterator[Sequence[Point]]:
    """Yield points in batches of at most ``MAX_BATCH_POINTS`` and ``MAX_BATCH_BYTES``; a larger point goes alone.

    :param sizes: The size of each point in bytes.
    """
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == MAX_BATCH_POINTS or total + size > MAX_BATCH_BYTES):
            yield points[start:index]
            start, total = index, 0
        total += size
    if start < len(points):
        yield points[start:]
