"""What every home of points has in common: one set of expectations for all of them."""

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

from qdrant_client import QdrantClient, models
from store_faults import fake_server

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant.stores.base import (
    UNKNOWN_MODEL,
    Point,
    Signature,
    Store,
    StoreOptions,
    open_store,
    require_signature,
)
from cocoa_embed.integrations.qdrant.stores.checks import check_points
from cocoa_embed.integrations.qdrant.stores.edge import EdgeStore
from cocoa_embed.integrations.qdrant.stores.local import LocalStore
from cocoa_embed.integrations.qdrant.stores.server import ServerStore

DIMENSION = 4
SIGNATURE = Signature(model="cocoa-qwen2vl", fingerprint="0f" * 32, dimension=DIMENSION)
OTHER = Signature(model="another žluť", fingerprint="ab" * 32, dimension=DIMENSION)
HOMES = ("memory", "local", "server", "edge")
OpenHome = Callable[..., Store]


@pytest.fixture(params=HOMES)
def open_home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenHome]:
    """Opens a collection in one home, which is the same at each call."""
    opened: list[Store] = []

    def opener(**place: Any) -> OpenHome:
        def open_(collection: str = "images") -> Store:
            opened.append(open_store(collection=collection, **place))
            return opened[-1]

        return open_

    if request.param == "memory":
        client = QdrantClient(":memory:")
        yield opener(client=client)
        client.close()
    elif request.param == "server":
        with fake_server() as server:
            yield opener(url=server.url)
            for store in opened:
                store.close()
    else:
        name = {"local": "path", "edge": "edge"}[request.param]
        yield opener(**{name: tmp_path / "store"})
        for store in opened:
            store.close()


@pytest.fixture
def store(open_home: OpenHome) -> Store:
    store = open_home()
    store.create(SIGNATURE)
    return store


def name(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))


def make_point(number: int, angle: float = 0.0, **payload: Any) -> Point:
    vector = np.array([np.cos(angle), np.sin(angle), 0, 0], dtype=np.float32)
    return Point(name(number), vector, {"path": f"/a/{number}.png", "number": number, **payload})


def make_points(numbers: Sequence[int]) -> list[Point]:
    return [make_point(number, angle=number / 10_000) for number in numbers]


def where(**fields: Any) -> models.Filter:
    return models.Filter(
        must=[models.FieldCondition(key=key, match=models.MatchValue(value=value)) for key, value in fields.items()]
    )


class TestEveryHome:
    def test_a_place_that_was_never_written_to_has_no_collection(self, open_home: OpenHome) -> None:
        store = open_home()
        assert store.signature() is None
        with pytest.raises(CocoaError, match=r"there is no (index in|collection 'images' in .*it is empty)"):
            require_signature(store)
        assert store.signature() is None

    def test_a_new_collection_is_empty_and_says_who_made_it(self, open_home: OpenHome) -> None:
        store = open_home()
        store.create(SIGNATURE)
        assert store.signature() == require_signature(store) == SIGNATURE
        assert store.count() == 0
        assert list(store.scan(["path"])) == []
        assert store.search(np.ones(DIMENSION, dtype=np.float32), limit=3) == []
        assert store.collections() == ["images"]

    def test_creating_the_same_collection_again_changes_nothing(self, store: Store, open_home: OpenHome) -> None:
        store.upsert(make_points([1]))
        store.create(SIGNATURE)
        assert (store.signature(), store.count()) == (SIGNATURE, 1)
        with pytest.raises(CocoaError):
            store.create(OTHER)
        assert (store.signature(), store.count()) == (SIGNATURE, 1)

    def test_another_models_signature_is_given_as_it_is(self, open_home: OpenHome) -> None:
        first = open_home("first")
        first.create(OTHER)
        first.close()
        second = open_home("second")
        second.create(SIGNATURE)
        assert second.signature() == SIGNATURE
        second.close()
        assert open_home("first").signature() == OTHER

    def test_a_signature_is_not_written_over_another_one(self, store: Store) -> None:
        store.sign(SIGNATURE)
        with pytest.raises(CocoaError, match="was made with cocoa-qwen2vl, not with another"):
            store.sign(OTHER)
        with pytest.raises(CocoaError, match="holds vectors of 4 dimensions, cocoa-qwen2vl makes 5"):
            store.sign(Signature(model=SIGNATURE.model, fingerprint=SIGNATURE.fingerprint, dimension=5))
        assert store.signature() == SIGNATURE

    def test_a_collection_that_is_not_there_is_an_error_that_names_it(self, store: Store, open_home: OpenHome) -> None:
        store.close()
        other = open_home("other")
        calls: list[Callable[[], object]] = [
            other.count,
            lambda: list(other.scan(["path"])),
            lambda: other.retrieve([name(1)]),
            lambda: other.upsert(make_points([1])),
            lambda: other.delete([name(1)]),
            lambda: other.overwrite_payload(name(1), {}),
            lambda: other.search(np.ones(DIMENSION, dtype=np.float32), limit=1),
            lambda: other.sign(SIGNATURE),
        ]
        for call in calls:
            with pytest.raises(CocoaError, match="other"):
                call()
        with pytest.raises(CocoaError, match=r"no collection 'other' in .*\(it holds images\); run cocoa-embed index"):
            require_signature(other)
        assert other.collections() == ["images"]

    def test_points_come_back_as_they_were_stored(self, store: Store) -> None:
        payload = {
            "path": "/a/žluť 😀\n\t\"'.png",
            "caption": None,
            "empty": {},
            "none": [],
            "metadata": {"a.b": [1, -1, 2**62, 1.5, 1e-300, True, None, "x", {"deep": [[]]}], "": "no name"},
            "mtime": 1759000000.123456,
            "zero": -0.0,
            "whole": 1.0,
            "long": "x" * 100_000,
        }
        point = Point(name(1), np.array([1, 2, 3, 4], dtype=np.float32), payload)
        store.upsert([point])
        (hit,) = store.search(point.vector, limit=10)
        assert (hit.id, hit.path) == (point.id, payload["path"])
        assert hit.score == pytest.approx(1, abs=1e-6)
        for found in (hit.payload, store.retrieve([point.id])[point.id], dict(store.scan(list(payload)))[point.id]):
            assert repr(sorted(found.items())) == repr(sorted(payload.items()))

    def test_a_point_of_the_same_id_is_replaced(self, store: Store) -> None:
        store.upsert([make_point(1, angle=0, old=True), make_point(2)])
        store.upsert([make_point(1, angle=1), make_point(1, angle=2, last=True)])
        assert store.count() == 2
        assert store.retrieve([name(1)]) == {name(1): {"path": "/a/1.png", "number": 1, "last": True}}
        assert store.search(make_point(1, angle=2).vector, limit=1)[0].score == pytest.approx(1, abs=1e-6)

    def test_nothing_to_do_is_no_error(self, store: Store) -> None:
        store.upsert([])
        store.delete([])
        store.delete([name(1)])
        store.finish()
        assert store.retrieve([]) == store.retrieve([name(1)]) == {}
        assert store.count() == 0

    def test_more_points_than_a_page_are_all_seen_once(self, store: Store) -> None:
        numbers = range(2_345)
        store.upsert(make_points(numbers))
        assert store.count() == 2_345
        seen = list(store.scan(["number", "absent"]))
        assert sorted(id_ for id_, _ in seen) == sorted(map(name, numbers))
        assert sorted(payload["number"] for _, payload in seen) == list(numbers)
        assert all(payload.keys() == {"number"} for _, payload in seen)
        assert {str(payload) for _, payload in store.scan([])} == {"{}"}
        some = [name(number) for number in range(1_000, 3_000)]
        assert store.retrieve(some).keys() == set(some[:1_345])
        store.delete(some)
        assert store.count() == 1_000
        assert {payload["number"] for _, payload in store.scan(["number"])} == set(range(1_000))

    def test_a_payload_is_replaced_whole_and_the_vector_stays(self, store: Store) -> None:
        store.upsert([make_point(1, angle=1), make_point(2)])
        store.overwrite_payload(name(1), {"path": "/b", "metadata": {"x": [None]}})
        assert store.retrieve([name(1)]) == {name(1): {"path": "/b", "metadata": {"x": [None]}}}
        assert store.search(make_point(1, angle=1).vector, limit=1)[0].id == name(1)
        with pytest.raises(CocoaError):
            store.overwrite_payload(name(3), {"path": "/c"})
        assert store.count() == 2

    def test_hits_are_the_best_first_with_limit_offset_and_threshold(self, store: Store) -> None:
        store.upsert([make_point(number, angle=number / 10) for number in range(10)])
        query = make_point(0).vector
        every = store.search(query, limit=100)
        assert [hit.payload["number"] for hit in every] == list(range(10))
        assert [hit.score for hit in every] == pytest.approx([np.cos(number / 10) for number in range(10)], abs=1e-5)
        assert store.search(query, limit=3, offset=2) == every[2:5]
        assert store.search(query, limit=3, offset=10) == []
        assert store.search(query, limit=10, score_threshold=0.9) == every[:5]
        assert store.search(2 * query, limit=1) == every[:1]

    def test_a_score_that_is_the_threshold_is_a_hit(self, store: Store) -> None:
        store.upsert([Point(name(1), np.array([1, 0, 0, 0], dtype=np.float32), {})])
        query = np.array([1, 0, 0, 0], dtype=np.float32)
        assert len(store.search(query, limit=1, score_threshold=1.0)) == 1
        assert store.search(query, limit=1, score_threshold=1.001) == []

    def test_filters_let_through_what_they_say(self, store: Store) -> None:
        store.upsert([make_point(number, angle=number / 10, mime=["a", "b"][number % 2]) for number in range(10)])
        query = make_point(0).vector
        found = store.search(query, limit=2, offset=1, query_filter=where(mime="b"))
        assert [hit.payload["number"] for hit in found] == [3, 5]
        both = models.Filter(
            must=models.FieldCondition(key="number", range=models.Range(gte=4)),
            must_not=[models.FieldCondition(key="mime", match=models.MatchAny(any=["b", "c"]))],
        )
        assert [hit.payload["number"] for hit in store.search(query, limit=9, query_filter=both)] == [4, 6, 8]
        wrong = models.Filter(must=[models.IsEmptyCondition(is_empty=models.PayloadField(key="a b]"))])
        with pytest.raises(CocoaError):
            store.search(query, limit=9, query_filter=wrong)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_vector_that_is_not_finite_is_refused_before_anything_is_written(
        self, store: Store, value: float
    ) -> None:
        bad = make_point(7)
        bad.vector[1] = value
        with pytest.raises(
            CocoaError, match=rf"point {name(7)} \('/a/7.png'\) has a vector that is not finite"
        ) as told:
            store.upsert([*make_points(range(6)), bad, make_point(8)])
        assert "nothing was written" in str(told.value)
        assert store.count() == 0
        with pytest.raises(CocoaError, match="query's vector is not finite"):
            store.search(bad.vector, limit=1)

    @pytest.mark.parametrize(
        ("payload", "words"),
        [
            ({"a": [1, {"b": float("nan")}]}, "payload that is not JSON"),
            ({"a": "\udcff"}, "payload that is not JSON"),
            ({"\ud800": 1}, "payload that is not JSON"),
            ({"a": Path("/a")}, "payload that is not JSON"),
            ({"a": b"image"}, "payload that is not JSON"),
        ],
    )
    def test_a_payload_that_is_not_json_is_refused_before_anything_is_written(
        self, store: Store, payload: dict, words: str
    ) -> None:
        bad = Point(name(7), make_point(7).vector, payload)
        with pytest.raises(CocoaError, match=words):
            store.upsert([make_point(1), bad])
        assert store.count() == 0
        store.upsert([make_point(1)])
        with pytest.raises(CocoaError, match=words):
            store.overwrite_payload(name(1), payload)
        assert store.retrieve([name(1)])[name(1)]["number"] == 1

    def test_a_vector_of_another_dimension_is_refused_before_anything_is_written(
        self, store: Store, open_home: OpenHome
    ) -> None:
        bad = Point(name(7), np.ones(DIMENSION + 1, dtype=np.float32), {})
        store.close()
        for one in (store, open_home()):
            with pytest.raises(CocoaError, match="dimension"):
                one.upsert([make_point(1), bad])
            assert one.count() == 0
            with pytest.raises(CocoaError):
                one.search(bad.vector, limit=1)
            one.close()

    @pytest.mark.parametrize("id_", ["5", "", "image", "{" + name(1) + "}", name(1).upper(), name(1).replace("-", "")])
    def test_an_id_that_a_server_refuses_or_spells_otherwise_is_refused(self, store: Store, id_: str) -> None:
        with pytest.raises(CocoaError, match="no UUID"):
            store.upsert([Point(id_, make_point(1).vector, {})])
        assert store.count() == 0

    def test_what_was_stored_is_there_when_the_store_is_opened_again(self, open_home: OpenHome) -> None:
        store = open_home("held-out žluť")
        store.create(SIGNATURE)
        store.upsert([make_point(number, angle=number / 100) for number in range(100)])
        store.delete([name(5)])
        store.overwrite_payload(name(6), {"path": "/new"})
        store.close()
        store.close()
        assert store.count() == 99
        store.close()
        again = open_home("held-out žluť")
        assert again.signature() == SIGNATURE
        assert again.count() == len(list(again.scan(["path"]))) == 99
        assert again.retrieve([name(5), name(6)]) == {name(6): {"path": "/new"}}
        assert again.search(make_point(7, angle=0.07).vector, limit=1)[0].id == name(7)
        again.upsert(make_points([5]))
        assert again.count() == 100

    def test_points_are_found_before_and_after_the_index_is_built(self, store: Store) -> None:
        store.upsert(make_points(range(0, 3_000, 3)))
        for _ in range(2):
            for number in (0, 300, 2_997):
                hit = store.search(make_point(0, angle=number / 10_000).vector, limit=1)[0]
                assert abs(hit.payload["number"] - number) <= 3
                assert hit.score > 1 - 1e-6
            store.finish()
        store.upsert(make_points([5_000]))
        assert store.search(make_point(0, angle=0.5).vector, limit=1)[0].id == name(5_000)

    def test_threads_share_a_store(self, store: Store) -> None:
        failures: list[BaseException] = []

        def work(thread: int) -> None:
            try:
                for start in range(0, 60, 20):
                    points = make_points(range(thread * 100 + start, thread * 100 + start + 20))
                    store.upsert(points)
                    assert store.retrieve([points[0].id]).keys() == {points[0].id}
                    assert store.search(points[0].vector, limit=1)
                    assert len(list(store.scan(["number"]))) >= 20
                    store.delete([points[1].id])
            except BaseException as error:  # noqa: BLE001 - seen below, in the test's own thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.count() == 4 * 3 * 19


class TestForeignPoints:
    """Collections that others made, and points that others put beside ours."""

    @pytest.mark.parametrize("home", ["memory", "server"])
    def test_points_with_integer_ids_and_without_payload_are_listed_and_left(self, home: str) -> None:
        with fake_server() as server:
            place: dict[str, Any] = {"client": server.client} if home == "memory" else {"url": server.url}
            store = open_store(collection="images", **place)
            store.create(SIGNATURE)
            store.upsert([make_point(1)])
            foreign = models.PointStruct(id=5, vector=[0, 0, 1, 0])
            server.client.upsert("images", points=[foreign, models.PointStruct(id=2**64 - 1, vector=[0, 0, 0, 1])])
            seen = dict(store.scan(["path", "sha256"]))
            assert seen == {name(1): {"path": "/a/1.png"}, "5": {}, str(2**64 - 1): {}}
            assert store.count() == 3
            assert store.retrieve(["5", name(1)]).keys() == {"5", name(1)}
            hit = store.search(np.array([0, 0, 1, 0], dtype=np.float32), limit=1)[0]
            assert (hit.id, hit.path, hit.payload) == ("5", "", {})
            store.delete(["5"])
            assert store.count() == 2
            store.close()

    @pytest.mark.parametrize("home", ["memory", "server", "local"])
    def test_a_collection_of_others_has_no_fingerprint_and_can_be_signed_once(self, home: str, tmp_path: Path) -> None:
        with fake_server() as server:
            client = QdrantClient(path=str(tmp_path / "store")) if home == "local" else server.client
            vectors = models.VectorParams(size=DIMENSION, distance=models.Distance.COSINE)
            client.create_collection("images", vectors_config=vectors, metadata={"theirs": {"kept": 1}})
            if home == "local":
                client.close()
            place: dict[str, Any] = {
                "memory": {"client": server.client},
                "server": {"url": server.url},
                "local": {"path": tmp_path / "store"},
            }[home]
            store = open_store(collection="images", **place)
            assert store.signature() == Signature(model=UNKNOWN_MODEL, fingerprint=None, dimension=DIMENSION)
            with pytest.raises(CocoaError, match="makes 7"):
                store.sign(Signature(model="m", fingerprint="00", dimension=7))
            store.sign(SIGNATURE)
            store.upsert([make_point(1)])
            assert store.signature() == SIGNATURE
            store.close()
            client = QdrantClient(path=str(tmp_path / "store")) if home == "local" else server.client
            assert (client.get_collection("images").config.metadata or {})["theirs"] == {"kept": 1}
            assert client.count("images").count == 1

    @pytest.mark.parametrize("home", ["memory", "server"])
    def test_other_vectors_than_ours_are_refused(self, home: str) -> None:
        with fake_server() as server:
            place: dict[str, Any] = {"client": server.client} if home == "memory" else {"url": server.url}
            maxsim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
            cosine = models.VectorParams(size=48, distance=models.Distance.COSINE)
            server.client.create_collection("named", vectors_config={"v": cosine, "w": cosine})
            dot = models.VectorParams(size=48, distance=models.Distance.DOT)
            server.client.create_collection("dots", vectors_config=dot)
            several = models.VectorParams(size=48, distance=models.Distance.COSINE, multivector_config=maxsim)
            server.client.create_collection("several", vectors_config=several)
            server.client.create_collection("none", vectors_config={})
            wanted = {
                "named": r"holds named vectors \(v, w\)",
                "dots": r"48 dimensions \(Dot\).*48 \(Cosine\); choose another collection",
                "several": r"48 dimensions \(several a point\)",
                "none": r"holds named vectors \(\)",
            }
            for collection, words in wanted.items():
                with pytest.raises(CocoaError, match=words):
                    open_store(collection=collection, **place).signature()


class TestOpening:
    def test_each_place_has_its_kind_of_store(self, tmp_path: Path) -> None:
        client = QdrantClient(url="http://127.0.0.1:9", check_compatibility=False)
        assert isinstance(open_store(path="x", collection="c"), LocalStore)
        assert isinstance(open_store(url="http://127.0.0.1:9", collection="c"), ServerStore)
        assert isinstance(open_store(edge="x", collection="c"), EdgeStore)
        remote = open_store(client=client, collection="c")
        assert isinstance(remote, ServerStore)
        remote.close()
        assert [open_store(path="x", collection="c").parallel, remote.parallel] == [1, 4]
        assert not Path("x").exists()
        client.close()

    def test_one_place_has_to_be_given(self) -> None:
        with pytest.raises(UsageError, match="more than one place to store points was given"):
            open_store(path="x", edge="y", collection="c")
        with pytest.raises(UsageError, match="no place to store points was given"):
            open_store(collection="c")

    @pytest.mark.parametrize("collection", ["", ".", "..", "a/b", "a\\b", 'a"b', "a\0b", "c:", "what?", "n" * 256])
    def test_what_is_no_name_for_a_collection_is_wrong_usage(self, collection: str) -> None:
        with pytest.raises(UsageError, match="is no name for a collection; use 1 to 255 bytes"):
            open_store(edge="x", collection=collection)

    @pytest.mark.parametrize("url", ["", "ftp://x", "localhost:6333", "http://localhost:0", "http://", "http://a\nb"])
    def test_what_is_no_address_of_a_server_is_wrong_usage(self, url: str) -> None:
        with pytest.raises(UsageError, match=r"is no address of a Qdrant server; .*http://localhost:6333"):
            open_store(url=url, collection="c")

    def test_a_password_in_an_address_is_refused_and_not_told(self) -> None:
        with pytest.raises(UsageError, match="api_key") as told:
            open_store(url="http://me:secret@localhost:6333", collection="c")
        assert "secret" not in str(told.value)

    @pytest.mark.parametrize("key", ["secret\n", "sécret"])
    def test_a_key_that_cannot_be_sent_is_refused_and_not_told(self, key: str) -> None:
        with pytest.raises(UsageError, match="API key") as told:
            open_store(url="http://localhost:6333", collection="c", api_key=key)
        assert "cret" not in str(told.value)

    def test_options_that_a_local_store_would_ignore_are_refused_there(self) -> None:
        for options in (StoreOptions(quantization="scalar"), StoreOptions(on_disk=True)):
            with pytest.raises(UsageError, match=r"a local store .* has no quantization"):
                open_store(path="x", collection="c", options=options)
        with pytest.raises(UsageError, match="quantization is 'ternary'"):
            StoreOptions(quantization="ternary")

    def test_a_point_takes_no_more_bytes_than_it_is_said_to(self) -> None:
        vector = np.full(100, np.finfo(np.float32).tiny * -np.pi, dtype=np.float32)
        payload = {"path": "/a/😀", "metadata": {"n": [1.5, None, "\n\u0007"]}}
        point = Point(name(1), vector, payload)
        struct = models.PointStruct(id=point.id, vector=vector.tolist(), payload=payload)
        (size,) = check_points([point])
        body = len(models.PointsList(points=[struct]).model_dump_json().encode())
        assert body <= size <= body + 500

    def test_a_number_of_any_size_takes_no_more_bytes_than_it_is_said_to(self) -> None:
        bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
        vector = bits.view(np.float32)
        vector = np.concatenate([vector[np.isfinite(vector)], -(10.0 ** -np.arange(44, dtype=np.float32)) / 3])
        struct = models.PointStruct(id=1, vector=vector.astype(np.float32).tolist())
        numbers = struct.model_dump_json().partition("[")[2].partition("]")[0].split(",")
        assert len(numbers) == len(vector)
        assert max(map(len, numbers)) < 26
