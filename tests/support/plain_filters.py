"""Conditions evaluated over a payload in plain Python: what every storage backend must agree with."""

import operator
import re
from datetime import datetime
from typing import Any

from cocoa_embed.integrations.qdrant.conditions import (
    EXACT_INTEGER,
    And,
    Condition,
    Exists,
    HasWords,
    Not,
    OneOf,
    Or,
    Range,
    Scalar,
    parse_period,
)

BOUNDS: dict[str, Any] = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}


def holds(condition: Condition, payload: dict[str, Any]) -> bool:
    match condition:
        case And(parts):
            return all(holds(part, payload) for part in parts)
        case Or(parts):
            return any(holds(part, payload) for part in parts)
        case Not(part):
            return not holds(part, payload)
        case OneOf(path, values):
            return any(equal(found, value) for found in elements(payload, path) for value in values)
        case Range():
            return any(is_within(condition, found) for found in elements(payload, condition.path))
        case HasWords(path, text):
            return any(words(text) <= words(found) for found in elements(payload, path) if isinstance(found, str))
        case Exists(path):
            found = values_at(payload, path)
            return "" not in elements(payload, path) and any(value not in (None, []) for value in found)


def values_at(payload: Any, path: str) -> list[Any]:  # noqa: ANN401 - any JSON value
    """Return the values at a path."""
    found = [payload]
    for name, brackets in re.findall(r'("[^"]+"|[\w-]+)((?:\[\d*\])*)', path):
        found = [value[name.strip('"')] for value in found if isinstance(value, dict) and name.strip('"') in value]
        for index in re.findall(r"\[(\d*)\]", brackets):
            lists = [value for value in found if isinstance(value, list)]
            found = [element for value in lists for element in (value[int(index) :][:1] if index else value)]
    return found


def elements(payload: dict[str, Any], path: str) -> list[Any]:
    """Return the values at a path, of a list its elements."""
    return [
        element for value in values_at(payload, path) for element in (value if isinstance(value, list) else [value])
    ]


def equal(found: object, value: Scalar) -> bool:
    numbers = [each for each in (found, value) if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) == 2 and all(abs(number) <= EXACT_INTEGER for number in numbers):
        return numbers[0] == numbers[1]
    return type(found) is type(value) and found == value


def is_within(bounds: Range, found: object) -> bool:
    limits = {name: limit for name in BOUNDS if (limit := getattr(bounds, name)) is not None}
    if any(isinstance(limit, datetime) for limit in limits.values()):
        if not isinstance(found, str) or not re.match(r"\d{4}-\d\d-\d\d", found):
            return False
        found = parse_period(found)[0]
    elif isinstance(found, bool) or not isinstance(found, int | float):
        return False
    return all(BOUNDS[name](found, limit) for name, limit in limits.items())


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.lower()))
