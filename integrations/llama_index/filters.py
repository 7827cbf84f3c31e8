"""LlamaIndex's metadata filters as a Qdrant filter. Pure.

A filter means what it means to LlamaIndex itself (``llama_index.core.vector_stores.utils.build_metadata_filter_fn``),
as far as Qdrant can say it: a field that a point does not have is unequal to everything, and a number is the same
whether it is stored as 3 or as 3.0. Of a list, one element is enough. Texts are matched by their words, in either case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TypeAlias

from cocoa_embed.errors import UsageError, require
from cocoa_embed.integrations.qdrant.points import NODE_KEYS

require("llama_index.core", "llama-index")
require("qdrant_client", "qdrant")

from llama_index.core.vector_stores import (  # noqa: E402 - after the errors that name the extras
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from qdrant_client import models  # noqa: E402

Value: TypeAlias = str | int | float
Test: TypeAlias = Callable[[str], models.Condition]
"""Makes the condition on the payload's field of a key."""

TIME_KEYS = frozenset({"mtime", "mtimes"})
"""What the indexer writes in seconds since 1970."""

INDEXER_KEYS = TIME_KEYS | frozenset(
    "path relative_path paths relative_paths sha256 bytes mime width height caption thumbnail".split()
)
"""What the indexer's payloads hold beside ``metadata``, where the other columns of a ``metadata.jsonl`` are."""

OWN_KEYS = INDEXER_KEYS | NODE_KEYS | {"metadata"}

BOUNDS = {
    FilterOperator.GT: "gt",
    FilterOperator.GTE: "gte",
    FilterOperator.LT: "lt",
    FilterOperator.LTE: "lte",
}
"""What Qdrant's ranges call LlamaIndex's comparisons."""

EXACT_INTEGER = 2**53
"""The integers up to here are floats too, which a range is made of."""

LARGEST_INTEGER = 2**63 - 1
"""Qdrant's integers have 64 bits."""

WORD = re.compile(r"[^\W_]")
"""What is in every word; Qdrant passes over all else."""

STEP = r'(?:[\w-]+|"[^"]+")(?:\[\d*\])*'
FIELD_PATH = re.compile(rf"({STEP})(?:\.{STEP})*")
"""A path to a field of a payload, as Qdrant reads it; a step of other characters stands in quotes."""


def to_qdrant_filter(filters: MetadataFilters | None) -> models.Filter | None:
    """Return the Qdrant filter that lets the same points through; None where nothing is asked.

    A key that is none of the indexer's own is looked up in the payload itself, where LlamaIndex writes a node's
    metadata, and below its ``metadata``, where the indexer writes a column: ``author`` also means ``metadata.author``.
    A key with a dot leads into what is nested; quote one that has a dot in its name: ``"a.b"``.

    :raises UsageError: If an operator has a value that it cannot be asked with, or is none that Qdrant knows.
    """
    if filters is None:
        return None
    parts = [part for filter_ in filters.filters if (part := to_condition(filter_)) is not None]
    if not parts:
        return None
    match filters.condition:
        case FilterCondition.OR:
            return models.Filter(should=parts)
        case FilterCondition.NOT:
            return models.Filter(must_not=parts)
        case FilterCondition.AND | None:
            return models.Filter(must=parts)
    raise UsageError(f"the filter condition {filters.condition!r} is not known; use AND, OR or NOT")


def to_condition(filter_: MetadataFilter | MetadataFilters) -> models.Filter | None:
    """Return what one filter among several asks, or None if it asks nothing.

    :raises UsageError: If its operator has a value that it cannot be asked with, or is none that Qdrant knows.
    """
    if isinstance(filter_, MetadataFilters):
        return to_qdrant_filter(filter_)
    keys, operator = field_paths(filter_.key), filter_.operator
    match operator:
        case FilterOperator.EQ | FilterOperator.CONTAINS:
            return either(keys, equal_to_one_of([single_value(filter_)]))
        case FilterOperator.NE:
            return models.Filter(must_not=[either(keys, equal_to_one_of([single_value(filter_)]))])
        case FilterOperator.IN | FilterOperator.ANY:
            return either(keys, equal_to_one_of(value_list(filter_)))
        case FilterOperator.NIN:
            return models.Filter(must_not=[either(keys, equal_to_one_of(value_list(filter_)))])
        case FilterOperator.ALL:
            return models.Filter(must=[either(keys, equal_to_one_of([value])) for value in value_list(filter_)])
        case FilterOperator.TEXT_MATCH | FilterOperator.TEXT_MATCH_INSENSITIVE:
            return either(keys, with_the_words_of(filter_))
        case FilterOperator.IS_EMPTY:
            return models.Filter(must=[empty(key) for key in keys])
    if operator not in BOUNDS:
        raise UsageError(f"the filter operator {operator!r} is not known; use one of {', '.join(FilterOperator)}")
    return either(keys, within(filter_))


def field_paths(key: str) -> list[str]:
    """Return the paths at which a payload may hold what a filter calls ``key``.

    :raises UsageError: If the key cannot be written as a path.
    """
    path = key if FIELD_PATH.fullmatch(key) else f'"{key}"'
    parsed = FIELD_PATH.fullmatch(path)
    if parsed is None:
        raise UsageError(f"{key!r} is no key of a filter; name a field of the payload, with a dot before a nested one")
    first = parsed[1].split("[")[0]
    return [path] if first in OWN_KEYS else [path, f"metadata.{path}"]


def either(keys: Sequence[str], test: Test) -> models.Filter:
    """Return the condition that the field of one of the keys passes a test."""
    return models.Filter(should=[test(key) for key in keys])


def equal_to_one_of(values: Sequence[Value]) -> Test:
    """Return the test for one of several values, numbers by their value and not by how they are stored."""
    words = [value for value in values if isinstance(value, str)]
    integers = [value for value in values if isinstance(value, int) and abs(value) > EXACT_INTEGER]
    numbers = [value for value in values if not isinstance(value, str) and value not in integers]

    def test(key: str) -> models.Condition:
        same: list[models.Condition] = [
            models.FieldCondition(key=key, range=models.Range(gte=number, lte=number)) for number in numbers
        ]
        exact: list[list[str] | list[int]] = [words, integers]
        same += [models.FieldCondition(key=key, match=models.MatchAny(any=group)) for group in exact if group]
        return same[0] if len(same) == 1 else models.Filter(should=same)

    return test


def within(filter_: MetadataFilter) -> Test:
    """Return the test for a number or a moment beyond a bound.

    :raises UsageError: If the bound is neither.
    """
    value, side = single_value(filter_), BOUNDS[filter_.operator]
    if not isinstance(value, str):
        return lambda key: models.FieldCondition(key=key, range=models.Range(**{side: value}))
    moment = parse_moment(filter_, value)

    def test(key: str) -> models.Condition:
        if key in TIME_KEYS:
            return models.FieldCondition(key=key, range=models.Range(**{side: moment.timestamp()}))
        return models.FieldCondition(key=key, range=models.DatetimeRange(**{side: moment}))

    return test


def with_the_words_of(filter_: MetadataFilter) -> Test:
    """Return the test for a text that has all the words of another.

    :raises UsageError: If the filter's value is no text.
    """
    text = filter_.value
    if not isinstance(text, str) or not WORD.search(text):
        raise unfit(filter_, "a text with a word in it")
    return lambda key: models.FieldCondition(key=key, match=models.MatchText(text=text))


def empty(key: str) -> models.Condition:
    """Return the condition that a field is missing, null, an empty list, or an empty text."""
    return models.Filter(
        should=[models.IsEmptyCondition(is_empty=models.PayloadField(key=key)), equal_to_one_of([""])(key)]
    )


def single_value(filter_: MetadataFilter) -> Value:
    """Return a filter's value, which must be one.

    :raises UsageError: If it is none, a list, or cannot be compared with.
    """
    value = filter_.value
    if value is None or isinstance(value, list):
        raise unfit(filter_, "one text or number")
    return checked(filter_, value)


def value_list(filter_: MetadataFilter) -> list[Value]:
    """Return a filter's values, which must be a list.

    :raises UsageError: If they are no list or an empty one, or one cannot be compared with.
    """
    if not isinstance(filter_.value, list) or not filter_.value:
        raise unfit(filter_, "a list of one or more texts or numbers")
    return [checked(filter_, value) for value in filter_.value]


def checked(filter_: MetadataFilter, value: Value) -> Value:
    """Return a value that Qdrant can compare with.

    :raises UsageError: If it is infinite, NaN, or an integer of more than 64 bits; or a text to be equal to a time.
    """
    if isinstance(value, str):
        if filter_.key in TIME_KEYS and filter_.operator not in BOUNDS:
            raise unfit(filter_, "seconds since 1970 (< and >= take dates)")
    elif not math.isfinite(value) or (isinstance(value, int) and abs(value) > LARGEST_INTEGER):
        raise unfit(filter_, "a finite number of at most 64 bits")
    return value


def parse_moment(filter_: MetadataFilter, text: str) -> datetime:
    """Return the moment that a text names, in UTC where it says nothing else.

    :raises UsageError: If it is no date.
    """
    try:
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))  # Python 3.10 does not know the Z
    except ValueError:
        raise unfit(filter_, "a number, or a date such as 2026-01-31") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def unfit(filter_: MetadataFilter, needed: str) -> UsageError:
    """Return the error for an operator that cannot be asked with its value."""
    operator = filter_.operator.value
    return UsageError(f"the filter on {filter_.key!r}: the operator {operator} needs {needed}, not {filter_.value!r}")
