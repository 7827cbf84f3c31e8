"""What a server is sent, and what happens when it fails."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ResponseHandlingException
from store_faults import (
    MAX_BODY,
    FakeServer,
    FaultyClient,
    answer_bytes,
    answer_status,
    do_then,
    drop,
    drop_after,
    fake_server,
    refusal,
    status,
    store_then,
    time_out,
    too_many,
)
from store_points import DIMENSION, OTHER, SIGNATURE, make_points, make_vector, name

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import PAYLOAD_INDEXES, Query, Signature, StoreOptions
from cocoa_embed.integrations.qdrant.stores.client import ClientStore
from cocoa_embed.integrations.qdrant.stores.server import (
    ATTEMPTS,
    FIRST_ATTEMPTS,
    MAX_BATCH_BYTES,
    MAX_BATCH_POINTS,
    MAX_WAIT_SECONDS,
    ServerStore,
    bounded_batches,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes"),
    pytest.mark.filterwarnings("ignore:Api key is used"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact"),
]

QUERY = Query(make_vector(1), limit=5)


@pytest.fixture
def waits() -> list[float]:
    """The seconds that a store would have waited."""
    return []


@pytest.fixture
def client() -> Iterator[FaultyClient]:
    memory = QdrantClient(":memory:")
    yield FaultyClient(memory)
    memory.close()


@pytest.fixture
def store(client: FaultyClient, waits: list[float]) -> ServerStore:
    """A store over a server that is as quick as memory, and fails on request."""
    store = ServerStore("here", "images", StoreOptions(), client=client, sleep=waits.append)  # type: ignore[arg-type]
    store.create(SIGNATURE)
    client.calls.clear()
    return store


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def remote(server: FakeServer, waits: list[float]) -> Iterator[Callable[..., ServerStore]]:
    """Opens a store that talks to the loopback server."""
    stores: list[ServerStore] = []

    def open_(**options: Any) -> ServerStore:
        stores.append(ServerStore(server.url, "images", StoreOptions(**options), sleep=waits.append))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


class TestRetries:
    @pytest.mark.parametrize(
        "error", [time_out(), refusal(), status(500), status(502), status(503), status(429), too_many(2)], ids=repr
    )
    @pytest.mark.parametrize("stored", [0, 0.5, 1])
    def test_temporary_failures_are_retried_and_a_batch_stored_in_part_is_there_once(
        self, store: ServerStore, client: FaultyClient, waits: list[float], error: Exception, stored: float
    ) -> None:
        client.faults["upsert"] = [store_then(stored, error)] * (ATTEMPTS - 1)
        store.upsert(make_points(0, 10))
        assert client.calls.count("upsert") == ATTEMPTS
        assert sorted(payload["number"] for _, payload in store.scan(["number"])) == list(range(10))
        assert len(waits) == ATTEMPTS - 1

    @pytest.mark.parametrize(
        "call",
        [
            lambda store: store.count(),
            lambda store: list(store.scan(["number"])),
            lambda store: store.retrieve([name(1)]),
            lambda store: store.delete([name(1)]),
            lambda store: store.overwrite_payload(name(1), {}),
            lambda store: store.search(QUERY),
            lambda store: store.signature(),
            lambda store: store.sign(SIGNATURE),
        ],
    )
    def test_every_call_is_retried(
        self, store: ServerStore, client: FaultyClient, call: Callable[[ServerStore], object]
    ) -> None:
        store.upsert(make_points(0, 3))
        client.calls.clear()
        call(store)
        wanted = list(client.calls)
        assert wanted
        for method in set(wanted):
            client.calls.clear()
            client.faults = {method: [time_out(), status(503)]}
            call(store)
            assert len(client.calls) == len(wanted) + 2

    def test_a_failure_that_lasts_ends_after_a_few_attempts_and_the_next_run_completes_the_batch(
        self, store: ServerStore, client: FaultyClient, waits: list[float]
    ) -> None:
        client.faults["upsert"] = [store_then(0.3, status(503, "overloaded")), ...]
        with pytest.raises(CocoaError, match=r"^Qdrant at here failed: 503 Reason: overloaded \(tried 6 times\)$"):
            store.upsert(make_points(0, 10))
        assert sum(waits) < 30
        assert waits == sorted(waits)
        client.faults.clear()
        assert store.count() == 3
        store.upsert(make_points(0, 10))
        assert store.count() == 10

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            *[(status(code, "Wrong input"), f"{code} Reason: Wrong") for code in (400, 401, 403, 404, 409, 413, 422)],
            (ResponseHandlingException(httpx.LocalProtocolError("Illegal header value")), "Illegal header value"),
            (ResponseHandlingException(ValueError("no field 'result'")), "no field 'result'"),
            (json.JSONDecodeError("Expecting value", "<html>", 0), "the answer is not one of Qdrant's"),
            (AssertionError("Count returned None"), "the answer is not one of Qdrant's"),
        ],
    )
    def test_a_failure_that_would_last_is_not_retried(
        self, store: ServerStore, client: FaultyClient, waits: list[float], error: Exception, words: str
    ) -> None:
        client.faults["count"] = [error, ...]
        with pytest.raises(CocoaError, match=f"^Qdrant at here failed: {words}"):
            store.count()
        assert (client.calls.count("count"), waits) == (1, [])

    def test_the_server_says_how_long_to_wait_within_limits(
        self, store: ServerStore, client: FaultyClient, waits: list[float]
    ) -> None:
        no_number = QdrantException("Retry-After header value is not a valid integer: Wed, 21 Oct 2026 07:28:00 GMT")
        client.faults["count"] = [too_many(7), too_many(3600), no_number]
        store.count()
        assert waits[:2] == [7, MAX_WAIT_SECONDS]
        assert 2 <= waits[2] < 3

    @pytest.mark.parametrize("method", ["create_collection", "create_payload_index", "update_collection"])
    def test_a_lost_answer_to_a_creation_is_no_failure(
        self, client: FaultyClient, waits: list[float], method: str
    ) -> None:
        client.faults[method] = [do_then(method, time_out())]
        store = ServerStore("here", "images", StoreOptions(), client=client, sleep=waits.append)  # type: ignore[arg-type]
        store.create(SIGNATURE)
        store.sign(SIGNATURE)
        assert store.signature() == SIGNATURE
        assert client.calls.count(method) >= 2

    def test_a_thread_that_waits_does_not_block_the_others(self, store: ServerStore, client: FaultyClient) -> None:
        store.upsert(make_points(0, 1))
        waiting, go_on = threading.Event(), threading.Event()

        def hang(client: QdrantClient, *arguments: object, **options: Any) -> object:
            waiting.set()
            assert go_on.wait(60)
            return client.upsert(*arguments, **options)  # type: ignore[arg-type]

        client.faults["upsert"] = [hang]
        thread = threading.Thread(target=store.upsert, args=(make_points(1, 2),))
        thread.start()
        assert waiting.wait(60)
        assert (store.count(), len(store.search(QUERY))) == (1, 1)
        go_on.set()
        thread.join()
        assert store.count() == 2

    def test_a_local_client_is_used_by_one_thread_at_a_time(self, client: FaultyClient) -> None:
        active: list[int] = []
        store = ClientStore("here", "images", StoreOptions(), client=client)  # type: ignore[arg-type]
        store.create(SIGNATURE)

        def count(client: QdrantClient, *arguments: Any, **options: Any) -> object:
            active.append(1)
            time.sleep(0.01)
            assert active.pop() == 1
            assert active == []
            return client.count(*arguments, **options)

        client.faults["count"] = [count] * 20
        threads = [threading.Thread(target=lambda: [store.count() for _ in range(5)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.faults["count"] == []


class TestRequests:
    """What the real client sends, and its errors for real answers."""

    def test_a_collection_gets_its_signature_and_indexes_before_the_first_point(
        self, server: FakeServer, remote: Callable[..., ServerStore]
    ) -> None:
        store = remote()
        assert store.signature() is None
        store.create(SIGNATURE)
        store.upsert(make_points(0, 2))
        (created,) = server.bodies("PUT", "/collections/images")
        assert created["vectors"] == {"size": DIMENSION, "distance": "Cosine"}
        assert created["metadata"] == {"cocoa_embed": {"model": "m", "fingerprint": "0f", "dimension": DIMENSION}}
        assert "quantization_config" not in created
        indexed = {body["field_name"]: body["field_schema"] for body in server.bodies("PUT", "/index")}
        text = {"type": "text", "tokenizer": "word", "lowercase": True, "phrase_matching": True}
        assert indexed == {**PAYLOAD_INDEXES, "caption": text}
        writes = [request.path.rpartition("/")[2] for request in server.requests if request.method == "PUT"]
        assert writes == ["images", *["index"] * len(PAYLOAD_INDEXES), "points"]
        (stored,) = server.bodies("PUT", "/points")
        assert stored["points"][1]["id"] == name(1)
        assert stored["points"][1]["vector"] == make_points(0, 2)[1].vector.tolist()

    @pytest.mark.parametrize(
        ("quantization", "wanted"),
        [
            ("scalar", {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}}),
            ("binary", {"binary": {"always_ram": True}}),
        ],
    )
    def test_vectors_are_quantized_kept_on_disk_and_rescored(
        self, server: FakeServer, remote: Callable[..., ServerStore], quantization: str, wanted: dict
    ) -> None:
        store = remote(quantization=quantization, on_disk=True)
        store.create(SIGNATURE)
        store.search(QUERY._replace(offset=5))
        store.search(QUERY._replace(limit=500))
        (created,) = server.bodies("PUT", "/collections/images")
        assert created["quantization_config"] == wanted
        assert created["vectors"] == {"size": DIMENSION, "distance": "Cosine", "on_disk": True}
        few, many = (body["params"]["quantization"] for body in server.bodies("POST", "/query"))
        assert (few, many) == ({"rescore": True, "oversampling": 20}, {"rescore": True, "oversampling": 3})

    def test_indexes_that_a_killed_process_left_out_are_created_before_the_next_point(
        self, server: FakeServer, remote: Callable[..., ServerStore]
    ) -> None:
        server.fail("PUT /collections/images/index", lambda _: False, lambda _: False, answer_status(400))
        with pytest.raises(CocoaError, match="400"):
            remote().create(SIGNATURE)
        assert len(server.indexes["images"]) == 2
        store = remote()
        assert store.signature() == SIGNATURE
        for start in range(2):
            store.upsert(make_points(start, start + 1))
        assert server.indexes["images"].keys() == PAYLOAD_INDEXES.keys()
        writes = [request.path.rpartition("/")[2] for request in server.requests if request.method == "PUT"]
        assert writes[-2:] == ["points", "points"]

    def test_requests_are_bounded_in_points_and_in_bytes(
        self, server: FakeServer, remote: Callable[..., ServerStore]
    ) -> None:
        store = remote()
        store.create(Signature(model="m", fingerprint="0f", dimension=2048))
        store.upsert(make_points(0, 600, 2048, text="😀\n" * 1000))
        sizes = [request.size for request in server.requests if request.path.endswith("/points")]
        assert sum(len(body["points"]) for body in server.bodies("PUT", "/points")) == store.count() == 600
        assert max(sizes) <= MAX_BATCH_BYTES < MAX_BODY
        assert min(sizes[:-1]) > MAX_BATCH_BYTES / 2
        small = make_points(0, 600)
        counts = [len(batch) for batch in bounded_batches(small, [100] * 600)]
        assert counts == [MAX_BATCH_POINTS, MAX_BATCH_POINTS, 88]
        large = [MAX_BATCH_BYTES, 1, 2 * MAX_BATCH_BYTES, 3 * MAX_BATCH_BYTES, MAX_BATCH_BYTES - 1, 1, 1]
        assert [len(batch) for batch in bounded_batches(small[:7], large)] == [1, 1, 1, 1, 2, 1]

    def test_a_request_that_a_proxy_refuses_for_its_size_is_halved(
        self, server: FakeServer, remote: Callable[..., ServerStore], waits: list[float]
    ) -> None:
        store = remote()
        store.create(SIGNATURE)
        server.max_body = 20_000
        store.upsert(make_points(0, 100, text="x" * 1000))
        assert store.count() == 100
        with pytest.raises(CocoaError, match="413 Request Entity Too Large: Payload too large"):
            store.upsert(make_points(100, 101, text="x" * 30_000))
        assert waits == []

    @pytest.mark.parametrize("fault", [drop, drop_after, answer_status(503), answer_status(429, Retry_After="2")])
    def test_a_server_that_fails_twice_at_everything_has_everything_once(
        self,
        server: FakeServer,
        remote: Callable[..., ServerStore],
        waits: list[float],
        fault: Callable[[Any], bool],
    ) -> None:
        store = remote()
        for end in ("PUT /collections/images", "/index", "PUT /collections/images/points", "/points/delete", "/scroll"):
            server.fail(end, fault, fault)
        store.create(SIGNATURE)
        store.upsert(make_points(0, 300))
        store.delete([name(5), name(6)])
        assert len(list(store.scan(["number"]))) == store.count() == 298
        assert (server.faults, len(waits)) == ([], 10)

    def test_a_server_that_is_not_there_is_reported_soon(self, waits: list[float]) -> None:
        store = ServerStore("http://127.0.0.1:9", "images", StoreOptions(), sleep=waits.append)
        with pytest.raises(CocoaError, match=r"^Qdrant at http://127\.0\.0\.1:9 failed: .*refused \(tried 3 times\)$"):
            store.signature()
        assert len(waits) == FIRST_ATTEMPTS - 1
        assert sum(waits) < 3
        store.close()

    @pytest.mark.parametrize("content", [b"<html>Welcome</html>", b'{"ok": true}', b""])
    def test_another_kind_of_server_is_named(
        self, server: FakeServer, remote: Callable[..., ServerStore], content: bytes
    ) -> None:
        server.fail("/exists", answer_bytes(content))
        with pytest.raises(CocoaError, match="the answer is not one of Qdrant's"):
            remote().signature()

    def test_a_server_without_metadata_is_refused_with_its_version(
        self, server: FakeServer, remote: Callable[..., ServerStore]
    ) -> None:
        server.version, server.keeps_metadata = "1.15.4", False
        store = remote()
        for call in (store.create, store.sign):
            with pytest.raises(CocoaError, match=r"is of version 1.15.4, which does not keep .*; run 1.16 or newer"):
                call(SIGNATURE)
        server.keeps_metadata = True
        store.sign(SIGNATURE)
        assert store.signature() == SIGNATURE

    def test_two_processes_that_create_a_collection_at_once_both_have_it(
        self, remote: Callable[..., ServerStore]
    ) -> None:
        first, second = remote(), remote()
        assert first.signature() is second.signature() is None
        first.create(SIGNATURE)
        second.create(SIGNATURE)
        with pytest.raises(CocoaError, match="409 Conflict: Collection images already exists"):
            second.create(OTHER)

    def test_the_key_is_sent_and_never_printed(self, server: FakeServer, remote: Callable[..., ServerStore]) -> None:
        store = remote(api_key="hush-hush")
        server.fail("/exists", answer_status(401))
        with pytest.raises(CocoaError, match="401 Unauthorized") as raised:
            store.signature()
        assert server.requests[-1].headers["api-key"] == "hush-hush"
        assert "hush" not in str(raised.value) + repr(store) + repr(store.options) + store.location

    @pytest.mark.parametrize("is_local", [False, True])
    def test_closing_a_store_leaves_a_given_client_open(self, server: FakeServer, is_local: bool) -> None:
        given = QdrantClient(":memory:") if is_local else QdrantClient(url=server.url, check_compatibility=False)
        store = open_store(client=given, collection="images")
        store.create(SIGNATURE)
        store.close()
        assert store.count() == given.count("images").count == 0
        given.close()
        with pytest.raises(CocoaError, match="closed"):
            store.count()
