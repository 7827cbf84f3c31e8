"""The stores behind a qdrant-client: what a server is sent and what it may do wrong, and what a folder suffers."""

import errno
import json
import random
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
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
from store_kills import CREATE, check_after_kill, run_and_kill, run_process, set_disk, small_disk
from store_points import DIMENSION, SIGNATURE, make_points, name

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.qdrant.stores import local as local_store
from cocoa_embed.integrations.qdrant.stores.base import PAYLOAD_INDEXES, Point, Signature, StoreOptions, open_store
from cocoa_embed.integrations.qdrant.stores.client import ClientStore
from cocoa_embed.integrations.qdrant.stores.local import LocalStore, write_ahead
from cocoa_embed.integrations.qdrant.stores.server import (
    ATTEMPTS,
    BATCH_BYTES,
    BATCH_POINTS,
    FIRST_ATTEMPTS,
    LONGEST_WAIT,
    ServerStore,
    batches_by_bytes,
)


class Sleeper:
    """Stands for time.sleep: nothing takes any time."""

    def __init__(self) -> None:
        self.naps: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.naps.append(seconds)


@pytest.fixture
def sleeper() -> Sleeper:
    return Sleeper()


@pytest.fixture
def client() -> Iterator[FaultyClient]:
    memory = QdrantClient(":memory:")
    yield FaultyClient(memory)
    memory.close()


@pytest.fixture
def store(client: FaultyClient, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch) -> ServerStore:
    """A store over a server that is as quick as memory, and fails when told to."""
    warnings.simplefilter("ignore")
    store = ServerStore(None, "images", StoreOptions(), client=client, sleep=sleeper)  # type: ignore[arg-type]
    store.create(SIGNATURE)
    client.calls.clear()
    return store


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def remote(server: FakeServer, sleeper: Sleeper, **options: Any) -> ServerStore:
    return ServerStore(server.url, "images", StoreOptions(**options), sleep=sleeper)


class TestPassingFailures:
    """A server that fails is asked again, and told of when it does not recover."""

    @pytest.mark.parametrize(
        "error", [time_out(), refusal(), status(500), status(502), status(503), status(429), too_many(2)], ids=repr
    )
    def test_what_passes_is_tried_again(
        self, store: ServerStore, client: FaultyClient, sleeper: Sleeper, error: Exception
    ) -> None:
        client.faults["upsert"] = [error] * (ATTEMPTS - 1)
        store.upsert(make_points(0, 10))
        assert client.calls.count("upsert") == ATTEMPTS
        assert store.count() == 10
        assert len(sleeper.naps) == ATTEMPTS - 1

    @pytest.mark.parametrize(
        "call",
        [
            lambda store: store.count(),
            lambda store: list(store.scan(["number"])),
            lambda store: store.retrieve([name(1)]),
            lambda store: store.delete([name(1)]),
            lambda store: store.overwrite_payload(name(1), {}),
            lambda store: store.search(np.ones(DIMENSION, dtype=np.float32), limit=1),
            lambda store: store.signature(),
            lambda store: store.sign(SIGNATURE),
        ],
    )
    def test_every_question_is_asked_again(
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

    def test_a_failure_that_does_not_pass_ends_after_a_few_attempts(
        self, store: ServerStore, client: FaultyClient, sleeper: Sleeper
    ) -> None:
        client.faults["upsert"] = [status(503, "overloaded"), ...]
        with pytest.raises(CocoaError) as told:
            store.upsert(make_points(0, 10))
        assert str(told.value) == (
            "Qdrant at the given client did not do what was asked: 503 Reason: overloaded (tried 6 times)"
        )
        assert client.calls.count("upsert") == ATTEMPTS
        assert sum(sleeper.naps) < 30
        assert all(later > earlier for earlier, later in zip(sleeper.naps, sleeper.naps[1:], strict=False))
        client.faults.clear()
        store.upsert(make_points(0, 10))
        assert store.count() == 10

    @pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 413, 422])
    def test_what_will_not_pass_is_not_tried_again(
        self, store: ServerStore, client: FaultyClient, sleeper: Sleeper, code: int
    ) -> None:
        client.faults["upsert"] = [status(code, "Wrong input"), ...]
        with pytest.raises(CocoaError, match=rf"did not do what was asked: {code} Reason: Wrong input$"):
            store.upsert(make_points(0, 1))
        assert client.calls.count("upsert") == 1
        assert sleeper.naps == []

    def test_the_server_says_how_long_to_wait_but_not_for_ever(
        self, store: ServerStore, client: FaultyClient, sleeper: Sleeper
    ) -> None:
        no_number = QdrantException("Retry-After header value is not a valid integer: Wed, 21 Oct 2026 07:28:00 GMT")
        client.faults["count"] = [too_many(7), too_many(3600), no_number]
        store.count()
        assert sleeper.naps[:2] == [7, LONGEST_WAIT]
        assert 2 <= sleeper.naps[2] < 3

    @pytest.mark.parametrize("error", [time_out(), refusal(), status(502)], ids=repr)
    @pytest.mark.parametrize("share", [0, 0.5, 1])
    def test_a_batch_that_was_stored_in_part_is_there_once(
        self, store: ServerStore, client: FaultyClient, share: float, error: Exception
    ) -> None:
        points = make_points(0, 100)
        client.faults["upsert"] = [store_then(share, error)] * 2
        store.upsert(points)
        assert sorted(payload["number"] for _, payload in store.scan(["number"])) == list(range(100))

    def test_a_run_cut_short_in_a_batch_is_made_good_by_the_next(
        self, store: ServerStore, client: FaultyClient
    ) -> None:
        points = make_points(0, 100)
        client.faults["upsert"] = [store_then(0.3, time_out()), ...]
        with pytest.raises(CocoaError, match="timed out"):
            store.upsert(points)
        client.faults.clear()
        assert store.count() == 30
        store.upsert(points)
        assert store.count() == 100

    @pytest.mark.parametrize("method", ["create_collection", "create_payload_index", "update_collection"])
    def test_a_lost_answer_to_a_creation_is_no_failure(
        self, client: FaultyClient, sleeper: Sleeper, method: str
    ) -> None:
        client.faults[method] = [do_then(method, time_out())]
        store = ServerStore(None, "images", StoreOptions(), client=client, sleep=sleeper)  # type: ignore[arg-type]
        store.create(SIGNATURE)
        store.sign(SIGNATURE)
        assert store.signature() == SIGNATURE
        assert client.calls.count(method) >= 2

    def test_threads_are_not_held_up_by_another_ones_waiting(self, store: ServerStore, client: FaultyClient) -> None:
        store.upsert(make_points(0, 1))
        waiting, go_on = threading.Event(), threading.Event()

        def hang(client: QdrantClient, *arguments: object, **options: Any) -> object:
            waiting.set()
            assert go_on.wait(10)
            return client.upsert(*arguments, **options)  # type: ignore[arg-type]

        client.faults["upsert"] = [hang]
        thread = threading.Thread(target=store.upsert, args=(make_points(1, 2),))
        thread.start()
        assert waiting.wait(10)
        assert store.count() == 1
        assert len(store.search(np.ones(DIMENSION, dtype=np.float32), limit=5)) == 1
        go_on.set()
        thread.join()
        assert store.count() == 2

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (ResponseHandlingException(httpx.LocalProtocolError("Illegal header value")), "Illegal header value"),
            (ResponseHandlingException(ValueError("no field 'result'")), "no field 'result'"),
            (json.JSONDecodeError("Expecting value", "<html>", 0), "the answer is not one of Qdrant's"),
            (AssertionError("Count returned None"), "the answer is not one of Qdrant's"),
        ],
    )
    def test_what_is_no_answer_of_qdrant_is_told_at_once(
        self, store: ServerStore, client: FaultyClient, error: Exception, words: str
    ) -> None:
        client.faults["count"] = [error, ...]
        with pytest.raises(CocoaError, match=words):
            store.count()
        assert client.calls.count("count") == 1


class TestRequests:
    """What a server is really sent, by the real client, and the failures that this one makes of real answers."""

    def test_a_collection_is_created_signed_with_indexes_before_the_first_point(
        self, server: FakeServer, sleeper: Sleeper
    ) -> None:
        store = remote(server, sleeper)
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
        store.close()

    @pytest.mark.parametrize(
        ("quantization", "wanted"),
        [
            ("scalar", {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}}),
            ("binary", {"binary": {"always_ram": True}}),
        ],
    )
    def test_vectors_are_quantized_kept_on_disk_and_looked_at_again(
        self, server: FakeServer, sleeper: Sleeper, quantization: str, wanted: dict
    ) -> None:
        store = remote(server, sleeper, quantization=quantization, on_disk=True)
        store.create(SIGNATURE)
        store.search(np.ones(DIMENSION, dtype=np.float32), limit=5, offset=5)
        store.search(np.ones(DIMENSION, dtype=np.float32), limit=500)
        (created,) = server.bodies("PUT", "/collections/images")
        assert created["quantization_config"] == wanted
        assert created["vectors"] == {"size": DIMENSION, "distance": "Cosine", "on_disk": True}
        few, many = (body["params"]["quantization"] for body in server.bodies("POST", "/query"))
        assert (few, many) == ({"rescore": True, "oversampling": 20}, {"rescore": True, "oversampling": 3})
        store.close()

    def test_indexes_that_a_killed_process_left_out_are_made_before_the_next_point(
        self, server: FakeServer, sleeper: Sleeper
    ) -> None:
        first = remote(server, sleeper)
        server.fail("PUT /collections/images/index", lambda _: False, lambda _: False, answer_status(400))
        with pytest.raises(CocoaError, match="400"):
            first.create(SIGNATURE)
        first.close()
        assert len(server.indexes["images"]) == 2
        second = remote(server, sleeper)
        assert second.signature() == SIGNATURE
        second.upsert(make_points(0, 1))
        second.upsert(make_points(1, 2))
        assert server.indexes["images"].keys() == PAYLOAD_INDEXES.keys()
        writes = [request.path.rpartition("/")[2] for request in server.requests if request.method == "PUT"]
        assert writes[-2:] == ["points", "points"]
        asked = len(server.requests)
        remote(server, sleeper).upsert(make_points(2, 3))
        assert [request.method for request in server.requests[asked:]] == ["GET", "GET", "GET", "PUT"]
        second.close()

    def test_batches_are_bounded_in_points_and_in_bytes(self, server: FakeServer, sleeper: Sleeper) -> None:
        dimension = 2048
        store = remote(server, sleeper)
        store.create(Signature(model="m", fingerprint="0f", dimension=dimension))
        points = make_points(0, 600, dimension, text="😀\n" * 1000)
        store.upsert(points)
        sizes = [request.size for request in server.requests if request.path.endswith("/points")]
        counts = [len(body["points"]) for body in server.bodies("PUT", "/points")]
        assert sum(counts) == store.count() == 600
        assert max(sizes) <= BATCH_BYTES < MAX_BODY
        assert min(sizes[:-1]) > BATCH_BYTES / 2
        store.upsert([Point(point.id, point.vector, {}) for point in points])
        store.close()
        small = make_points(0, 600)
        assert [len(batch) for batch in batches_by_bytes(small, [100] * 600)] == [BATCH_POINTS, BATCH_POINTS, 88]
        large = [BATCH_BYTES, 1, 2 * BATCH_BYTES, 3 * BATCH_BYTES, BATCH_BYTES - 1, 1, 1]
        assert [len(batch) for batch in batches_by_bytes(small[:7], large)] == [1, 1, 1, 1, 2, 1]
        assert list(batches_by_bytes([], [])) == []

    def test_smaller_requests_are_made_where_a_proxy_takes_no_larger_ones(
        self, server: FakeServer, sleeper: Sleeper
    ) -> None:
        store = remote(server, sleeper)
        store.create(SIGNATURE)
        server.max_body = 20_000
        store.upsert(make_points(0, 100, text="x" * 1000))
        assert store.count() == 100
        with pytest.raises(CocoaError, match="413 Request Entity Too Large: Payload too large"):
            store.upsert(make_points(100, 101, text="x" * 30_000))
        assert sleeper.naps == []
        store.close()

    @pytest.mark.parametrize("fault", [drop, drop_after, answer_status(503), answer_status(429, Retry_After="2")])
    def test_a_server_that_fails_twice_has_everything_once(
        self, server: FakeServer, sleeper: Sleeper, fault: Callable[[Any], bool]
    ) -> None:
        store = remote(server, sleeper)
        for end in ("PUT /collections/images", "/index", "PUT /collections/images/points", "/points/delete", "/scroll"):
            server.fail(end, fault, fault)
        store.create(SIGNATURE)
        store.upsert(make_points(0, 300))
        store.delete([name(5), name(6)])
        assert len(list(store.scan(["number"]))) == store.count() == 298
        assert server.faults == []
        assert len(sleeper.naps) == 10
        store.close()

    def test_a_server_that_is_not_there_is_named_soon(self, sleeper: Sleeper) -> None:
        store = ServerStore("http://127.0.0.1:9", "images", StoreOptions(), sleep=sleeper)
        with pytest.raises(CocoaError, match=r"^Qdrant at http://127\.0\.0\.1:9 did .*Connection refused \(tried 3"):
            store.signature()
        assert len(sleeper.naps) == FIRST_ATTEMPTS - 1
        assert sum(sleeper.naps) < 3
        store.close()

    @pytest.mark.parametrize("content", [b"<html>Welcome</html>", b'{"ok": true}', b""])
    def test_another_kind_of_server_is_named(self, server: FakeServer, sleeper: Sleeper, content: bytes) -> None:
        store = remote(server, sleeper)
        server.fail("/exists", answer_bytes(content))
        with pytest.raises(CocoaError, match="the answer is not one of Qdrant's"):
            store.signature()
        store.close()

    def test_a_server_without_metadata_is_refused_by_its_version(self, sleeper: Sleeper) -> None:
        with fake_server(version="1.15.4", keeps_metadata=False) as server:
            store = remote(server, sleeper)
            words = "is of version 1.15.4, which does not keep a collection's metadata; run 1.16 or newer"
            with pytest.raises(CocoaError, match=words):
                store.create(SIGNATURE)
            with pytest.raises(CocoaError, match=words):
                store.sign(SIGNATURE)
            server.keeps_metadata = True
            store.sign(SIGNATURE)
            assert store.signature() == SIGNATURE
            store.close()

    def test_two_processes_that_create_a_collection_at_once_both_have_it(
        self, server: FakeServer, sleeper: Sleeper
    ) -> None:
        first, second = remote(server, sleeper), remote(server, sleeper)
        assert first.signature() is second.signature() is None
        first.create(SIGNATURE)
        second.create(SIGNATURE)
        with pytest.raises(CocoaError, match="409 Conflict: Collection images already exists"):
            second.create(Signature(model="other", fingerprint="ff", dimension=DIMENSION))
        first.close()
        second.close()

    def test_the_key_is_sent_and_never_told(self, server: FakeServer, sleeper: Sleeper) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store = ServerStore(server.url, "images", StoreOptions(), api_key="hush-hush", sleep=sleeper)
            server.fail("/exists", answer_status(401))
            with pytest.raises(CocoaError, match="401 Unauthorized") as told:
                store.signature()
        assert server.requests[-1].headers["api-key"] == "hush-hush"
        assert "hush" not in str(told.value) + repr(store) + store.place
        store.close()

    def test_a_closed_store_connects_again_and_a_given_client_stays_open(
        self, server: FakeServer, sleeper: Sleeper
    ) -> None:
        given = QdrantClient(url=server.url, check_compatibility=False)
        store = open_store(client=given, collection="images")
        store.create(SIGNATURE)
        store.close()
        assert store.count() == given.count("images").count == 0
        given.close()
        with pytest.raises(CocoaError, match="client has been closed"):
            store.count()
        own = remote(server, sleeper)
        own.close()
        assert own.count() == 0
        own.close()
        assert own.count() == 0
        own.close()


class TestGivenClients:
    def test_a_closed_client_in_memory_is_told_of(self) -> None:
        client = QdrantClient(":memory:")
        store = open_store(client=client, collection="images")
        store.create(SIGNATURE)
        store.close()
        assert store.count() == 0
        client.close()
        with pytest.raises(CocoaError, match="closed"):
            store.count()

    def test_a_local_client_is_asked_by_one_thread_at_a_time(self, client: FaultyClient) -> None:
        active: list[int] = []
        store = ClientStore("images", StoreOptions(), client=client)  # type: ignore[arg-type]
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


LIMIT_FILES = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
"""
FILL = """
store.create(SIGNATURE)
stored = 0
try:
    while True:
        store.upsert(make_points(stored, stored + 50, text="x" * 1000))
        stored += 50
except CocoaError as error:
    print(error)
    print(stored)
"""


class TestFolders:
    def test_a_second_process_is_named_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "store"
        first = open_store(path=path, collection="images")
        first.create(SIGNATURE)
        for collection in ("images", "others"):
            with pytest.raises(CocoaError, match=r"store is in use by another process; wait for it, or run a Qdrant"):
                open_store(path=path, collection=collection).create(SIGNATURE)
        assert "in use by another process" in run_process("path", path, "store.signature()").stderr
        plain = f"from qdrant_client import QdrantClient; QdrantClient(path={str(path)!r})"
        other = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=False)
        assert "already accessed by another instance" in other.stderr
        first.upsert(make_points(0, 3))
        first.close()
        assert open_store(path=path, collection="images").count() == 3

    def test_a_plain_client_on_the_same_folder_is_another_process_too(self, tmp_path: Path) -> None:
        client = QdrantClient(path=str(tmp_path / "store"))
        store = open_store(path=tmp_path / "store", collection="images")
        with pytest.raises(CocoaError, match="in use by another process"):
            store.signature()
        client.close()
        assert store.signature() is None
        store.close()

    def test_reading_creates_nothing(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", tmp_path):
            store = open_store(path=path, collection="images")
            assert store.signature() is None
            assert store.collections() is None
            with pytest.raises(CocoaError, match=r"there is no index in .*; run cocoa-embed index first"):
                store.count()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("meta", ["{", "[]", "{}", '{"collections": null}', '{"collections": {"a": {}}}'])
    def test_a_broken_store_is_named_and_left_as_it_is(self, tmp_path: Path, meta: str) -> None:
        (tmp_path / "meta.json").write_text(meta)
        store = open_store(path=tmp_path, collection="images")
        for call in (store.signature, lambda: store.create(SIGNATURE)):
            with pytest.raises(CocoaError, match="cannot be opened"):
                call()
        assert (tmp_path / "meta.json").read_text() == meta

    def test_a_storage_that_is_no_database_is_named(self, tmp_path: Path) -> None:
        store = open_store(path=tmp_path / "store", collection="images")
        store.create(SIGNATURE)
        store.close()
        (tmp_path / "store" / "collection" / "images" / "storage.sqlite").write_bytes(b"x" * 5000)
        with pytest.raises(CocoaError, match=r"cannot be opened \(file is not a database\)"):
            store.signature()
        store.close()

    def test_what_holds_something_else_is_refused_and_left_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a.png").touch()
        for path, words in (("file", "file is a file"), ("folder", "holds something else")):
            store = open_store(path=tmp_path / path, collection="images")
            for call in (store.signature, lambda store=store: store.create(SIGNATURE)):
                with pytest.raises(CocoaError, match=words):
                    call()
        assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["a.png"]

    @pytest.mark.parametrize("left", [[], [".cocoa-lock"], [".cocoa-lock", "meta.json.7.new"], ["meta.json", ".lock"]])
    def test_the_beginnings_of_a_store_are_gone_on_with(self, tmp_path: Path, left: list[str]) -> None:
        for file in left:
            (tmp_path / file).touch()
        store = open_store(path=tmp_path, collection="images")
        assert store.signature() is None
        store.create(SIGNATURE)
        store.upsert(make_points(0, 3))
        store.close()
        assert open_store(path=tmp_path, collection="images").count() == 3

    def test_an_empty_list_of_collections_beside_a_collection_is_not_taken_for_a_beginning(
        self, tmp_path: Path
    ) -> None:
        store = open_store(path=tmp_path, collection="images")
        store.create(SIGNATURE)
        store.close()
        (tmp_path / "meta.json").write_text("")
        with pytest.raises(CocoaError, match="cannot be opened"):
            store.signature()

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        store = open_store(path=tmp_path / "store", collection="images")
        with monkeypatch.context() as patch:
            patch.setattr(local_store, "lock_file", fail)
            with pytest.raises(CocoaError, match=r"store cannot be opened \(.*Read-only file system"):
                store.create(SIGNATURE)
        with monkeypatch.context() as patch:
            patch.setattr(local_store, "write_atomically", fail)
            with pytest.raises(CocoaError, match=r"store cannot be opened \(.*Read-only file system"):
                store.create(SIGNATURE)
        store.create(SIGNATURE)
        assert store.signature() == SIGNATURE
        store.close()

    def test_a_full_disk_is_named_and_what_was_stored_stays(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 2) as disk:
            run = run_process("path", disk / "store", FILL)
            assert run.returncode == 0, run.stderr
            told, stored = run.stdout.splitlines()
            assert told == f"Qdrant at {disk / 'store'} did not do what was asked: database or disk is full"
            store = open_store(path=disk / "store", collection="images")
            assert int(stored) <= store.count() <= int(stored) + 50
            store.close()
            set_disk(disk, "size=20m")
            store.upsert(make_points(0, 300, text="x" * 1000))
            assert sorted(payload["number"] for _, payload in store.scan(["number"]))[:300] == list(range(300))
            store.close()

    def test_a_file_that_may_not_grow_is_named_and_what_was_stored_stays(self, tmp_path: Path) -> None:
        run = run_process("path", tmp_path / "store", LIMIT_FILES + FILL)
        assert run.returncode == 0, run.stderr
        told, stored = run.stdout.splitlines()
        assert told == f"Qdrant at {tmp_path / 'store'} did not do what was asked: disk I/O error"
        store = open_store(path=tmp_path / "store", collection="images")
        assert int(stored) <= store.count() <= int(stored) + 50
        store.upsert(make_points(0, 300, text="x" * 1000))
        assert store.count() == 300
        store.close()

    def test_a_read_only_folder_is_named(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 20) as disk:
            store = open_store(path=disk / "store", collection="images")
            store.create(SIGNATURE)
            store.upsert(make_points(0, 3))
            store.close()
            set_disk(disk, "ro")
            for call in (store.count, lambda: store.upsert(make_points(3, 4)), lambda: store.create(SIGNATURE)):
                with pytest.raises(CocoaError, match=r"store cannot be opened \(.*Read-only file system"):
                    call()
            with pytest.raises(CocoaError, match=r"other cannot be opened \(.*Read-only file system"):
                open_store(path=disk / "other", collection="images").create(SIGNATURE)
            set_disk(disk, "rw")
            assert store.count() == 3
            store.close()

    def test_changes_go_to_a_log_that_is_gone_when_the_store_is_closed(self, tmp_path: Path) -> None:
        store = open_store(path=tmp_path, collection="images")
        store.create(SIGNATURE)
        folder = tmp_path / "collection" / "images"
        store.upsert(make_points(0, 50))
        assert (folder / "storage.sqlite-wal").stat().st_size > 0
        store.close()
        assert [entry.name for entry in folder.iterdir()] == ["storage.sqlite"]
        with sqlite3.connect(folder / "storage.sqlite") as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("SELECT count(*) FROM points").fetchone() == (50,)
        connection.close()
        plain = QdrantClient(path=str(tmp_path))
        assert plain.count("images").count == 50
        plain.close()

    def test_a_commit_does_not_wait_for_the_disk(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path, "images")
        store.create(SIGNATURE)
        for _ in range(2):
            client = store._connected()
            connection = client._client.collections["images"].storage.storage
            assert connection.execute("PRAGMA synchronous").fetchone() == (1,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            store.close()

    def test_a_client_that_cannot_have_a_log_is_left_alone(self) -> None:
        client = QdrantClient(":memory:")
        write_ahead(client, "none")
        write_ahead(FaultyClient(client), "none")  # type: ignore[arg-type]
        client.close()
        remote = QdrantClient(url="http://127.0.0.1:9", check_compatibility=False)
        write_ahead(remote, "none")
        remote.close()

    def test_a_store_that_nobody_closed_says_nothing_at_the_end(self, tmp_path: Path) -> None:
        run = run_process("path", tmp_path / "store", CREATE + "store.upsert(make_points(0, 7)); print(store.count())")
        assert (run.stdout.split(), run.stderr) == (["7"], "")

    def test_a_store_that_is_killed_has_what_it_said(self, tmp_path: Path) -> None:
        stored = 0
        for seconds in (0.0, 0.02, 0.1, 0.3):
            stored = run_and_kill("path", tmp_path / "store", stored, seconds)
            stored = check_after_kill("path", tmp_path / "store", stored)
        assert stored > 0

    @pytest.mark.slow
    def test_a_store_that_is_killed_at_random_has_what_it_said(self, tmp_path: Path) -> None:
        moments = random.Random(0)
        for run in range(6):
            stored = 0
            for _ in range(5):
                seconds = moments.random() ** 2 * 0.5
                stored = run_and_kill("path", tmp_path / str(run), stored, seconds)
                stored = check_after_kill("path", tmp_path / str(run), stored)
