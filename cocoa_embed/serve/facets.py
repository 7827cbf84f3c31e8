"""What a page can filter by: the keys of a sample of points, and their values."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from cocoa_embed.integrations.qdrant.points import NODE_KEYS, REVISION, Payload
from cocoa_embed.integrations.qdrant.searching.conditions import column_key
from cocoa_embed.integrations.qdrant.searching.payload_keys import flat

SAMPLE = 2000
"""The number of points that are read to find facets."""

MAX_VALUES = 20
"""The maximum number of values of a facet."""

MAX_CHARACTERS = 64
"""A key with a longer value becomes a facet of kind ``text``."""

HIDDEN = NODE_KEYS | {REVISION, "path", "paths", "relative_path", "relative_paths", "mtimes", "sha256"}
HIDDEN |= {"thumbnail", "caption_source", "metadata"}
"""The payload keys that are not offered as facets."""


def make_facets(payloads: Iterable[Payload]) -> list[dict[str, Any]]:
    """Return the facets of points, the most frequent keys first, without keys that no filter can name.

    :returns: ``key``, as a filter names it, and ``kind``: a ``number`` with ``min`` and ``max``, a ``keyword`` with
        ``values``, pairs of a value and its count, or ``text``.
    """
    found: dict[str, list[Any]] = defaultdict(list)
    points: Counter[str] = Counter()
    for payload in payloads:
        for key, value in nameable(payload).items():
            values = [each for each in flat([value]) if isinstance(each, str | int | float) and each != ""]
            found[key] += values
            points[key] += bool(values)
    keys = sorted(filter(found.get, found), key=lambda key: (-points[key], key))
    return [{"key": key, **describe(key, found[key])} for key in keys]


def nameable(payload: Payload) -> dict[str, Any]:
    """Return the fields and columns of a payload that a filter can name, by the key as it is written there."""
    columns = payload.get("metadata")
    named = as_written(columns) if isinstance(columns, dict) else {}
    fields = as_written({key: value for key, value in payload.items() if key not in HIDDEN})
    return {**{column_key(key): value for key, value in named.items()}, **fields}


def as_written(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields by their keys in quotes, where a filter needs them."""
    # In the quotes of a filter there can be neither another quote nor a backslash.
    keys = (key for key in fields if re.fullmatch(r'[^"\\]+', key))
    return {key if re.fullmatch(r"[\w-]+", key) else f'"{key}"': fields[key] for key in keys}


def describe(key: str, values: list[Any]) -> dict[str, Any]:
    """Return the kind of a facet, and its values or its range."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {"kind": "number", "min": min(values), "max": max(values)}
    counts = Counter(str(each).lower() if isinstance(each, bool) else str(each) for each in values)
    repeats = len(counts) <= MAX_VALUES or 2 * len(counts) <= len(values)
    if key == "caption" or not repeats or max(map(len, counts)) > MAX_CHARACTERS:
        return {"kind": "text"}
    return {"kind": "keyword", "values": [list(each) for each in counts.most_common(MAX_VALUES)]}
