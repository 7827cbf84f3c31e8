"""Searches by examples, for diverse hits, for groups and for several queries, alike in every storage backend."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize
from unittest.mock import Mock

import numpy as np
import pytest
from fake_model import FakeModel, colour_image
from fake_qdrant import FakeServer, name, turned
from PIL import Image
from qdrant_client import AsyncQdrantClient, QdrantClient

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.encode.vectors import unit
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.integrations.qdrant.stores.base import BOTH, Hit, Point, Query, Signature
from cocoa_embed.integrations.qdrant.stores.server import SIGNATURE_SECONDS
from cocoa_embed.integrations.qdrant.stores.store import Store

pytestmark = pytest.mark.usefixtures("few_payload_indexes")

ANGLES = range(0, 180, 10)
"""Degrees of the points 0, 1, ... from the first; nearest first, and evenly apart."""


def album_of(number: int) -> dict[str, Any]:
    return {"metadata": {"album": "ab"[number % 2]} if number % 3 else {}}


@pytest.fixture
def points(store: Store) -> QdrantIndexer:
    """Points at angles in one plane, in two albums and none, and no model."""
    paths = {4: ["/a/4.png", "/copies/4.png"]}
    store.insert(
        [turned(n, angle, paths=paths.get(n, [f"/a/{n}.png"]), **album_of(n)) for n, angle in enumerate(ANGLES)]
    )
    indexer = QdrantIndexer(None, client=QdrantClient(":memory:"))
    indexer.store = store
    return indexer


def numbers(hits: list[Hit]) -> list[int]:
    return [hit.payload["number"] for hit in hits]


class TestExamples:
    def test_an_indexed_image_finds_its_neighbours_by_path_id_or_hit_without_a_model(
        self, points: QdrantIndexer
    ) -> None:
        hits = points.search(like="/a/0.png", limit=3)
        assert numbers(hits) == [1, 2, 3], "and not itself"
        assert [hit.score for hit in hits] == pytest.approx(np.cos(np.radians([10, 20, 30])), abs=1e-5)
        for example in (name(0), name(0).replace("-", "").upper(), Path("/a/0.png"), ["/a/0.png"]):
            assert points.search(like=example, limit=3) == hits
        hit = points.search(like="/a/1.png", limit=1, query_filter="path=/a/0.png")
        assert points.search(like=hit[0], limit=3) == points.search(like=hit, limit=3) == hits
        assert numbers(points.search(like="/copies/4.png", limit=2)) in ([3, 5], [5, 3])

    @pytest.mark.parametrize("backend", ["client"], indirect=True)
    @pytest.mark.parametrize(("stored", "typed"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
    def test_a_path_is_found_however_its_accents_are_composed(
        self, points: QdrantIndexer, stored: Literal["NFC", "NFD"], typed: Literal["NFC", "NFD"]
    ) -> None:
        points.store.insert([turned(99, 0, paths=[normalize(stored, "/a/été.png")])])
        assert numbers(points.search(like=normalize(typed, "/a/été.png"), limit=1)) == [0]

    def test_several_examples_are_averaged_and_others_pushed_away(self, points: QdrantIndexer) -> None:
        between = points.search(like=["/a/2.png", "/a/6.png"], limit=1)
        assert (numbers(between), between[0].score) == ([4], pytest.approx(1))
        away = points.search(like="/a/6.png", unlike="/a/5.png", limit=12)
        assert numbers(away)[0] > 6
        assert not {5, 6} & set(numbers(away))
        assert numbers(points.search(like="/a/6.png", unlike="/a/7.png", limit=1))[0] < 6

    def test_an_example_that_is_not_indexed_is_named(self, points: QdrantIndexer) -> None:
        for example in ("/a/99.png", name(99), "7"):
            with pytest.raises(CocoaError, match=rf"has no image {example}; give the path or the id of one"):
                points.search(like=example)
        for wrong, words in (
            ({"like": 0.5}, "an example is a float"),
            ({"like": [None]}, "an example is a NoneType; give the path"),
        ):
            with pytest.raises(UsageError, match=words):
                points.search(**wrong)
        with pytest.raises(UsageError, match="nothing to search for"):
            points.search(unlike="/a/1.png")
        with pytest.raises(UsageError, match="no model was given, but a text or an image needs one"):
            points.search("red", like="/a/1.png")


class TestMany:
    def test_several_queries_have_the_hits_that_each_has_alone(self, points: QdrantIndexer) -> None:
        queries = [{"like": f"/a/{n}.png"} for n in (3, 0, 3)] + [{"like": "/a/1.png", "unlike": "/a/2.png"}]
        found = points.search_many(queries, limit=3, offset=1, query_filter="path")
        assert found == [points.search(**query, limit=3, offset=1, query_filter="path") for query in queries]
        assert asyncio.run(points.asearch_many(queries, limit=3, offset=1)) == found
        assert asyncio.run(points.asearch(like="/a/3.png", limit=3, offset=1)) == found[0]
        assert points.search_many([]) == []

    def test_diverse_hits_are_near_the_query_and_apart_from_each_other(self, points: QdrantIndexer) -> None:
        def diverse(diversity: float, **options: Any) -> list[int]:
            return numbers(points.search(like="/a/0.png", diversity=diversity, limit=4, **options))

        assert diverse(0.0) == [1, 2, 3, 4]
        first, *others = diverse(0.6)
        assert first == 1
        assert min(others) > 4
        assert diverse(0.6, offset=2)[:2] == [first, *others][2:]

    @pytest.mark.parametrize("backend", ["client"], indirect=True)
    @pytest.mark.parametrize("diversity", [None, 0.5, 1.0])
    def test_pages_are_parts_of_one_ranking_also_of_two_vectors_and_of_diverse_hits(
        self, opener: Callable[..., Store], diversity: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cocoa_embed.integrations.qdrant.stores.base.MIN_CANDIDATES", 30)
        vectors = unit(np.random.default_rng(0).normal(size=(2, 120, 8)).astype(np.float32))
        store = opener("pages", "both")
        store.create(Signature("m", "f", 8, BOTH))
        pairs = enumerate(zip(*vectors, strict=True))
        store.insert([Point(name(n), image, {}, caption) for n, (image, caption) in pairs])

        def ids(limit: int, offset: int) -> list[str]:
            query = Query(vectors[0, 0], limit=limit, offset=offset, diversity=diversity)
            return [hit.id for hit in store.search(query)]

        pages = [id_ for offset in range(0, 60, 15) for id_ in ids(15, offset)]
        assert len(set(pages)) == len(pages) == 60
        assert [id_ for offset in range(0, 60, 5) for id_ in ids(5, offset)] == pages
        assert len(ids(10, 90)) == 10, "deeper than the candidates of the first pages"

    def test_a_key_to_group_by_that_no_image_has_is_named_with_the_nearest(self, points: QdrantIndexer) -> None:
        with pytest.raises(
            UsageError, match=r"nothing was grouped: no image .* the key 'albun' \(did you mean 'album'"
        ):
            points.search(like="/a/0.png", group_by="albun")
        last = points.search(like="/a/0.png", group_by="album", limit=1, offset=2)
        assert numbers(last) == [3], "without the key, which others have"

    def test_only_the_best_of_each_group_is_a_hit_and_images_without_the_key_are_not_grouped(
        self, points: QdrantIndexer
    ) -> None:
        # Without an album are 0, 3, 6, ...; in "b" 1, 5, ...; in "a" 2, 4, ...
        grouped = points.search(like="/a/0.png", group_by="album", limit=4)
        assert numbers(grouped) == [1, 2, 3, 6]
        assert points.search(like="/a/0.png", group_by="album", limit=2, offset=2) == grouped[2:]
        assert numbers(points.search(like="/a/0.png", group_by="album", limit=9)) == [1, 2, 3, 6, 9, 12, 15]
        many = points.search_many([{"like": "/a/0.png"}, {"like": "/a/9.png"}], group_by="album", limit=4)
        assert many[0] == grouped


class TestNumbers:
    @pytest.mark.parametrize("backend", ["client"], indirect=True)
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"limit": 2**64}, f"limit is {2**64} and offset 0; .* at most 2147483647"),
            ({"limit": 1, "offset": 2**31}, "together at most"),
            ({"limit": 20_000, "diversity": 0.5}, "at most 16384 with diversity"),
            *[({"score_threshold": float(value)}, f"score_threshold is {value}") for value in ("nan", "inf", "-inf")],
            *[
                ({"diversity": value}, "diversity is .*; give a number from 0 to 1")
                for value in (-0.1, 2, float("nan"))
            ],
            ({"diversity": 0.5, "group_by": "album"}, "cannot be combined"),
            ({"group_by": "a..b"}, "is not a key"),
            ({"group_by": ["a"]}, "give one key of the payload"),
            *[({"limit": value}, "give a whole number") for value in ("3", 2.5, None)],
            ({"score_threshold": "0.5"}, "score_threshold is '0.5'; give a number"),
        ],
    )
    def test_what_a_backend_does_not_take_is_reported_in_one_sentence(
        self, points: QdrantIndexer, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(UsageError, match=words):
            points.search(like="/a/0.png", **options)

    def test_the_largest_numbers_are_taken(self, points: QdrantIndexer) -> None:
        assert len(points.search(like="/a/0.png", limit=2**31 - 1)) == len(ANGLES) - 1
        assert len(points.search(like="/a/0.png", limit=2**14, diversity=0.5)) == len(ANGLES) - 1
        assert points.search(like="/a/0.png", limit=1, offset=2**31 - 2) == []


@pytest.fixture
def remote(server: FakeServer, tmp_path: Path) -> Iterator[QdrantIndexer]:
    """Two images on a server."""
    for colour in ("red", "blue"):
        colour_image(colour).save(tmp_path / f"{colour}.png")
    with QdrantIndexer(FakeModel(), url=server.url) as indexer:
        indexer.index(tmp_path, progress=False)
        yield indexer


def requests_of(server: FakeServer, search: Callable[[], object]) -> list[str]:
    """Return the ends of the addresses that a search requests."""
    before = len(server.requests)
    search()
    return [request.path.removeprefix("/collections/images") for request in server.requests[before:]]


class TestRequests:
    def test_a_search_is_one_request_and_so_are_many_or_all_orientations(
        self, server: FakeServer, remote: QdrantIndexer, tmp_path: Path
    ) -> None:
        remote.search("red")
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        searches: list[Callable[[], object]] = [
            lambda: remote.search("red", query_filter="width>1"),
            lambda: remote.search(image=noise, any_orientation=True),
            lambda: remote.search_many(["red", "blue", {"text": "red", "image": noise}]),
        ]
        for search in searches:
            assert requests_of(server, search) == ["/points/query/batch"]
        like = requests_of(server, lambda: remote.search(like=tmp_path / "red.png"))
        assert like == ["/points/scroll", "/points/query/batch"]

    def test_a_collection_that_was_recreated_by_another_model_or_deleted_is_noticed(
        self, server: FakeServer, remote: QdrantIndexer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Mock(return_value=0.0)
        monkeypatch.setattr("cocoa_embed.integrations.qdrant.stores.server.time.monotonic", clock)
        remote.search("red")
        server.client.delete_collection("images")
        with pytest.raises(CocoaError, match="there is no collection 'images' in"):
            remote.search("red")
        other = Encoder(FakeModel(seed=1), "another model")
        with closing(open_store(url=server.url, collection="images")) as store:
            store.create(Signature(other.name, other.fingerprint, 48))
        with pytest.raises(CocoaError, match="was made with another model"):
            remote.search("red")
        clock.return_value += SIGNATURE_SECONDS + 1
        server.client.delete_collection("images")
        with closing(open_store(url=server.url, collection="images")) as store:
            store.create(Signature(remote.encoder.name, remote.encoder.fingerprint, 48))
        assert remote.search("red") == []
        server.client.update_collection("images", metadata={"cocoa_embed": {"model": "third", "fingerprint": "3"}})
        assert remote.search("red") == [], "within the time that a search trusts what it knows"
        clock.return_value += SIGNATURE_SECONDS + 1
        with pytest.raises(CocoaError, match="was made with third"):
            remote.search("red")


class TestWrongInputs:
    def test_an_argument_that_is_not_a_text_image_or_client_is_named(self, tmp_path: Path) -> None:
        memory = QdrantIndexer(FakeModel(), path=":memory:")
        colour_image("red").save(tmp_path / "red.png")
        memory.index(tmp_path, progress=False)
        assert memory.search("red")[0].path == str(tmp_path / "red.png")
        for arguments, words in (
            ((["red"],), "the text is a list; give one text"),
            ((None, np.zeros((4, 4, 3), np.uint8)), r"the image is a ndarray; .*PIL.Image.fromarray\(array\)"),
            ((None, [tmp_path / "red.png"]), "the image is a list; give one image"),
        ):
            with pytest.raises(UsageError, match=words):
                memory.search(*arguments)
        for queries, words in (
            ("red", "give a list of texts"),
            ([{"txt": "red"}], "a query has the key 'txt'"),
            ([5], "is a int"),
        ):
            with pytest.raises(UsageError, match=words):
                memory.search_many(queries)
        asynchronous: Any = AsyncQdrantClient(":memory:")
        for client, kind in ((asynchronous, "AsyncQdrantClient"), (":memory:", "str")):
            with pytest.raises(UsageError, match=f"client is of type {kind}; give a qdrant_client.QdrantClient"):
                QdrantIndexer(FakeModel(), client=client)
        assert not Path(":memory:").exists()
        for option in ("path", "edge"):
            with pytest.raises(
                UsageError, match=rf"{option} \(--{option}\) takes a folder, and http://a:6333 is an address"
            ):
                QdrantIndexer(FakeModel(), **{option: "http://a:6333"})
