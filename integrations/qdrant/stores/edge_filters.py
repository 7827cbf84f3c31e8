"""Filters of qdrant-client as filters of Qdrant Edge, which has the same conditions under other names. Pure."""

from __future__ import annotations

from datetime import date, datetime, timezone
from typing import Any

import numpy as np
import qdrant_edge as edge
from pydantic import BaseModel
from qdrant_client import models

from cocoa_embed.errors import UsageError

OTHER_NAMES = {"Range": "RangeFloat", "DatetimeRange": "RangeDateTime"}


def to_edge_filter(query_filter: models.Filter | None) -> edge.Filter | None:
    """Return a filter for Qdrant Edge that lets the same points through; None for none.

    :raises UsageError: If it contains a condition that Qdrant Edge does not have, or a malformed key.
    """
    if query_filter is None:
        return None
    clauses = {name: getattr(query_filter, name) for name in ("must", "should", "must_not")}
    try:
        lists = {name: _convert([part] if isinstance(part, BaseModel) else part) for name, part in clauses.items()}
        return edge.Filter(**lists, min_should=_convert(query_filter.min_should))
    except (AttributeError, ValueError, TypeError) as error:
        raise UsageError(f"the filter is not one for Qdrant Edge ({error})") from error


def _convert(value: Any) -> Any:  # noqa: ANN401 - conditions have no common type
    match value:
        case models.Filter():
            return to_edge_filter(value)
        case models.HasIdCondition():
            return edge.HasIdCondition(set(value.has_id))
        case models.NestedCondition():
            return edge.NestedCondition(value.nested.key, _convert(value.nested.filter))
        case models.IsEmptyCondition(is_empty=field):
            return edge.IsEmptyCondition(field.key)
        case models.IsNullCondition(is_null=field):
            return edge.IsNullCondition(field.key)
        case BaseModel():
            name = type(value).__name__
            converted = {field.rstrip("_"): _convert(part) for field, part in value}
            return getattr(edge, OTHER_NAMES.get(name, name))(**converted)
    return _convert_plain(value)


def _convert_plain(value: Any) -> Any:  # noqa: ANN401
    match value:
        case list():
            return [_convert(element) for element in value]
        case bool():
            return np.bool_(value)  # Edge treats Python's booleans as integers
        case datetime():
            return (value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)).isoformat()
        case date():
            return f"{value}T00:00:00Z"
    return value
