import itertools
import math
import re
from typing import Any

import pytest
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn
from qdrant_client.local.payload_filters import check_filter

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.llama_index.filters import to_condition
from cocoa_embed.integrations.qdrant.searching.filters import parse_filters
from cocoa_embed.integrations.qdrant.stores.client_filters import read_filter

AND, OR, NOT = FilterCondition.AND, FilterCondition.OR, FilterCondition.NOT
NODES: list[dict[str, Any]] = [
    {"author": "Ann", "year": 2020, "rating": 4.5, "tags": ["sea", "sky"]},
    {"author": "Bob", "year": 2021, "rating": 4.0, "tags": ["sky"]},
    {"author": "ann", "year": 2022, "rating": 3, "tags": []},
    {"author": "", "year": 2021.0, "tags": ["sea"]},
    {"year": 1999, "tags": None},
    {},
]
"""Metadata as LlamaIndex writes it: with integers and floats, and fields that are missing, null or empty."""

OPERATORS: list[tuple[str, str, Any]] = [
    ("author", "==", "Ann"),
    ("year", "==", 2021),
    ("rating", "!=", 4.5),
    ("year", ">", 2020),
    ("year", ">=", 2021),
    ("rating", "<", 4.5),
    ("rating", "<=", 4),
    ("author", "in", ["Ann", "Bob"]),
    ("year", "nin", [2020, 2021]),
    ("tags", "any", ["sea", "moon"]),
    ("tags", "all", ["sea", "sky"]),
    ("tags", "contains", "sea"),
    ("author", "is_empty", None),
    ("tags", "is_empty", None),
    ("author", "text_match_insensitive", "ann"),
]


def one(key: str, operator: str, value: object = None) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=FilterOperator(operator))])


def found(filters: MetadataFilters) -> set[int]:
    condition = to_condition(filters)
    assert condition is not None
    query_filter = read_filter(condition)
    assert query_filter is not None
    return {number for number, payload in enumerate(NODES) if check_filter(query_filter, payload, number, {})}


def found_by_llama_index(filters: MetadataFilters) -> set[int]:
    passes = build_metadata_filter_fn(lambda number: NODES[int(number)], filters)
    return {number for number in range(len(NODES)) if passes(str(number))}


@pytest.mark.parametrize("condition", [AND, OR, NOT])
def test_a_filter_means_what_it_means_to_llama_index(condition: FilterCondition) -> None:
    assert set(FilterOperator) - {operator for _, operator, _ in OPERATORS} == {FilterOperator.TEXT_MATCH}
    alone = [(operator,) for operator in OPERATORS]
    for chosen in [*alone, *itertools.combinations(OPERATORS[::2], 2)]:
        filters = MetadataFilters(filters=[one(*each).filters[0] for each in chosen], condition=condition)
        expected = found_by_llama_index(filters)
        assert found(filters) == expected, chosen
        assert len(chosen) > 1 or 0 < len(expected) < len(NODES), chosen


def test_filters_may_be_nested() -> None:
    early, late, ann = one("year", "<", 2000), one("year", ">", 2021), one("author", "==", "Ann")
    neither = MetadataFilters(filters=[early, late], condition=NOT)
    either = MetadataFilters(filters=[MetadataFilters(filters=[neither, ann], condition=AND), late], condition=OR)
    assert (found(neither), found(either)) == ({0, 1, 3, 5}, {0, 2})
    assert found(MetadataFilters(filters=[either], condition=NOT)) == {1, 3, 4, 5}


def test_no_filters_give_no_condition() -> None:
    nothing = MetadataFilters(filters=[], condition=NOT)
    assert to_condition(nothing) is to_condition(MetadataFilters(filters=[nothing], condition=None)) is None
    assert found(MetadataFilters(filters=[nothing, *one("author", "==", "Ann").filters])) == {0}


def test_text_filters_and_llama_index_filters_give_the_same_condition() -> None:
    assert parse_filters(["width>=1000"]) == to_condition(one("width", ">=", 1000))
    assert parse_filters(['"a.b"=c']) == to_condition(one('"a.b"', "==", "c"))
    assert parse_filters(["mtime=2026-01-31"]) == to_condition(one("mtime", "==", "2026-01-31"))
    assert parse_filters(["caption~red kite"]) == to_condition(one("caption", "text_match", "red kite"))


@pytest.mark.parametrize(
    ("key", "operator", "value", "needed"),
    [
        *[("year", "==", value, "needs one text or number") for value in (["a"], None)],
        *[("year", "in", value, "needs a list") for value in ("a", [])],
        ("year", "<", "yesterday", "is not a number or a date, such as 2026"),
        *[("year", "nin", [value], "is not a finite number of at most 64 bits") for value in (math.inf, 2**63)],
        ("year", "text_match", "_!", "there is no word in"),
        ("width", "==", "wide", "width is a number, but 'wide' is not"),
        ('a"b', "==", 7, "is not a key"),
    ],
)
def test_errors_name_the_filter(key: str, operator: str, value: object, needed: str) -> None:
    named = f"the filter on {key!r} with {operator} {value!r}: "
    with pytest.raises(UsageError, match=re.escape(named) + ".*" + re.escape(needed)):
        to_condition(one(key, operator, value))
