"""LlamaIndex's metadata filters as conditions on the payload. Pure.

A filter means what it means to LlamaIndex itself (``llama_index.core.vector_stores.utils.build_metadata_filter_fn``):
a missing field is unequal to everything, and one element of a list is enough. Texts match by words, ignoring case.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.qdrant.searching import conditions
from cocoa_embed.integrations.qdrant.searching.conditions import Condition, Not, all_of, any_of, one_of

LIST_OPERATORS = (FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL)


def to_condition(filters: MetadataFilters) -> Condition | None:
    """Return the condition that the filters state; None if there are no filters.

    :raises UsageError: If a filter's value does not fit its operator or its field, or an operator is not known.
    """
    parts = [
        part
        for each in filters.filters
        if (part := to_condition(each) if isinstance(each, MetadataFilters) else read_filter(each)) is not None
    ]
    if not parts:
        return None
    match filters.condition:
        case FilterCondition.OR:
            return any_of(parts)
        case FilterCondition.NOT:
            return Not(any_of(parts))
        case FilterCondition.AND | None:
            return all_of(parts)
    raise UsageError(f"the filter condition {filters.condition!r} is not known; use AND, OR or NOT")


def read_filter(filter_: MetadataFilter) -> Condition:
    """Return the condition that one filter states.

    :raises UsageError: If its value does not fit its operator or its field, or the operator is not known.
    """
    key, operator = filter_.key, filter_.operator
    value: Any = filter_.value
    try:
        if operator in LIST_OPERATORS and not (isinstance(value, list) and value):
            raise UsageError("the operator needs a list of one or more texts or numbers")
        if operator not in (*LIST_OPERATORS, FilterOperator.IS_EMPTY) and (value is None or isinstance(value, list)):
            raise UsageError("the operator needs one text or number")
        values: list[Any] = value if isinstance(value, list) else [value]
        match operator:
            case FilterOperator.EQ | FilterOperator.CONTAINS | FilterOperator.IN | FilterOperator.ANY:
                return one_of(key, values)
            case FilterOperator.NE | FilterOperator.NIN:
                return Not(one_of(key, values))
            case FilterOperator.ALL:
                return all_of(one_of(key, [each]) for each in values)
            case FilterOperator.TEXT_MATCH | FilterOperator.TEXT_MATCH_INSENSITIVE:
                return conditions.has_words(key, str(values[0]))
            case FilterOperator.IS_EMPTY:
                return Not(conditions.on_paths(key, conditions.Exists))
            case FilterOperator.GT | FilterOperator.GTE | FilterOperator.LT | FilterOperator.LTE:
                return conditions.compare(key, operator.name.lower(), values[0])
    except UsageError as error:
        raise UsageError(f"the filter on {key!r} with {operator.value} {value!r}: {error}") from None
    raise UsageError(f"the filter operator {operator!r} is not known; use one of {', '.join(FilterOperator)}")
