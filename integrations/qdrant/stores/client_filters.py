"""Conditions as filters of qdrant-client. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias, get_args

from cocoa_embed.errors import UsageError, require
from cocoa_embed.integrations.qdrant.searching import conditions as tree
from cocoa_embed.integrations.qdrant.searching.filters import parse_filter

require("qdrant_client", "qdrant")

from qdrant_client import models  # noqa: E402 - after the error that names the extra

Part: TypeAlias = tree.Condition | models.Condition
Filter: TypeAlias = Part | Sequence[str | Part] | str | None

Indexes: TypeAlias = Mapping[str, str] | None
"""The types of payload indexes by field, if a server takes filters on no other field; None if any field may be in a
filter."""
SERVED = {"bool": bool, "integer": (int, float), "float": (int, float), "keyword": str}
"""The Python types of the values that an index of a type finds."""


def read_conditions(query_filter: Filter) -> list[Part]:
    """Return the conditions that a caller gives, which must all hold.

    :param query_filter: A text (``parse_filters``), a ``Condition``, one of qdrant-client, or several of these.
    :raises UsageError: If it is something else.
    """
    if query_filter is None:
        return []
    accepted: Any = (str, tree.Condition, *get_args(models.Condition))
    parts: Any = [query_filter] if isinstance(query_filter, accepted) else query_filter
    if isinstance(parts, Sequence) and all(isinstance(part, accepted) for part in parts):
        return [parse_filter(part) if isinstance(part, str) else part for part in parts]
    kinds = type(query_filter).__name__
    if isinstance(parts, Sequence):
        kinds += f" of {', '.join(sorted({type(part).__name__ for part in parts}))}"
    raise UsageError(
        f"query_filter is a {kinds}; give conditions, as in"
        ' ["mime=image/png", "width>=800"], or a qdrant_client.models.Filter'
    )


def read_filter(query_filter: Filter, indexes: Indexes = None) -> models.Filter | None:
    """Return the filter of qdrant-client for what a caller gives; None if it has no conditions.

    :param indexes: Leave out what no index of these serves: a second place where a payload may have a key, and values
        of other types.
    :raises UsageError: If it is not a filter.
    """
    parts = read_conditions(query_filter)
    if len(parts) == 1 and isinstance(parts[0], models.Filter):
        return parts[0]
    converted = [_convert(part, indexes) if isinstance(part, tree.Condition) else part for part in parts]
    return models.Filter(must=converted) if converted else None


def _convert(condition: tree.Condition, indexes: Indexes) -> models.Condition:
    match condition:
        case tree.And(parts):
            return models.Filter(must=[_convert(part, indexes) for part in parts])
        case tree.AnyPlace(parts):
            indexed = [part for part in parts if indexes is None or part.path in indexes]
            return models.Filter(should=[_convert(part, indexes) for part in indexed or parts])
        case tree.TextOrPeriod(parts):
            served = [part for part in parts if indexes is None or _is_served(part, indexes)]
            return models.Filter(should=[_convert(part, indexes) for part in served or parts])
        case tree.Or(parts):
            return models.Filter(should=[_convert(part, indexes) for part in parts])
        case tree.Not(negated):
            return models.Filter(must_not=[_convert(negated, indexes)])
        case tree.OneOf(path, values):
            return models.Filter(should=_equal_to_one_of(path, values, indexes))
        case tree.Range(path, bounds):
            is_time = any(isinstance(bound, datetime) for bound in bounds.values())
            limits: Any = models.DatetimeRange if is_time else models.Range
            return models.FieldCondition(key=path, range=limits(**bounds))
        case tree.HasWords(path, text):
            return models.FieldCondition(key=path, match=models.MatchText(text=text))
        case tree.Exists(path):
            empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=path))
            has_texts = indexes is None or indexes.get(path) == "keyword"
            return models.Filter(must_not=[empty, *(_equal_to_one_of(path, [""], None) if has_texts else [])])


def _is_served(condition: tree.Condition, indexes: Mapping[str, str]) -> bool:
    """Return whether an index serves what a part of a ``TextOrPeriod`` compares: times, or texts and numbers."""
    places: Any = condition.conditions if isinstance(condition, tree.AnyPlace) else (condition,)
    return any(
        each.path in indexes and (indexes[each.path] == "datetime") == isinstance(each, tree.Range) for each in places
    )


def _equal_to_one_of(path: str, values: Sequence[tree.Scalar], indexes: Indexes) -> list[models.Condition]:
    """Return conditions of which one holds where a field equals a value.

    Numbers become ranges, in which 1 equals 1.0; in a match, it does not.
    """
    conditions: list[models.Condition] = []
    served: Any = SERVED.get((indexes or {}).get(path, ""), object)
    for value in [value for value in values if isinstance(value, served)] or values:
        if isinstance(value, float) or (type(value) is int and abs(value) <= tree.EXACT_INTEGER):
            conditions.append(models.FieldCondition(key=path, range=models.Range(gte=value, lte=value)))
        else:
            conditions.append(models.FieldCondition(key=path, match=models.MatchValue(value=value)))
    return conditions
