"""The contract that all storage backends fulfil."""

import contextlib
import errno
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge
from fake_qdrant import DIMENSION, OTHER, SIGNATURE, fake_server, make_points, make_vector, name, turned
from other_processes import BATCH, fill, run_and_kill
from qdrant_client import QdrantClient, models

from cocoa_embed.errors import CocoaError, MissingExtraError, UsageError
from cocoa_embed.integrations.qdrant.stores import edge, local, open_store
from cocoa_embed.integrations.qdrant.stores.base import (
    Point,
    Query,
    Signature,
    StoreOptions,
)
from cocoa_embed.integrations.qdrant.stores.checks import check_points
from cocoa_embed.integrations.qdrant.stores.store import Store

pytestmark = pytest.mark.usefixtures("few_payload_indexes")

BACKENDS = ("client", "path", "url", "edge")
FOLDERS = ("path", "edge")
OPENS = "cannot be (opened|used)"
ONES = np.ones(DIMENSION, dtype=np.float32)

Opener = Callable[..., Store]


@pytest.fixture(params=BACKENDS)
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens a collection in one backend, at the same location at each call."""
    with fake_server() as server, contextlib.ExitStack() as stack:
        locations: dict[str, Any] = {"client": server.client, "url": server.url}
        location = {request.param: locations.get(request.param, tmp_path / "store")}

        def open_(collection: str = "images") -> Store:
            store = open_store(**location, collection=collection)
            stack.callback(store.close)
            return store

        yield open_


@pytest.fixture(params=FOLDERS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def store(opener: Opener) -> Store:
    store = opener()
    store.create(SIGNATURE)
    return store


def numbers(store: Store) -> list[int]:
    return sorted(payload["number"] for _, payload in store.scan(["number"]))


class TestCollections:
    def test_reading_a_location_that_was_never_written_to_creates_nothing(self, opener: Opener, tmp_path: Path) -> None:
        store = opener()
        assert store.signature() is None
        assert store.collections() in (None, [])
        for call in (store.require_signature, store.count):
            with pytest.raises(CocoaError, match=r"no index in|no collection 'images' in|images not found|404"):
                call()
        assert list(tmp_path.iterdir()) == []

    def test_a_collection_is_created_once_and_other_models_are_refused(self, store: Store, opener: Opener) -> None:
        assert store.signature() == store.require_signature() == SIGNATURE
        assert (store.count(), list(store.scan(["path"])), store.collections()) == (0, [], ["images"])
        assert store.search(Query(ONES, limit=3)) == []
        store.upsert(make_points(1, 2))
        store.create(SIGNATURE)
        for other in (OTHER, Signature(model="m", fingerprint="0f", dimension=5)):
            with pytest.raises(CocoaError, match=r"was made with m \(8 dimensions\), not with (another|m \(5\))"):
                store.create(other)
        assert (store.signature(), store.count()) == (SIGNATURE, 1)
        store.close()
        for create in (True, False):
            second = opener("2nd žluť")
            if create:
                second.create(OTHER)
            assert second.signature() == OTHER
            second.close()
        assert store.collections() == ["2nd žluť", "images"]

    def test_errors_name_a_missing_collection(self, store: Store, opener: Opener) -> None:
        store.close()
        other = opener("other")
        calls: list[Callable[[], object]] = [
            other.count,
            lambda: list(other.scan(["path"])),
            lambda: other.retrieve([name(1)]),
            lambda: other.upsert(make_points(1, 2)),
            lambda: other.delete([name(1)]),
            lambda: other.overwrite_payload(name(1), {}),
            lambda: other.search(Query(ONES, limit=1)),
        ]
        for call in calls:
            with pytest.raises(CocoaError, match="other"):
                call()
        with pytest.raises(CocoaError, match=r"no collection 'other' in .*\(it holds images\); run cocoa-embed index"):
            other.require_signature()

    def test_a_foreign_collection_can_be_signed_once(self) -> None:
        with fake_server() as server:
            vectors = models.VectorParams(size=DIMENSION, distance=models.Distance.COSINE)
            server.client.create_collection("images", vectors_config=vectors, metadata={"theirs": {"kept": 1}})
            store = open_store(collection="images", url=server.url)
            assert store.signature() == Signature(model="an unknown model", fingerprint=None, dimension=DIMENSION)
            store.create(SIGNATURE)
            assert store.signature() == SIGNATURE
            store.close()
            assert (server.client.get_collection("images").config.metadata or {})["theirs"] == {"kept": 1}

    @pytest.mark.parametrize("kind", ["named vectors", "48 dimensions"])
    @pytest.mark.parametrize("backend", ["client", "edge"])
    def test_collections_with_other_vectors_are_refused(self, backend: str, kind: str, tmp_path: Path) -> None:
        client = QdrantClient(":memory:")
        several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        cosine = models.VectorParams(size=48, distance=models.Distance.COSINE, multivector_config=several)
        dot = qdrant_edge.EdgeVectorParams(size=48, distance=qdrant_edge.Distance.Dot)
        if backend == "client":
            client.create_collection("images", {"v": cosine} if kind == "named vectors" else cosine)
        else:
            (tmp_path / "images").mkdir()
            config = qdrant_edge.EdgeConfig(vectors={"v": dot} if kind == "named vectors" else dot)
            qdrant_edge.EdgeShard.create(str(tmp_path / "images"), config).close()
        store = open_store(collection="images", **{backend: client if backend == "client" else tmp_path})
        with pytest.raises(CocoaError, match=rf"holds .*{kind}.*; choose another collection"):
            store.signature()


class TestPoints:
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
        point = Point(name(1), make_vector(1), payload)
        store.upsert([point])
        (hit,) = store.search(Query(point.vector, limit=10))
        assert (hit.id, hit.path, hit.score) == (point.id, payload["path"], pytest.approx(1, abs=1e-6))
        for found in (hit.payload, store.retrieve([point.id])[point.id], dict(store.scan(list(payload)))[point.id]):
            assert repr(sorted(found.items())) == repr(sorted(payload.items()))

    def test_a_point_with_the_same_id_and_a_payload_are_replaced_whole(self, store: Store) -> None:
        store.upsert([turned(1, 0, old=True), turned(2, 45)])
        store.upsert([turned(1, 60), turned(1, 90, last=True)])
        assert store.count() == 2
        assert store.retrieve([name(1)]) == {name(1): {"path": "/a/1.png", "number": 1, "last": True}}
        store.overwrite_payload(name(1), {"path": "/b", "metadata": {"x": [None]}})
        assert store.retrieve([name(1)]) == {name(1): {"path": "/b", "metadata": {"x": [None]}}}
        assert store.search(Query(turned(1, 90).vector, limit=1))[0].score == pytest.approx(1, abs=1e-6)
        with pytest.raises(CocoaError):
            store.overwrite_payload(name(3), {"path": "/c"})
        assert store.count() == 2

    def test_nothing_to_do_is_no_error(self, store: Store) -> None:
        store.upsert([])
        for ids in ([], [name(1)]):
            store.delete(ids)
            assert store.retrieve(ids) == {}
        store.finish()

    def test_more_points_than_a_page_are_all_seen_once(self, store: Store) -> None:
        store.upsert(make_points(0, 2_345))
        seen = list(store.scan(["number", "absent"]))
        assert sorted(id_ for id_, _ in seen) == sorted(map(name, range(2_345)))
        assert sorted(payload["number"] for _, payload in seen) == list(range(2_345))
        assert all(payload.keys() == {"number"} for _, payload in seen)
        assert {str(payload) for _, payload in store.scan([])} == {"{}"}
        some = [name(number) for number in range(1_000, 3_000)]
        assert store.retrieve(some).keys() == set(some[:1_345])
        store.delete(some)
        assert (store.count(), numbers(store)) == (1_000, list(range(1_000)))

    def test_foreign_points_are_listed_and_kept(self, opener: Opener) -> None:
        store = opener()
        store.create(SIGNATURE)
        store.upsert(make_points(1, 2))
        store.close()
        if isinstance(store, edge.EdgeStore):
            shard = qdrant_edge.EdgeShard.load(str(store._shard_folder))
            shard.update(qdrant_edge.UpdateOperation.upsert_points([qdrant_edge.Point(5, ONES.tolist())]))
            shard.close()
        else:
            client = store._connected()
            client.upsert("images", points=[models.PointStruct(id=5, vector=ONES.tolist())])
        assert dict(store.scan(["number", "path"])) == {name(1): {"number": 1}, "5": {}}
        (hit,) = store.search(Query(ONES, limit=1))
        assert (hit.id, hit.path, hit.payload) == ("5", "", {})

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"vector": ONES * np.nan}, rf"point {name(7)} \('/a/7.png'\) .* finite values; noth"),
            ({"vector": ONES * -np.inf}, "expected 8 finite values"),
            ({"vector": np.ones(DIMENSION + 1, np.float32)}, r"vector of shape \(9,\), expected 8 finite"),
            ({"payload": {"a": [1, {"b": float("nan")}]}}, "not JSON"),
            ({"payload": {"a": "\udcff"}}, "not JSON"),
            ({"payload": {"\ud800": 1}}, "not JSON"),
            ({"payload": {"a": b"image"}}, "not JSON"),
        ],
    )
    def test_invalid_points_are_refused_before_anything_is_written(
        self, store: Store, change: dict[str, Any], words: str
    ) -> None:
        bad = turned(7, 0)._replace(**change)
        store.close()
        with pytest.raises(CocoaError, match=words):
            store.upsert([turned(1, 0), bad, turned(8, 0)])
        assert store.count() == 0
        store.upsert([turned(7, 0)])
        if "payload" in change:
            with pytest.raises(CocoaError, match=words):
                store.overwrite_payload(name(7), bad.payload)
        if "vector" in change:
            with pytest.raises(CocoaError, match="the query's vector"):
                store.search(Query(bad.vector, limit=1))
        assert store.retrieve([name(7)])[name(7)]["number"] == 7

    def test_a_reopened_store_has_everything_that_was_stored(self, opener: Opener) -> None:
        store = opener()
        store.create(SIGNATURE)
        store.upsert(make_points(0, 100))
        store.delete([name(5)])
        store.overwrite_payload(name(6), {"path": "/new"})
        for _ in range(2):
            store.close()
        again = opener()
        assert again.signature() == SIGNATURE
        assert again.count() == len(list(again.scan(["path"]))) == 99
        assert again.retrieve([name(5), name(6)]) == {name(6): {"path": "/new"}}
        assert again.search(Query(make_vector(7), limit=1))[0].id == name(7)
        again.upsert(make_points(5, 6))
        assert again.count() == 100

    def test_threads_share_a_store(self, store: Store) -> None:
        def work(first: int) -> None:
            for start in range(first, first + 60, 20):
                store.upsert(make_points(start, start + 20))
                assert store.retrieve([name(start)]).keys() == {name(start)}
                assert store.search(Query(make_vector(start), limit=1))
                assert len(list(store.scan(["number"]))) >= 20

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(0, 400, 100)))
        assert store.count() == 4 * 3 * 20


class TestSearch:
    def test_hits_are_the_best_first_with_limit_offset_and_threshold(self, store: Store) -> None:
        store.upsert([turned(number, 10 * number) for number in range(10)])
        query = Query(turned(0, 0).vector, limit=100)
        every = store.search(query)
        assert [hit.payload["number"] for hit in every] == list(range(10))
        wanted = np.cos(np.radians(range(0, 100, 10)))
        assert [hit.score for hit in every] == pytest.approx(wanted, abs=1e-5)
        assert store.search(query._replace(limit=3, offset=2)) == every[2:5]
        assert store.search(query._replace(offset=10)) == []
        assert store.search(query._replace(score_threshold=0.7)) == every[:5]
        assert store.search(query._replace(vector=2 * query.vector, limit=1)) == every[:1]
        assert store.search(query._replace(score_threshold=1.0)) == every[:1], "the threshold itself is enough"
        assert store.search(query._replace(score_threshold=1.001)) == []

    def test_filters_are_applied_before_limit_and_offset(self, store: Store) -> None:
        store.upsert([turned(number, 5 * number, mime=["a", "b"][number % 2]) for number in range(10)])
        mime = models.FieldCondition(key="mime", match=models.MatchValue(value="b"))
        query = Query(turned(0, 0).vector, limit=2, offset=1, filter=models.Filter(must=[mime]))
        assert [hit.payload["number"] for hit in store.search(query)] == [3, 5]
        malformed = models.IsEmptyCondition(is_empty=models.PayloadField(key="a b]"))
        with pytest.raises(CocoaError):
            store.search(query._replace(filter=models.Filter(must=[malformed])))


class TestFolders:
    """Other users, foreign files and failures in the folder of a store."""

    def test_a_second_user_is_refused_at_once_whether_ours_or_plain(self, backend: str, tmp_path: Path) -> None:
        store = open_store(**{backend: tmp_path / "store"}, collection="images")
        store.create(SIGNATURE)
        store.upsert(make_points(0, 3))
        second = open_store(**{backend: tmp_path / "store"}, collection="images")
        with pytest.raises(CocoaError, match=r"store is in use by another process; wait for it, or run a Qdrant"):
            second.upsert(make_points(3, 4))
        store.close()
        plain: Any
        if backend == "edge":
            plain = qdrant_edge.EdgeShard.load(str(tmp_path / "store" / "images"))
        else:
            plain = QdrantClient(path=str(tmp_path / "store"))
        with pytest.raises(CocoaError, match="in use by another process"):
            store.count()
        plain.close()
        assert store.count() == 3
        store.close()

    def test_foreign_files_and_folders_are_refused_and_kept(self, backend: str, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "a.png").touch()
        for path, words in (("file", "file is a file"), ("photos", "holds something else")):
            store = open_store(**{backend: tmp_path / path}, collection="images")
            for call in (store.signature, lambda store=store: store.create(SIGNATURE)):
                with pytest.raises(CocoaError, match=words):
                    call()
        assert [entry.name for entry in (tmp_path / "photos").iterdir()] == ["a.png"]

    @pytest.mark.parametrize("left", [[".cocoa-lock"], ["meta.json.7.new"], ["meta.json", ".lock"], [".cocoa-edge"]])
    def test_a_store_whose_creation_was_killed_is_created_anew(self, left: list[str], tmp_path: Path) -> None:
        for file in left:
            (tmp_path / file).touch()
        backend = "edge" if left == [".cocoa-edge"] else "path"
        store = open_store(**{backend: tmp_path}, collection="images")
        assert store.signature() is None
        assert store.collections() in (None, [])
        store.create(SIGNATURE)
        store.upsert(make_points(0, 3))
        store.close()
        assert store.count() == 3
        store.close()

    @pytest.mark.parametrize("step", ["folder_lock", "write_atomically"])
    def test_a_folder_that_cannot_be_written_is_named(
        self, backend: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        store = open_store(**{backend: tmp_path / "store"}, collection="images")
        with monkeypatch.context() as patch:
            patch.setattr({"path": local, "edge": edge}[backend], step, fail)
            with pytest.raises(CocoaError, match=rf"store {OPENS} \(.*Read-only file system"):
                store.create(SIGNATURE)
        assert store.signature() is None
        store.create(SIGNATURE)
        assert store.signature() == SIGNATURE
        store.close()

    @pytest.mark.parametrize("seed", [0, *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6)]])
    def test_a_killed_store_has_everything_that_it_confirmed(self, backend: str, seed: int, tmp_path: Path) -> None:
        moments = random.Random(seed)
        location = {backend: str(tmp_path / "store")}
        stored = 0
        for seconds in (0.0, moments.random() * 0.1, moments.random() * 0.5, 1.0, 8.0):
            if seconds >= 1 and stored:
                break  # only a busy machine has stored nothing yet
            _, reports = run_and_kill(seconds, fill, location, stored, BATCH, 3000)
            store = open_store(**location, collection="images")
            if store.signature() is None:
                assert reports == [0]
                store.close()
                continue
            assert store.signature() == SIGNATURE
            assert reports[-1] <= store.count() <= reports[-1] + BATCH
            stored = store.count()
            assert numbers(store) == list(range(stored))
            for number in range(max(0, stored - 10), stored):
                assert store.search(Query(make_vector(number), limit=1))[0].id == name(number)
            store.close()
        assert stored > 0

    def test_unclosed_stores_keep_their_points_and_print_nothing(self, tmp_path: Path) -> None:
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'support')!r})\n"
            "from cocoa_embed.integrations.qdrant.stores import open_store\n"
            "from fake_qdrant import SIGNATURE, make_points\n"
            f"places = {[{backend: str(tmp_path / backend)} for backend in FOLDERS]}\n"
            "stores = [open_store(**place, collection='images') for place in places]\n"
            "for store in stores: store.create(SIGNATURE); store.upsert(make_points(0, 7)); print(store.count())"
        )
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        assert (done.stdout.split(), done.stderr) == (["7", "7"], "")
        for backend in FOLDERS:
            store = open_store(**{backend: tmp_path / backend}, collection="images")
            assert store.count() == 7
            store.close()


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"path": "x", "edge": "y"}, "more than one place to store points was given"),
            ({}, "no place to store points was given; give one of client, path, url, edge"),
            *[
                ({"edge": "x", "collection": collection}, "is no name for a collection; use 1 to 255 bytes")
                for collection in ("", ".", "..", "a/b", "a\\b", 'a"b', "a\0b", "c:", "what?", "n" * 256)
            ],
            *[
                ({"url": url}, "is no address of a Qdrant server; .*http://localhost:6333")
                for url in ("", "ftp://x", "localhost:6333", "http://localhost:0", "http://", "http://a\nb")
            ],
            ({"url": "http://me:secret@localhost:6333"}, "password; give an API key"),
            ({"url": "http://localhost:6333", "options": StoreOptions(api_key="sécret")}, "API key"),
            ({"url": "http://localhost:6333", "options": StoreOptions(api_key="secret\n")}, "API key"),
            ({"path": "x", "options": StoreOptions(quantization="scalar")}, "a local store .* has no quantization"),
            ({"path": "x", "options": StoreOptions(on_disk=True)}, "a local store .* has no quantization"),
        ],
    )
    def test_invalid_arguments_are_usage_errors_that_print_no_secret(
        self, arguments: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(UsageError, match=words) as raised:
            open_store(**{"collection": "c", **arguments})
        assert "cret" not in str(raised.value) + repr(arguments.get("options"))
        with pytest.raises(UsageError, match="quantization is 'ternary'"):
            StoreOptions(quantization="ternary")  # type: ignore[arg-type]

    def test_a_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, edge.__name__)
        monkeypatch.setitem(sys.modules, "qdrant_edge", None)
        with pytest.raises(MissingExtraError, match=r"qdrant_edge is not installed; run: pip install .*edge\]"):
            open_store(edge="x", collection="c")

    def test_a_point_is_never_larger_than_computed(self) -> None:
        bits = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32).view(np.float32)
        vector = np.concatenate([bits[np.isfinite(bits)], -(10.0 ** -np.arange(44, dtype=np.float32)) / 3])
        point = Point(name(1), vector, {"path": "/a/😀", "metadata": {"n": [1.5, None, "\n\u0007"]}})
        struct = models.PointStruct(id=point.id, vector=vector.tolist(), payload=point.payload)
        body = models.PointsList(points=[struct]).model_dump_json()
        assert len(body.encode()) <= check_points([point], vector.size)[0]
        assert max(map(len, body.partition("vector")[2].partition("[")[2].partition("]")[0].split(","))) < 26
