"""Filters of qdrant-client as those of Qdrant Edge, which has the same under other names. Pure."""

from __future__ import annotations

from datetime import date, datetime, time, timezone
from typing import Any

import numpy as np

from cocoa_embed.errors import UsageError, require

require("qdrant_client", "qdrant")
require("qdrant_edge", "edge")

import qdrant_edge as edge  # noqa: E402 - after the errors that name the extras
from qdrant_client import models  # noqa: E402


def to_edge_filter(query_filter: models.Filter) -> edge.Filter:
    """Return a filter for Qdrant Edge that lets through what ``query_filter`` does.

    :raises UsageError: If it holds a condition that is not supported (on places on Earth, on slices of the
        collection), or a key that is none.
    """
    return edge.Filter(
        must=_conditions(query_filter.must),
        should=_conditions(query_filter.should),
        must_not=_conditions(query_filter.must_not),
        min_should=_min_should(query_filter.min_should),
    )


def _min_should(clause: models.MinShould | None) -> edge.MinShould | None:
    return None if clause is None else edge.MinShould(_conditions(clause.conditions) or [], clause.min_count)


def _conditions(clause: Any) -> list[Any] | None:  # noqa: ANN401 - a condition, or several
    if clause is None:
        return None
    try:
        return [_condition(condition) for condition in (clause if isinstance(clause, list) else [clause])]
    except (ValueError, TypeError) as error:
        raise UsageError(f"a filter is not one for Qdrant Edge ({error})") from error


def _condition(condition: object) -> Any:  # noqa: ANN401 - Edge's conditions have no type of their own
    if isinstance(condition, models.FieldCondition):
        return _field_condition(condition)
    if isinstance(condition, models.Filter):
        return to_edge_filter(condition)
    if isinstance(condition, models.IsEmptyCondition):
        return edge.IsEmptyCondition(condition.is_empty.key)
    if isinstance(condition, models.IsNullCondition):
        return edge.IsNullCondition(condition.is_null.key)
    if isinstance(condition, models.HasIdCondition):
        return edge.HasIdCondition(set(condition.has_id))
    if isinstance(condition, models.HasVectorCondition):
        return edge.HasVectorCondition(condition.has_vector)
    if isinstance(condition, models.NestedCondition):
        return edge.NestedCondition(condition.nested.key, to_edge_filter(condition.nested.filter))
    raise _unsupported(condition)


def _field_condition(condition: models.FieldCondition) -> edge.FieldCondition:
    for place in (condition.geo_bounding_box, condition.geo_radius, condition.geo_polygon):
        if place is not None:
            raise _unsupported(place)
    return edge.FieldCondition(
        condition.key,
        match=_match(condition.match),
        range=_range(condition.range),
        values_count=_count(condition.values_count),
        is_empty=condition.is_empty,
        is_null=condition.is_null,
    )


def _count(count: models.ValuesCount | None) -> edge.ValuesCount | None:
    return None if count is None else edge.ValuesCount(lt=count.lt, gt=count.gt, lte=count.lte, gte=count.gte)


def _match(match: models.Match | None) -> Any:  # noqa: ANN401
    if match is None:
        return None
    if isinstance(match, models.MatchValue):
        # Edge takes Python's booleans for the integers that they are too, NumPy's for booleans.
        value: Any = np.bool_(match.value) if isinstance(match.value, bool) else match.value
        return edge.MatchValue(value)
    if isinstance(match, models.MatchAny):
        values: Any = list(match.any)
        return edge.MatchAny(values)
    if isinstance(match, models.MatchExcept):
        others: Any = list(match.except_)
        return edge.MatchExcept(others)
    if isinstance(match, models.MatchText):
        return edge.MatchText(match.text)
    if isinstance(match, models.MatchTextAny):
        return edge.MatchTextAny(match.text_any)
    if isinstance(match, models.MatchPhrase):
        return edge.MatchPhrase(match.phrase)
    raise _unsupported(match)


def _range(bounds: models.RangeInterface | None) -> Any:  # noqa: ANN401
    if bounds is None:
        return None
    if isinstance(bounds, models.Range):
        return edge.RangeFloat(gte=bounds.gte, gt=bounds.gt, lte=bounds.lte, lt=bounds.lt)
    return edge.RangeDateTime(
        gte=_moment(bounds.gte), gt=_moment(bounds.gt), lte=_moment(bounds.lte), lt=_moment(bounds.lt)
    )


def _moment(moment: datetime | date | None) -> str | None:
    if moment is None:
        return None
    if not isinstance(moment, datetime):
        moment = datetime.combine(moment, time.min)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)).isoformat()


def _unsupported(condition: object) -> UsageError:
    return UsageError(f"Qdrant Edge is given no {type(condition).__name__} here; use a Qdrant server for such filters")
