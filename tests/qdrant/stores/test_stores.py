"""The contract that all storage backends fulfil."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge
from fake_qdrant import DIMENSION, OTHER, SIGNATURE, FakeServer, delete, make_points, make_vector, name, turned
from qdrant_client import QdrantClient, models

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant.stores import edge, open_store
from cocoa_embed.integrations.qdrant.stores.base import Point, Query, Signature, with_any_of
from cocoa_embed.integrations.qdrant.stores.checks import check_points
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.sources.base import MOST_LEVELS

pytestmark = pytest.mark.usefixtures("few_payload_indexes")

ONES = np.ones(DIMENSION, dtype=np.float32)

Opener = Callable[..., Store]


class TestCollections:
    def test_a_missing_collection_is_named_and_not_created_by_reading(self, opener: Opener, tmp_path: Path) -> None:
        store = opener()
        calls: list[Callable[[], object]] = [
            store.count,
            lambda: list(store.scan(["path"])),
            lambda: store.retrieve([name(1)]),
            lambda: store.insert(make_points(1, 2)),
            lambda: store.by_paths(["/a/1.png"]),
            lambda: store.replace_payloads([(name(1), {}, {})]),
            lambda: store.search(Query(ONES, limit=1)),
        ]
        with pytest.raises(CocoaError, match=r"no collection 'images' in .*run cocoa-embed index"):
            store.require_signature()
        assert list(tmp_path.iterdir()) == []
        other = opener("other")
        other.create(OTHER)
        other.close()
        for call in calls:
            with pytest.raises(CocoaError, match="images"):
                call()
        assert store.signature() is None

    def test_a_collection_is_created_once_and_other_models_are_refused(self, store: Store, opener: Opener) -> None:
        assert store.signature() == store.require_signature() == SIGNATURE
        assert (store.count(), store.search(Query(ONES, limit=3))) == (0, [])
        store.insert(make_points(1, 2))
        store.create(SIGNATURE)
        for other in (OTHER, Signature("m", "0f", 5)):
            with pytest.raises(CocoaError, match=r"was made with m \(8 dimensions\), not with (another|m \(5\))"):
                store.create(other)
        assert (store.signature(), store.count()) == (SIGNATURE, 1)
        store.close()
        second = opener("2nd žluť")
        second.create(OTHER)
        second.close()
        assert opener("2nd žluť").signature() == OTHER

    def test_a_foreign_collection_can_be_signed_once(self, server: FakeServer, tmp_path: Path) -> None:
        vectors = models.VectorParams(size=DIMENSION, distance=models.Distance.COSINE)
        server.client.create_collection("images", vectors_config=vectors, metadata={"theirs": {"kept": 1}})
        open_store(collection="images", edge=tmp_path).create(SIGNATURE)
        (tmp_path / "images" / "signature.json").unlink()
        for location in ({"url": server.url}, {"edge": tmp_path}):
            store = open_store(collection="images", **location)
            assert store.signature() == Signature("an unknown model", None, DIMENSION)
            store.create(SIGNATURE)
            assert store.signature() == SIGNATURE
        assert server.client.get_collection("images").config.metadata["theirs"] == {"kept": 1}

    @pytest.mark.parametrize("is_named", [True, False])
    def test_collections_with_other_vectors_are_refused(self, is_named: bool, tmp_path: Path) -> None:
        client = QdrantClient(":memory:")
        several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        cosine = models.VectorParams(size=48, distance=models.Distance.COSINE, multivector_config=several)
        client.create_collection("images", {"v": cosine} if is_named else cosine)
        (tmp_path / "images").mkdir()
        dot = qdrant_edge.EdgeVectorParams(size=48, distance=qdrant_edge.Distance.Dot)
        config = qdrant_edge.EdgeConfig(vectors={"v": dot} if is_named else dot)
        qdrant_edge.EdgeShard.create(str(tmp_path / "images"), config).close()
        for location in ({"client": client}, {"edge": tmp_path}):
            with pytest.raises(CocoaError, match=r"does not hold one unnamed vector per point .*; choose another"):
                open_store(collection="images", **location).signature()


class TestPoints:
    def test_points_come_back_as_they_were_stored(self, store: Store) -> None:
        deepest: object = reduce(lambda value, _: [value], range(MOST_LEVELS), "x")
        payload = {
            "path": "/a/žluť 😀\n\t\"'.png",
            "caption": None,
            "metadata": {"a.b": [-1, 2**62, 1e-300, -0.0, 1.0, True, None, "x", {}], "": {}, "deepest": deepest},
            "mtime": 1759000000.123456,
            "long": "x" * 100_000,
        }
        point = Point(name(1), make_vector(1), payload)
        store.insert([point])
        (hit,) = store.search(Query(point.vector, limit=10))
        assert (hit.id, hit.path, hit.score) == (point.id, payload["path"], pytest.approx(1, abs=1e-6))
        for found in (hit.payload, store.retrieve([point.id])[point.id], dict(store.scan(list(payload)))[point.id]):
            assert repr(sorted(found.items())) == repr(sorted(payload.items()))

    def test_a_stored_point_is_not_inserted_again_and_its_payload_is_replaced_whole(self, store: Store) -> None:
        store.insert([turned(1, 90, first=True), turned(2, 45)])
        store.insert([turned(1, 60), turned(3, 0)])
        stored = store.retrieve([name(1)])[name(1)]
        assert (store.count(), stored) == (3, {"path": "/a/1.png", "number": 1, "first": True})
        store.replace_payloads([(name(1), stored, {"path": "/b", "metadata": {"x": [None]}}), (name(3), {}, None)])
        assert store.retrieve([name(1), name(3)]) == {name(1): {"path": "/b", "metadata": {"x": [None]}, "revision": 1}}
        assert store.search(Query(turned(1, 90).vector, limit=1))[0].score == pytest.approx(1, abs=1e-6)
        store.insert([])
        store.replace_payloads([])
        store.finish()
        assert store.count() == 2

    def test_points_are_found_by_any_of_their_paths_and_counted_by_a_value(self, store: Store) -> None:
        def paths(number: int) -> dict[str, Any]:
            return {"paths": [f"/{number}.png", f"/{number + 1}.png"], "shard": ["/a.tar", "/b.tar"][number % 2]}

        store.insert([turned(number, number, **paths(number)) for number in range(9)])
        found = store.by_paths(["/4.png", "/none.png"])
        assert {id_: payload["paths"] for id_, payload in found.items()} == {
            name(3): ["/3.png", "/4.png"],
            name(4): ["/4.png", "/5.png"],
        }
        store.replace_payloads([(name(4), found[name(4)], {"paths": ["/new.png"]}), (name(3), found[name(3)], None)])
        assert (store.by_paths(["/4.png"]), store.by_paths([])) == ({}, {})
        assert store.by_paths(["/new.png"]).keys() == {name(4)}
        assert store.count(with_any_of("shard", ["/a.tar"])) == 4
        others = store.scan([], with_any_of("shard", ["/b.tar", "/c.tar"]))
        assert {id_ for id_, _ in others} == {name(1), name(5), name(7)}

    def test_more_points_than_a_page_are_all_seen_once_also_after_reopening(
        self, store: Store, opener: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(store), "scroll_limit", 50)
        store.insert(make_points(0, 117))
        some = [name(number) for number in range(50, 150)]
        assert store.retrieve(some).keys() == set(some[:67])
        assert sorted(store.scan(["number", "absent"])) == sorted((name(n), {"number": n}) for n in range(117))
        assert {str(payload) for _, payload in store.scan([])} == {"{}"}
        delete(store, *some)
        store.replace_payloads([(name(6), {}, {"path": "/new"})])
        for _ in range(2):
            store.close()
        store = opener()
        assert (store.signature(), store.count(), store.retrieve([name(50)])) == (SIGNATURE, 50, {})
        assert store.search(Query(make_vector(6), limit=1))[0].path == "/new"

    def test_foreign_points_are_listed_and_kept(self, store: Store) -> None:
        store.insert(make_points(1, 2))
        store.close()
        if isinstance(store, edge.EdgeStore):
            shard = qdrant_edge.EdgeShard.load(str(store._shard_folder))
            shard.update(qdrant_edge.UpdateOperation.upsert_points([qdrant_edge.Point(5, ONES.tolist())]))
            shard.close()
        else:
            store._connected().upsert("images", points=[models.PointStruct(id=5, vector=ONES.tolist())])
        assert dict(store.scan(["number", "path"])) == {name(1): {"number": 1}, "5": {}}
        (hit,) = store.search(Query(ONES, limit=1))
        assert (hit.id, hit.path, hit.payload) == ("5", "", {})

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"vector": ONES * np.nan}, rf"point {name(7)} \('/a/7.png'\) .* finite values; noth"),
            ({"vector": np.ones(DIMENSION + 1, np.float32)}, r"vector of shape \(9,\); expected 8 finite"),
            ({"payload": {"a": [1, {"b": float("nan")}]}}, "not JSON"),
            ({"payload": {"\ud800": 1}}, "not JSON"),
        ],
    )
    def test_invalid_points_are_refused_before_anything_is_written(
        self, store: Store, change: dict[str, Any], words: str
    ) -> None:
        bad = turned(7, 0)._replace(**change)
        store.close()
        with pytest.raises(CocoaError, match=words):
            store.insert([turned(1, 0), bad, turned(8, 0)])
        assert store.count() == 0
        store.insert([turned(7, 0)])
        use = partial(store.replace_payloads, [(name(7), {}, bad.payload)])
        if "vector" in change:
            use, words = partial(store.search, Query(bad.vector, limit=1)), "the query's vector"
        with pytest.raises(CocoaError, match=words):
            use()
        assert store.retrieve([name(7)])[name(7)]["number"] == 7

    def test_threads_share_a_store(self, store: Store) -> None:
        def work(first: int) -> None:
            for start in range(first, first + 60, 20):
                store.insert(make_points(start, start + 20))
                assert store.retrieve([name(start)]).keys() == {name(start)}
                assert store.search(Query(make_vector(start), limit=1))
                assert len(list(store.scan(["number"]))) >= 20

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(0, 400, 100)))
        assert store.count() == 4 * 3 * 20


class TestSearch:
    def test_hits_are_the_best_first_with_limit_offset_and_threshold(self, store: Store) -> None:
        store.insert([turned(number, 10 * number) for number in range(10)])
        query = Query(turned(0, 0).vector, limit=100)
        every = store.search(query)
        assert [hit.payload["number"] for hit in every] == list(range(10))
        assert [hit.score for hit in every] == pytest.approx(np.cos(np.radians(range(0, 100, 10))), abs=1e-5)
        assert store.search(query._replace(limit=3, offset=2)) == every[2:5]
        assert store.search(query._replace(offset=10)) == []
        assert store.search(query._replace(score_threshold=0.7)) == every[:5]
        assert store.search(query._replace(score_threshold=1.0)) == every[:1], "the threshold itself is enough"
        assert store.search(query._replace(score_threshold=1.001)) == []

    def test_filters_are_applied_before_limit_and_offset(self, store: Store) -> None:
        store.insert([turned(number, 5 * number, mime=["a", "b"][number % 2]) for number in range(10)])
        mime = models.FieldCondition(key="mime", match=models.MatchValue(value="b"))
        query = Query(turned(0, 0).vector, limit=2, offset=1, filter=models.Filter(must=[mime]))
        assert [hit.payload["number"] for hit in store.search(query)] == [3, 5]
        malformed = models.IsEmptyCondition(is_empty=models.PayloadField(key="a b]"))
        with pytest.raises(CocoaError):
            store.search(query._replace(filter=models.Filter(must=[malformed])))


class TestReading:
    def test_points_are_read_by_filter_and_number_across_pages_with_their_vectors(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(store), "scroll_limit", 3)
        store.insert([turned(number, 5 * number, mime=["a", "b"][number % 2]) for number in range(10)])
        mime = models.FieldCondition(key="mime", match=models.MatchValue(value="b"))
        found = list(store.points(models.Filter(must=[mime]), with_vectors=True))
        assert sorted(point.payload["number"] for point in found) == [1, 3, 5, 7, 9]
        for point in found:
            assert point.vector is not None
            expected = turned(point.payload["number"], 5 * point.payload["number"])
            assert (point.id, point.vector) == (expected.id, pytest.approx(expected.vector, abs=1e-6))
        assert len({point.id for point in store.points()}) == 10
        for limit in (1, 3, 4, 99):
            assert len(list(store.points(limit=limit))) == min(limit, 10)
        assert {point.vector for point in store.points()} == {None}

    def test_several_queries_have_the_hits_that_each_has_alone(self, store: Store) -> None:
        store.insert([turned(number, 5 * number) for number in range(10)])
        queries = [
            Query(turned(0, angle).vector, limit=3, offset=offset) for angle, offset in ((0, 0), (40, 2), (0, 9))
        ]
        assert store.search_batch(queries) == [store.search(query) for query in queries]
        assert store.search_batch([]) == []

    def test_collections_are_listed_and_payload_indexes_may_be_made_again(self, store: Store, opener: Opener) -> None:
        store.insert([turned(number, 5 * number, n=number) for number in range(3)])
        for _ in range(2):
            store.create_payload_index("n", "integer")
        above = models.FieldCondition(key="n", range=models.Range(gte=1))
        hits = store.search(Query(ONES, limit=5, filter=models.Filter(must=[above])))
        assert sorted(hit.payload["n"] for hit in hits) == [1, 2]
        store.close()
        other = opener("another")
        other.create(SIGNATURE)
        assert other.collections() == ["another", "images"]


SERVER = {"url": "http://localhost:6333"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": "x", "edge": "y"}, "2 storage locations were given"),
        ({}, "0 storage locations were given; give one of client, path, url, edge"),
        *[
            ({"edge": "x", "collection": collection}, "is not a valid collection name; use 1 to 255 bytes")
            for collection in ("", "..", "a/b", "a\0b", "n" * 256)
        ],
        *[
            ({"url": url}, "is not the address of a Qdrant server; .*http://localhost:6333")
            for url in ("", "localhost:6333", "http://localhost:0", "http://a\nb")
        ],
        ({"url": "http://me:secret@localhost:6333"}, "password; use an API key"),
        ({**SERVER, "options": {"api_key": "secret\n"}}, "API key"),
    ],
)
def test_invalid_arguments_are_usage_errors_that_print_no_secret(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        open_store(**{"collection": "c", **arguments, "options": StoreOptions(**arguments.get("options", {}))})
    assert "cret" not in f"{raised.value}{StoreOptions(api_key='secret')}"


def test_a_point_is_never_larger_than_computed() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32).view(np.float32)
    vector = np.concatenate([bits[np.isfinite(bits)], -(10.0 ** -np.arange(44, dtype=np.float32)) / 3])
    point = Point(name(1), vector, {"path": "/a/😀", "metadata": {"n": [1.5, None, "\n\u0007"]}})
    struct = models.PointStruct(id=point.id, vector=vector.tolist(), payload=point.payload)
    body = models.PointsList(points=[struct]).model_dump_json()
    assert len(body.encode()) <= check_points([point], vector.shape)[0]
    assert max(map(len, body.partition("vector")[2].partition("[")[2].partition("]")[0].split(","))) < 26
