"""Filters of qdrant-client as filters of Qdrant Edge, which has the same conditions under other names. Pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timezone
from typing import Any

import numpy as np
from pydantic import BaseModel

from cocoa_embed.errors import UsageError, require

require("qdrant_client", "qdrant")
require("qdrant_edge", "edge")

import qdrant_edge as edge  # noqa: E402 - after the errors that name the extras
from qdrant_client import models  # noqa: E402

MATCHES = ("MatchValue", "MatchAny", "MatchExcept", "MatchText", "MatchTextAny", "MatchPhrase")
BY_POSITION: dict[type, Callable[..., Any]] = {
    getattr(models, name): getattr(edge, name) for name in ("IsEmptyCondition", "IsNullCondition", *MATCHES)
}
BY_KEYWORD: dict[type, Callable[..., Any]] = {
    models.MinShould: edge.MinShould,
    models.FieldCondition: edge.FieldCondition,
    models.Range: edge.RangeFloat,
    models.DatetimeRange: edge.RangeDateTime,
    models.ValuesCount: edge.ValuesCount,
}


def to_edge_filter(query_filter: models.Filter) -> edge.Filter:
    """Return a filter for Qdrant Edge that lets the same points through.

    :raises UsageError: If it contains a condition that is not supported (on places on Earth, on slices of the
        collection), or a malformed key.
    """
    clauses = {name: getattr(query_filter, name) for name in ("must", "should", "must_not")}
    try:
        lists = {name: _convert([part] if isinstance(part, BaseModel) else part) for name, part in clauses.items()}
        return edge.Filter(**lists, min_should=_convert(query_filter.min_should))
    except (ValueError, TypeError) as error:
        raise UsageError(f"the filter is not one for Qdrant Edge ({error})") from error


def _convert(value: Any) -> Any:  # noqa: ANN401 - conditions have no common type
    match value:
        case models.Filter():
            return to_edge_filter(value)
        case models.HasIdCondition():
            return edge.HasIdCondition(set(value.has_id))
        case models.NestedCondition():
            return edge.NestedCondition(value.nested.key, to_edge_filter(value.nested.filter))
        case models.PayloadField():
            return value.key
        case BaseModel() if type(value) in BY_POSITION:
            return BY_POSITION[type(value)](*(_convert(field) for _, field in value))
        case BaseModel() if type(value) in BY_KEYWORD:
            return BY_KEYWORD[type(value)](**{name: _convert(field) for name, field in value})
        case BaseModel():
            raise UsageError(f"Qdrant Edge has no {type(value).__name__} here; use a Qdrant server for such filters")
    return _convert_plain(value)


def _convert_plain(value: Any) -> Any:  # noqa: ANN401
    match value:
        case list():
            return [_convert(element) for element in value]
        case bool():
            return np.bool_(value)  # Edge takes Python's booleans for integers
        case datetime():
            return (value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)).isoformat()
        case date():
            return f"{value}T00:00:00Z"
    return value
