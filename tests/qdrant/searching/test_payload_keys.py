"""Filters on keys that no image has, and on keys without an index where a server wants one."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fake_qdrant import SIGNATURE, FakeServer, delete, turned
from qdrant_client import QdrantClient, models

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.integrations.qdrant.searching import payload_keys
from cocoa_embed.integrations.qdrant.searching.payload_keys import values
from cocoa_embed.integrations.qdrant.stores.server import ServerStore
from cocoa_embed.integrations.qdrant.stores.store import Store

COLUMNS: list[dict[str, Any]] = [
    {"licence": "CC0", "year": 1900, "score": 0.5, "ok": True, "tags": ["a", "b"], "exif": {"iso": 100}, "mixed": 1},
    {"licence": "other", "year": 2000, "score": 1, "ok": False, "tags": [], "exif": {"iso": 50}, "mixed": "x"},
    {"year": None},
]


def searcher(store: Store) -> QdrantIndexer:
    """Three points with columns, near ``/a/0.png``, and no model."""
    store.insert([turned(0, 0), *(turned(n, n, width=n, metadata=each) for n, each in enumerate(COLUMNS, 1))])
    indexer = QdrantIndexer(None, client=QdrantClient(":memory:"))
    indexer.store = store
    return indexer


def found(points: QdrantIndexer, *filters: object) -> list[int]:
    hits = points.search(like="/a/0.png", query_filter=list(filters))
    return [hit.payload["number"] for hit in hits]


@pytest.mark.usefixtures("few_payload_indexes")
class TestUnknownKeys:
    @pytest.fixture(params=["url", "edge"])
    def backend(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @pytest.fixture
    def points(self, store: Store) -> QdrantIndexer:
        return searcher(store)

    def test_a_key_that_no_image_has_is_named_with_the_nearest(self, points: QdrantIndexer) -> None:
        guesses = {
            "widht>=600": "did you mean 'width'",
            "Width>=600": "did you mean 'width'",
            "text~dog": "did you mean 'caption'",
            "date>2026": "did you mean 'mtime'",
            "license=CC0|other": "did you mean 'licence'",
            "metadata.license=CC0": "did you mean 'licence'",
            "zzz": "known: ",
        }
        for text, guess in guesses.items():
            key = re.match(r"\w+", text.removeprefix("metadata."))
            with pytest.raises(UsageError, match=rf"no image in .* has the key '{key[0]}' \({guess}"):
                found(points, "number", text)

    def test_a_search_that_finds_nothing_for_another_reason_finds_nothing(
        self, points: QdrantIndexer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for text in ("width>600", "caption~dog", "licence=none", "exif.iso>500", "tags=z", '"licence"=z', "path=/x"):
            assert found(points, text) == [], text
        missing = models.FieldCondition(key="widht", match=models.MatchValue(value=1))
        assert found(points, missing) == found(points, "!number", "widht!=6") == [], "the last would fit all"
        monkeypatch.setattr(payload_keys, "MAX_SCANNED", 3)
        assert found(points, "zzz=1") == [], "in a collection too large to look through"
        monkeypatch.undo()
        monkeypatch.setattr(payload_keys, "SAMPLE", 1)
        assert found(points, "mixed=y") == [], "a key that the sample does not have"

    def test_a_collection_without_points_says_nothing_about_keys(self, points: QdrantIndexer) -> None:
        payload_keys.refuse_unknown_keys(points.store, [payload_keys.Exists("number")])
        delete(points.store, *(id_ for id_, _ in points.store.scan([])))
        payload_keys.refuse_unknown_keys(points.store, [payload_keys.Exists("zzz")])


class TestStrictServer:
    """Hosted clusters take filters on indexed fields only."""

    @pytest.fixture
    def server(self, server: FakeServer) -> FakeServer:
        server.is_strict = True
        return server

    @pytest.fixture
    def points(self, server: FakeServer) -> Iterator[QdrantIndexer]:
        with QdrantIndexer(None, url=server.url) as indexer:
            indexer.store.create(SIGNATURE)
            searcher(indexer.store)
            yield indexer

    def test_the_fields_of_the_indexer_can_be_in_filters(self, points: QdrantIndexer) -> None:
        assert found(points, "width=1|2", "path!=/x", "bytes!=1", "caption!~dog", "!caption") == [1, 2]
        assert found(points, "mime", "width>5") == []

    def test_a_field_without_an_index_is_named_with_the_command_that_makes_one(
        self, points: QdrantIndexer, server: FakeServer
    ) -> None:
        for text in ("licence=CC0", "licence!=CC0", "licence", "licence~cc0"):
            with pytest.raises(UsageError, match="no index; run: cocoa-embed filterable licence --url URL --coll"):
                found(points, text)
        assert points.create_payload_index("licence") == "metadata.licence"
        assert found(points, "licence=CC0") == [1]
        assert found(points, "licence!=CC0") == [2, 3]
        assert found(points, "licence") == [1, 2]
        assert found(points, "licence=CC0|1900") == [1], "a number is no keyword"
        assert found(points, "licence=CC0|2026-01-31") == [1], "a date may be a text"
        points.create_payload_index("mixed", "datetime")
        assert found(points, "mixed=2026-01-31") == [], "and a text a date"
        with pytest.raises(UsageError, match=r"keyword index of licence does not serve .* one of: text"):
            found(points, "licence~CC0")
        server.indexes["images"].pop("caption")
        points.store.signature()
        with pytest.raises(UsageError, match=r"create_payload_index\('caption'\)"):
            found(points, "caption~dog")

    def test_the_type_of_an_index_is_that_of_the_values(self, points: QdrantIndexer, server: FakeServer) -> None:
        expected = {"year": "integer", "score": "float", "ok": "bool", "tags": "keyword", "exif.iso": "integer"}
        for key, kind in expected.items():
            field = points.create_payload_index(key)
            assert (field, server.indexes["images"][field]["data_type"]) == (f"metadata.{key}", kind)
        assert found(points, "year=1900", "score<1", "ok=true", "tags=b", "exif.iso>=100") == [1]
        assert points.create_payload_index("doc_id") == "doc_id", "LlamaIndex deletes by it"
        assert server.indexes["images"]["doc_id"]["data_type"] == "keyword"
        with pytest.raises(UsageError, match="mixed has values of the types int, str; give the type"):
            points.create_payload_index("mixed")
        with pytest.raises(UsageError, match=r"none of 4 images in .* has the key 'zzz'"):
            points.create_payload_index("zzz")
        assert points.create_payload_index("zzz", "datetime") == "metadata.zzz"
        before = len(server.requests)
        points.create_payload_index("year")
        assert all(request.method != "PUT" for request in server.requests[before:]), "it is there"

    def test_a_qdrant_filter_of_the_user_is_sent_unchanged(self, points: QdrantIndexer, server: FakeServer) -> None:
        either = models.Filter(
            should=[models.FieldCondition(key=key, match=models.MatchValue(value="CC0")) for key in ("mime", "licence")]
        )
        with pytest.raises(UsageError, match="licence has no index"):
            found(points, either)

    def test_a_type_that_qdrant_does_not_have_is_refused(self, points: QdrantIndexer) -> None:
        assert isinstance(points.store, ServerStore)
        with pytest.raises(CocoaError, match="'number' is not a type of index; give keyword, "):
            points.create_payload_index("licence", "number")


def test_values_are_found_at_any_path() -> None:
    payload = {"a": {"b": [1, None, [2]]}, "rows": [{"k": 3}, {"k": ""}, 5], "x.y": {"z": False}}
    for path, expected in (
        ("a.b", [1, 2]),
        ("rows[].k", [3]),
        ("rows.k", [3]),
        ('"x.y".z', [False]),
        ("a.c", []),
        ("a.b.c", []),
    ):
        assert list(values(payload, path)) == expected
