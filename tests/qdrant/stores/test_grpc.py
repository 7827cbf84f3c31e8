"""A client that speaks gRPC is retried, and its requests halved, as one that speaks REST."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from fake_qdrant import SIGNATURE, make_points
from grpc import StatusCode
from qdrant_client import QdrantClient
from qdrant_client import grpc as messages

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.stores import open_store, server
from cocoa_embed.integrations.qdrant.stores.server import ServerStore

TOO_LARGE = "Error, message length too large: found 5 bytes, the limit is: 4 bytes"


class FakePoints(grpc.GenericRpcHandler):
    """The methods of a server's service of points that are called here; it fails with the codes that it is given."""

    def __init__(self) -> None:
        self.failures: list[tuple[StatusCode, str]] = []
        self.most_points = 1000
        self.upserts: list[int] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = details.method.rpartition("/")[2]
        return grpc.unary_unary_rpc_method_handler(getattr(self, method.lower()))

    def count(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        if self.failures:
            context.abort(*self.failures.pop(0))
        return messages.CountResponse(result=messages.CountResult(count=5)).SerializeToString()

    def upsert(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.upserts.append(len(messages.UpsertPoints.FromString(request).points))
        if self.upserts[-1] > self.most_points:
            context.abort(StatusCode.OUT_OF_RANGE, TOO_LARGE)
        done = messages.UpdateResult(operation_id=0, status=messages.UpdateStatus.Completed)
        return messages.PointsOperationResponse(result=done).SerializeToString()


@pytest.fixture
def points() -> FakePoints:
    return FakePoints()


@pytest.fixture
def store(points: FakePoints, waits: list[float]) -> Iterator[Any]:
    listener = grpc.server(ThreadPoolExecutor(2), handlers=[points])
    port = listener.add_insecure_port("127.0.0.1:0")
    listener.start()
    client = QdrantClient(host="127.0.0.1", grpc_port=port, prefer_grpc=True, check_compatibility=False)
    store = open_store(client=client, collection="images")
    store._signed = SIGNATURE
    yield store
    client.close()
    listener.stop(None).wait()


@pytest.mark.parametrize("code", [StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED, StatusCode.INTERNAL])
def test_temporary_failures_are_retried(
    store: ServerStore, points: FakePoints, waits: list[float], code: StatusCode
) -> None:
    assert isinstance(store, ServerStore)
    points.failures += [(code, "later")] * 2
    assert (store.count(), len(waits), points.failures) == (5, 2, [])


def test_a_lasting_failure_is_reported_in_one_sentence_after_a_few_attempts(
    store: ServerStore, points: FakePoints, waits: list[float]
) -> None:
    points.failures += [(StatusCode.ABORTED, "not\nnow")] * server.ATTEMPTS
    with pytest.raises(CocoaError, match=r"the given client failed: ABORTED: not now \(tried 6 times\)$"):
        store.count()
    assert len(waits) == server.ATTEMPTS - 1


@pytest.mark.parametrize("code", [StatusCode.INVALID_ARGUMENT, StatusCode.UNAUTHENTICATED, StatusCode.NOT_FOUND])
def test_permanent_failures_are_not_retried(
    store: ServerStore, points: FakePoints, waits: list[float], code: StatusCode
) -> None:
    points.failures.append((code, "no"))
    with pytest.raises(CocoaError, match=f"failed: {code.name}: no$"):
        store.count()
    assert waits == []


def test_a_server_that_is_not_there_is_reported_soon(waits: list[float]) -> None:
    client = QdrantClient(host="127.0.0.1", grpc_port=9, prefer_grpc=True, check_compatibility=False)
    with pytest.raises(CocoaError, match=r"UNAVAILABLE: .*\(tried 3 times\)$"):
        open_store(client=client, collection="images").count()
    client.close()


@pytest.mark.parametrize(
    ("code", "words", "is_too_large"),
    [
        (StatusCode.OUT_OF_RANGE, TOO_LARGE, True),
        (StatusCode.RESOURCE_EXHAUSTED, "Sent message larger than max (5 vs. 4)", True),
        (StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)", True),
        (StatusCode.RESOURCE_EXHAUSTED, "too many requests", False),
    ],
)
def test_a_request_above_a_limit_is_distinguished_from_too_many_requests(
    store: ServerStore, points: FakePoints, waits: list[float], code: StatusCode, words: str, is_too_large: bool
) -> None:
    points.failures.append((code, words))
    call: Callable[[], object] = store.count
    if is_too_large:
        with pytest.raises(CocoaError) as raised:
            call()
        assert server.is_too_large(raised.value.__cause__)
    else:
        call()
    assert len(waits) == (not is_too_large)


def test_a_request_that_is_too_large_is_halved(store: ServerStore, points: FakePoints) -> None:
    points.most_points = 2
    store.insert(make_points(0, 8))
    assert points.upserts == [8, 4, 2, 2, 4, 2, 2]
