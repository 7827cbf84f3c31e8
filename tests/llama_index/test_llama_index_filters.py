import itertools
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import pytest

pytest.importorskip("llama_index.core")
pytest.importorskip("qdrant_client")

from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn
from qdrant_client import QdrantClient, models

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.llama_index.filters import to_qdrant_filter

Payload = dict[str, Any]

AND, OR, NOT = FilterCondition.AND, FilterCondition.OR, FilterCondition.NOT

FLAT: list[Payload] = [
    {"author": "Ann", "year": 2020, "rating": 4.5, "tags": ["sea", "sky"]},
    {"author": "Bob", "year": 2021, "rating": 4.0, "tags": ["sky"]},
    {"author": "ann", "year": 2022, "rating": 3, "tags": []},
    {"author": "", "year": 2021.0, "tags": ["sea"]},
    {"year": 1999, "tags": None},
    {},
]
"""Metadata as LlamaIndex writes them: with numbers of both kinds, and fields that are missing, null or empty."""


def point_numbers(payloads: Sequence[Payload], query_filter: models.Filter | None) -> set[int]:
    """Return the numbers of the payloads that Qdrant lets through."""
    client = QdrantClient(":memory:")
    client.create_collection("all", vectors_config=models.VectorParams(size=1, distance=models.Distance.COSINE))
    client.upsert(
        "all",
        points=[
            models.PointStruct(id=number, vector=[1.0], payload=payload) for number, payload in enumerate(payloads)
        ],
    )
    points, _ = client.scroll("all", scroll_filter=query_filter, limit=100)
    client.close()
    return {int(point.id) for point in points}


def one(key: str, operator: str, value: object) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=FilterOperator(operator))])


def found(payloads: Sequence[Payload], key: str, operator: str, value: object = None) -> set[int]:
    return point_numbers(payloads, to_qdrant_filter(one(key, operator, value)))


EVERY_OPERATOR = [
    ("author", "==", "Ann"),
    ("year", "==", 2021),
    ("rating", "==", 4.5),
    ("rating", "==", 3.0),
    ("author", "!=", "Ann"),
    ("year", "!=", 2021),
    ("rating", "!=", 4.5),
    ("year", ">", 2020),
    ("year", ">=", 2021),
    ("rating", "<", 4.5),
    ("rating", "<=", 4),
    ("author", "in", ["Ann", "Bob"]),
    ("year", "in", [2020, 2021]),
    ("rating", "in", [4.0, 4.5]),
    ("author", "nin", ["Ann", "Bob"]),
    ("year", "nin", [2020, 2021]),
    ("tags", "any", ["sea", "moon"]),
    ("tags", "all", ["sea", "sky"]),
    ("tags", "contains", "sea"),
    ("author", "is_empty", None),
    ("tags", "is_empty", None),
    ("author", "text_match_insensitive", "ann"),
]


@pytest.mark.parametrize(("key", "operator", "value"), EVERY_OPERATOR)
@pytest.mark.parametrize("condition", [AND, OR, NOT])
def test_a_filter_means_what_it_means_to_llama_index(
    key: str, operator: str, value: object, condition: FilterCondition
) -> None:
    filters = one(key, operator, value)
    filters.condition = condition
    passes = build_metadata_filter_fn(lambda number: FLAT[int(number)], filters)
    expected = {number for number in range(len(FLAT)) if passes(str(number))}
    assert 0 < len(expected) < len(FLAT)
    assert point_numbers(FLAT, to_qdrant_filter(filters)) == expected


def test_every_operator_of_llama_index_is_tried() -> None:
    tried = {FilterOperator(operator) for _, operator, _ in EVERY_OPERATOR}
    assert set(FilterOperator) - tried == {FilterOperator.TEXT_MATCH}, "which is the next test's"


def test_a_text_is_matched_by_its_words_in_either_case() -> None:
    payloads = [{"caption": "A red Kite over the sea"}, {"caption": "kites over red roofs"}, {"caption": None}, {}]
    for operator in ("text_match", "text_match_insensitive"):
        assert found(payloads, "caption", operator, "kite RED") == {0}
        assert found(payloads, "caption", operator, "over") == {0, 1}


@pytest.mark.parametrize(("first", "second"), itertools.combinations(EVERY_OPERATOR[::3], 2))
@pytest.mark.parametrize("condition", [AND, OR, NOT])
def test_filters_beside_each_other(first: tuple, second: tuple, condition: FilterCondition) -> None:
    filters = [one(*each).filters[0] for each in (first, second)]
    both = MetadataFilters(filters=filters, condition=condition)
    passes = build_metadata_filter_fn(lambda number: FLAT[int(number)], both)
    expected = {number for number in range(len(FLAT)) if passes(str(number))}
    assert point_numbers(FLAT, to_qdrant_filter(both)) == expected


def test_filters_within_filters() -> None:
    early, late = one("year", "<", 2000), one("year", ">", 2021)
    ann = one("author", "==", "Ann")
    neither = MetadataFilters(filters=[early, late], condition=NOT)
    assert point_numbers(FLAT, to_qdrant_filter(neither)) == {0, 1, 3, 5}
    either = MetadataFilters(filters=[MetadataFilters(filters=[neither, ann], condition=AND), late], condition=OR)
    assert point_numbers(FLAT, to_qdrant_filter(either)) == {0, 2}
    not_either = MetadataFilters(filters=[either], condition=NOT)
    assert point_numbers(FLAT, to_qdrant_filter(not_either)) == {1, 3, 4, 5}


@pytest.mark.parametrize("condition", [AND, OR, NOT, None])
def test_nothing_asked_is_no_filter(condition: FilterCondition | None) -> None:
    nothing = MetadataFilters(filters=[], condition=condition)
    assert to_qdrant_filter(None) is None
    assert to_qdrant_filter(nothing) is None
    assert to_qdrant_filter(MetadataFilters(filters=[nothing, nothing], condition=condition)) is None
    beside = MetadataFilters(filters=[nothing, *one("author", "==", "Ann").filters], condition=AND)
    assert point_numbers(FLAT, to_qdrant_filter(beside)) == {0}


INDEXED: list[Payload] = [
    {"path": "/a.png", "width": 800, "caption": "sea", "mtime": 1767225600.0, "metadata": {"author": "Ann", "n": 1}},
    {"path": "/b.png", "width": 400, "caption": None, "mtime": 1767225599.0, "metadata": {"author": "Bob", "width": 1}},
    {"path": "/c.png", "width": 400, "caption": "", "metadata": {"taken at": "2024-05-01", "exif": {"iso": 100}}},
    {"author": "Ann", "taken at": "2024-05-02T10:00:00Z", "a.b": 7},
]
"""Three payloads of the indexer's kind, and one of LlamaIndex's."""


def test_a_column_is_found_below_metadata_and_beside() -> None:
    assert found(INDEXED, "author", "==", "Ann") == {0, 3}
    assert found(INDEXED, "author", "!=", "Ann") == {1, 2}
    assert found(INDEXED, "author", "is_empty") == {2}
    assert found(INDEXED, "metadata.author", "==", "Ann") == {0}
    assert found(INDEXED, "exif.iso", ">=", 100) == {2}


def test_the_indexers_own_keys_mean_themselves() -> None:
    assert found(INDEXED, "width", "<", 500) == {1, 2}
    assert found(INDEXED, "caption", "is_empty") == {1, 2, 3}
    assert found(INDEXED, "path", "in", ["/a.png", "/c.png"]) == {0, 2}


def test_a_key_may_be_any_name() -> None:
    assert found(INDEXED, "taken at", "==", "2024-05-01") == {2}
    assert found(INDEXED, '"a.b"', "==", 7) == {3}
    assert found(INDEXED, "a.b", "==", 7) == set()
    for key in ("", '"', 'a"b'):
        with pytest.raises(UsageError, match="is no key of a filter"):
            found(INDEXED, key, "==", 7)


def test_moments_are_compared_by_their_dates() -> None:
    assert found(INDEXED, "taken at", ">", "2024-05-01") == {3}
    assert found(INDEXED, "taken at", "<=", "2024-05-02T12:00:00+02:00") == {2, 3}
    assert found(INDEXED, "taken at", "<", "2024-05-02T10:00:00Z") == {2}
    assert datetime(2026, 1, 1, tzinfo=timezone.utc).timestamp() == INDEXED[0]["mtime"]
    assert found(INDEXED, "mtime", ">=", "2026-01-01") == {0}
    assert found(INDEXED, "mtime", "<", "2026-01-01") == {1}
    assert found(INDEXED, "mtime", "==", 1767225600) == {0}
    with pytest.raises(UsageError, match="'mtime': the operator == needs seconds since 1970"):
        found(INDEXED, "mtime", "==", "2026-01-01")


def test_integers_that_are_no_floats_are_told_apart() -> None:
    large = 2**53 + 1
    payloads = [{"n": large}, {"n": large - 1}, {"n": -large}, {"n": 3}, {"n": 3.0}, {"n": 1e300}]
    assert found(payloads, "n", "==", large) == {0}
    assert found(payloads, "n", "in", [large, 3]) == {0, 3, 4}
    assert found(payloads, "n", "nin", [-large, large]) == {1, 3, 4, 5}
    assert found(payloads, "n", "==", 1e300) == {5}


@pytest.mark.parametrize(
    ("operator", "value", "needed"),
    [
        ("==", None, "one text or number"),
        ("==", ["a"], "one text or number"),
        ("!=", ["a"], "one text or number"),
        ("contains", ["a"], "one text or number"),
        (">", None, "one text or number"),
        (">", [1], "one text or number"),
        ("<", "yesterday", "a number, or a date such as 2026-01-31"),
        ("<=", float("nan"), "a finite number of at most 64 bits"),
        ("==", float("inf"), "a finite number of at most 64 bits"),
        ("in", "a,b", "a list of one or more"),
        ("in", [], "a list of one or more"),
        ("nin", [], "a list of one or more"),
        ("any", "a", "a list of one or more"),
        ("all", 3, "a list of one or more"),
        ("nin", [1.0, float("nan")], "a finite number of at most 64 bits"),
        ("text_match", 3, "a text with a word in it"),
        ("text_match", "_!", "a text with a word in it"),
        ("==", 2**63, "a finite number of at most 64 bits"),
        ("text_match_insensitive", None, "a text with"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_operator(operator: str, value: object, needed: str) -> None:
    with pytest.raises(UsageError) as caught:
        found(FLAT, "year", operator, value)
    assert f"the filter on 'year': the operator {operator} needs {needed}" in str(caught.value)
    assert repr(value) in str(caught.value)


def test_an_operator_that_is_not_known_is_named() -> None:
    strange = MetadataFilter.model_construct(key="year", value=1, operator="near")
    with pytest.raises(UsageError, match="operator 'near' is not known; use one of ==, "):
        to_qdrant_filter(MetadataFilters.model_construct(filters=[strange], condition=AND))
    with pytest.raises(UsageError, match="condition 'xor' is not known"):
        to_qdrant_filter(MetadataFilters.model_construct(filters=one("year", "==", 1).filters, condition="xor"))


def test_llama_indexs_qdrant_store_understands_some_filters_otherwise() -> None:
    """What stays different on its side, for those who ask it rather than CocoaRetriever."""
    qdrant = pytest.importorskip("llama_index.vector_stores.qdrant")
    store = qdrant.QdrantVectorStore("none", client=QdrantClient(":memory:"))

    def theirs(payloads: Sequence[Payload], *filter_: Any) -> set[int]:
        return point_numbers(payloads, store._build_subfilter(one(*filter_)))

    same = [("author", "==", "Ann"), ("year", ">", 2020), ("rating", "==", 4.5), ("author", "in", ["Ann", "Bob"])]
    for filter_ in same:
        assert theirs(FLAT, *filter_) == found(FLAT, *filter_) != set()
    assert theirs(FLAT, "author", "!=", "Ann") == {1, 2, 3}, "not those without an author"
    assert found(FLAT, "author", "!=", "Ann") == {1, 2, 3, 4, 5}
    assert theirs(FLAT, "year", "==", 2021) == {1}, "not 2021.0"
    assert found(FLAT, "year", "==", 2021) == {1, 3}
    assert theirs(INDEXED, "author", "==", "Ann") == {3}, "not below metadata"
    assert theirs(INDEXED, "metadata.author", "==", "Ann") == {0}
    for operator in ("any", "all", "contains"):
        with pytest.raises(NotImplementedError):
            theirs(FLAT, "tags", operator, ["sea"])
