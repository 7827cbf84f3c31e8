"""Conditions as filters of qdrant-client. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypeAlias

from cocoa_embed.errors import UsageError, require
from cocoa_embed.integrations.qdrant import conditions as tree
from cocoa_embed.integrations.qdrant.filters import parse_filters

require("qdrant_client", "qdrant")

from qdrant_client import models  # noqa: E402 - after the error that names the extra

Filter: TypeAlias = models.Filter | tree.Condition | Sequence[str] | str | None


def read_filter(query_filter: Filter) -> models.Filter | None:
    """Return a filter that a caller gives: as texts (``parse_filters``), a condition, or a filter of qdrant-client.

    :raises UsageError: If it is neither.
    """
    if query_filter is None or isinstance(query_filter, models.Filter):
        return query_filter
    if isinstance(query_filter, tree.Condition):
        return to_client_filter(query_filter)
    if isinstance(query_filter, str):
        query_filter = [query_filter]
    if not isinstance(query_filter, Sequence):
        raise UsageError(
            f"query_filter is a {type(query_filter).__name__}; give conditions, as in"
            ' ["mime=image/png", "width>=800"], or a qdrant_client.models.Filter'
        )
    return to_client_filter(parse_filters(query_filter))


def to_client_filter(condition: tree.Condition) -> models.Filter:
    """Return a condition as a filter of qdrant-client."""
    converted = _convert(condition)
    return converted if isinstance(converted, models.Filter) else models.Filter(must=[converted])


def _convert(condition: tree.Condition) -> models.Condition:
    match condition:
        case tree.And(parts):
            return models.Filter(must=[_convert(part) for part in parts])
        case tree.Or(parts):
            return models.Filter(should=[_convert(part) for part in parts])
        case tree.Not(negated):
            return models.Filter(must_not=[_convert(negated)])
        case tree.OneOf(path, values):
            return models.Filter(should=_equal_to_one_of(path, values))
        case tree.Range(path, bounds):
            is_time = any(isinstance(bound, datetime) for bound in bounds.values())
            limits: Any = models.DatetimeRange if is_time else models.Range
            return models.FieldCondition(key=path, range=limits(**bounds))
        case tree.HasWords(path, text):
            return models.FieldCondition(key=path, match=models.MatchText(text=text))
        case tree.Exists(path):
            empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=path))
            return models.Filter(must_not=[empty, *_equal_to_one_of(path, [""])])


def _equal_to_one_of(path: str, values: Sequence[tree.Scalar]) -> list[models.Condition]:
    """Return conditions of which one holds where a field equals a value.

    Numbers are ranges, to which 1 and 1.0 are equal; to a match they are not.
    """
    conditions: list[models.Condition] = []
    for value in values:
        if isinstance(value, float) or (type(value) is int and abs(value) <= tree.EXACT_INTEGER):
            conditions.append(models.FieldCondition(key=path, range=models.Range(gte=value, lte=value)))
        else:
            conditions.append(models.FieldCondition(key=path, match=models.MatchValue(value=value)))
    return conditions
