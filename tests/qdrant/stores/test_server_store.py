"""Requests to a Qdrant server, and its failures."""

import threading
from collections.abc import Callable
from typing import Any

import fake_qdrant
import pytest
from fake_qdrant import OTHER, SIGNATURE, FakeServer, answer_status, drop, drop_after, make_points, make_vector, name
from qdrant_client import QdrantClient

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import PAYLOAD_INDEXES, Query, Signature
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions
from cocoa_embed.integrations.qdrant.stores.server import ATTEMPTS, MAX_BATCH_BYTES, MAX_WAIT_SECONDS, ServerStore

pytestmark = pytest.mark.filterwarnings("ignore:Api key is used")

QUERY = Query(make_vector(1), limit=5)
CREATE, INDEX, UPSERT = "PUT /collections/images", "PUT /collections/images/index", "PUT /collections/images/points"
OpenRemote = Callable[..., ServerStore]


@pytest.fixture
def remote(server: FakeServer, waits: list[float], request: pytest.FixtureRequest) -> OpenRemote:
    """Opens a store on the loopback server."""

    def open_(url: str = server.url, **options: Any) -> ServerStore:
        store = ServerStore(url, "images", StoreOptions(**options))
        request.addfinalizer(store.close)
        return store

    return open_


@pytest.fixture
def store(remote: OpenRemote) -> ServerStore:
    store = remote()
    store.create(SIGNATURE)
    return store


@pytest.mark.parametrize("fault", [drop, drop_after, *map(answer_status, (429, 500, 502, 503))])
def test_temporary_failures_are_retried_and_everything_is_there_once(
    server: FakeServer, remote: OpenRemote, waits: list[float], fault: Callable[[Any], bool]
) -> None:
    store = remote()
    reads = ["/exists", "POST /collections/images/points", "/scroll", "/count", "/query/batch"]
    ends = [CREATE, INDEX, UPSERT, "/points/batch", *reads]
    for end in ends:
        server.fail(end, fault, fault)
    store.create(SIGNATURE)
    store.insert(make_points(0, 300))
    new = {"number": 7, "new": True}
    store.replace_payloads([(name(5), {}, None), (name(6), {}, None), (name(7), {}, new)])
    assert len(list(store.scan(["number"]))) == store.count() == 298
    assert store.retrieve([name(7)]) == {name(7): {**new, "revision": 1}}
    assert (len(store.search(QUERY)), store.signature()) == (5, SIGNATURE)
    assert (server.faults, len(waits)) == ([], 2 * len(ends))


def test_a_lasting_failure_ends_after_a_few_attempts_and_the_next_run_completes_the_batch(
    server: FakeServer, store: ServerStore, waits: list[float]
) -> None:
    server.fail(UPSERT, fake_qdrant.store_half, *[answer_status(503)] * (ATTEMPTS - 1))
    with pytest.raises(CocoaError, match=rf"^Qdrant at {server.url} failed: 503 .*: status 503 \(tried 6 times\)$"):
        store.insert(make_points(0, 10))
    assert sum(waits) < 30
    assert waits == sorted(waits)
    assert store.count() == 5
    store.insert(make_points(0, 10))
    assert store.count() == 10


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        *[(answer_status(code), f"{code} .*: status {code}$") for code in (400, 401, 413)],
        *[(fake_qdrant.answer_bytes(content), "the answer is not one of") for content in (b"<html>", b'{"ok": true}')],
        (fake_qdrant.answer_bytes(b'{"result": 5}'), "1 validation error"),
    ],
)
def test_permanent_failures_are_not_retried(
    server: FakeServer, store: ServerStore, waits: list[float], answer: Callable[[Any], bool], words: str
) -> None:
    server.fail("/count", answer)
    with pytest.raises(CocoaError, match=f"^Qdrant at {server.url} failed: {words}"):
        store.count()
    assert waits == []


def test_an_absent_server_is_reported_soon(remote: OpenRemote, waits: list[float]) -> None:
    with pytest.raises(CocoaError, match=r"^Qdrant at http://127\.0\.0\.1:9 failed: .*refused \(tried 3 times\)$"):
        remote("http://127.0.0.1:9").signature()
    assert sum(waits) < 3


def test_the_servers_retry_after_is_kept_within_limits(
    server: FakeServer, store: ServerStore, waits: list[float]
) -> None:
    date = "Wed, 21 Oct 2026 07:28:00 GMT"
    server.fail("/count", *(answer_status(429, Retry_After=after) for after in ("7", "3600", date)))
    store.count()
    assert waits[:2] == [7, MAX_WAIT_SECONDS]
    assert 2 <= waits[2] < 3


def test_a_thread_that_waits_does_not_block_the_others(server: FakeServer, store: ServerStore) -> None:
    store.insert(make_points(0, 1))
    waiting, go_on = threading.Event(), threading.Event()

    def hang(handler: Any) -> bool:  # noqa: ANN401
        waiting.set()
        return not go_on.wait(60)

    server.fail(UPSERT, hang)
    thread = threading.Thread(target=store.insert, args=(make_points(1, 2),))
    thread.start()
    assert waiting.wait(60)
    assert (store.count(), len(store.search(QUERY))) == (1, 1)
    go_on.set()
    thread.join()
    assert store.count() == 2


def test_a_collection_has_its_signature_and_indexes_before_the_first_point_also_after_a_kill(
    server: FakeServer, remote: OpenRemote
) -> None:
    server.fail(INDEX, lambda _: False, lambda _: False, answer_status(400))
    with pytest.raises(CocoaError, match="400"):
        remote().create(SIGNATURE)
    assert len(server.indexes["images"]) == 2
    store = remote()
    for start in range(2):
        store.create(SIGNATURE)
        store.insert(make_points(start, start + 1))
    (created,) = server.bodies("PUT", "/collections/images")
    assert created["vectors"] == {"size": SIGNATURE.dimension, "distance": "Cosine"}
    signature = {"model": "m", "fingerprint": "0f", "dimension": 8, "embed": "image", "vectors": 1}
    assert created["metadata"] == {"cocoa_embed": signature}
    assert "quantization_config" not in created
    indexed = {body["field_name"]: body["field_schema"] for body in server.bodies("PUT", "/index")}
    text = {"type": "text", "tokenizer": "word", "lowercase": True, "phrase_matching": True}
    assert indexed == {**PAYLOAD_INDEXES, "caption": text}
    writes = [request.path.rpartition("/")[2] for request in server.requests if request.method == "PUT"]
    assert writes == ["images", *["index"] * (len(PAYLOAD_INDEXES) + 1), "points", "points"]


def test_quantized_vectors_are_rescored_and_an_exact_search_goes_without_them(
    server: FakeServer, remote: OpenRemote
) -> None:
    store = remote(quantization="scalar")
    store.create(SIGNATURE)
    store.search(QUERY._replace(offset=5))
    store.search(QUERY._replace(limit=500))
    store.search(QUERY._replace(hnsw_ef=200))
    store.search(QUERY._replace(exact=True))
    batches = server.bodies("POST", "/query/batch")
    assert [search["params"] for body in batches for search in body["searches"]] == [
        {"quantization": {"rescore": True, "oversampling": 20}},
        {"quantization": {"rescore": True, "oversampling": 3}},
        {"hnsw_ef": 200, "quantization": {"rescore": True, "oversampling": 40}},
        {"exact": True, "quantization": {"ignore": True}},
    ]


def test_requests_are_bounded_in_bytes(server: FakeServer, remote: OpenRemote) -> None:
    store = remote()
    store.create(Signature(model="m", fingerprint="0f", dimension=2048))
    store.insert(make_points(0, 100, 2048, text="😀\n" * 1000))
    sizes = [request.size for request in server.requests if request.path.endswith("/points")]
    assert store.count() == 100
    assert MAX_BATCH_BYTES / 2 < min(sizes[:-1]) <= max(sizes) <= MAX_BATCH_BYTES
    store.insert(make_points(100, 102, 2048, text="x" * MAX_BATCH_BYTES))
    assert store.count() == 102


def test_a_request_too_large_for_a_proxy_is_halved(server: FakeServer, store: ServerStore) -> None:
    server.fail(UPSERT, *[answer_status(413)] * 2)
    store.insert(make_points(0, 8))
    sent = [len(body["points"]) for body in server.bodies("PUT", "/points")]
    assert sent[sent.index(8) :] == [8, 4, 2, 2, 4]
    assert store.count() == 8


def test_a_server_without_metadata_is_refused(server: FakeServer, remote: OpenRemote) -> None:
    server.keeps_metadata = False
    for _ in range(2):
        with pytest.raises(CocoaError, match=r"does not store a collection's metadata; run version 1.16 or newer"):
            remote().create(SIGNATURE)


def test_two_processes_that_create_a_collection_at_once_both_have_it(server: FakeServer, remote: OpenRemote) -> None:
    first, second = remote(), remote()

    def create_meanwhile(handler: Any) -> bool:  # noqa: ANN401
        first.create(SIGNATURE)
        return False

    server.fail(CREATE, create_meanwhile)
    second.create(SIGNATURE)
    with pytest.raises(CocoaError, match=r"was made with m .*not with another"):
        second.create(OTHER)


def test_the_key_is_sent_and_never_printed(server: FakeServer, remote: OpenRemote) -> None:
    store = remote(api_key="hush-hush")
    server.fail("/exists", answer_status(401))
    with pytest.raises(CocoaError, match="401 Unauthorized") as raised:
        store.signature()
    assert server.requests[-1].headers["api-key"] == "hush-hush"
    assert "hush" not in str(raised.value) + repr(store) + repr(store.options) + store.location


def test_closing_a_store_leaves_a_given_client_open(server: FakeServer) -> None:
    given = QdrantClient(url=server.url, check_compatibility=False)
    store = open_store(client=given, collection="images")
    assert (type(store), store.parallel) == (ServerStore, 4)
    store.create(SIGNATURE)
    store.close()
    assert store.count() == given.count("images").count == 0
    given.close()
    with pytest.raises(CocoaError, match="closed"):
        store.count()
