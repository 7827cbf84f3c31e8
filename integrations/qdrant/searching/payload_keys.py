"""The keys that points have: why a filter finds nothing, and which type of index a key needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from cocoa_embed.errors import CocoaError, UsageError, did_you_mean
from cocoa_embed.integrations.qdrant.points import NODE_KEYS, Payload
from cocoa_embed.integrations.qdrant.searching.conditions import (
    FIELD_TYPES,
    OWN_FIELDS,
    And,
    AnyPlace,
    Exists,
    HasWords,
    Not,
    OneOf,
    Or,
    Range,
    column_key,
    field_paths,
)
from cocoa_embed.integrations.qdrant.stores import base
from cocoa_embed.integrations.qdrant.stores.client_filters import read_filter
from cocoa_embed.integrations.qdrant.stores.store import Store

SAMPLE = 256
"""Points that are read to learn which keys there are."""
MAX_SCANNED = 100_000
"""Points that a store may look at, without an index, to find one with a key."""
KINDS = {bool: base.BOOL, int: base.INTEGER, float: base.FLOAT, str: base.KEYWORD}
INDEX_KINDS = (base.KEYWORD, base.TEXT, base.INTEGER, base.FLOAT, base.BOOL, base.DATETIME)
OTHER_NAMES = {
    **dict.fromkeys(("text", "title", "description"), "caption"),
    **dict.fromkeys(("format", "type", "mimetype", "content_type"), "mime"),
    **dict.fromkeys(("size", "filesize", "file_size"), "bytes"),
    **dict.fromkeys(("date", "modified", "time"), "mtime"),
    **dict.fromkeys(("file", "filename", "file_name", "file_path", "image_path"), "path"),
}
"""What people and other programs call the fields of a payload."""


def refuse_unknown_keys(store: Store, conditions: Sequence[Any], effect: str = "nothing was found") -> None:
    """Explain a search that found nothing, if that is because no point has one of the keys in its filter.

    Reads ``SAMPLE`` points. Whether another point has a key that those lack is looked up in collections of up to
    ``MAX_SCANNED`` points; larger ones get no explanation.

    :param conditions: Conditions that must all hold; filters of qdrant-client are not looked at.
    :param effect: What the search did for that reason, for the message.
    :raises UsageError: If there are points, and none has such a key; the message holds the nearest key.
    """
    required = [places for each in conditions for places in required_places(each)]
    payloads = [point.payload for point in store.points(limit=SAMPLE)] if required else []
    for places in required:
        key = places[0].removeprefix("metadata.")
        is_own = key == places[0] and re.split(r"[.[]", key)[0] in OWN_FIELDS
        is_sampled = any(True for payload in payloads for path in places for _ in values(payload, path))
        if is_own or is_sampled or not payloads or store.count() > MAX_SCANNED or store_has(store, places):
            continue
        known = sorted(keys_of(payloads) | FIELD_TYPES.keys())
        other = OTHER_NAMES.get(key.lower())
        guess = f"(did you mean {other!r}?)" if other else did_you_mean(key, known)
        raise UsageError(f"{effect}: no image in {store.name} has the key {key!r} {guess}")


def required_places(condition: Any) -> Iterator[list[str]]:  # noqa: ANN401
    """Yield, for each key that a condition requires, its paths; a point must have a value at one of them."""
    match condition:
        case And(parts):
            for part in parts:
                yield from required_places(part)
        case AnyPlace(parts):
            yield [part.path for part in parts]
        case Or(parts):
            alternatives = [list(required_places(part)) for part in parts]
            yield from alternatives[0] if all(each == alternatives[0] for each in alternatives) else ()
        case Not():
            return
        case OneOf(path=path) | Range(path=path) | HasWords(path=path) | Exists(path=path):
            yield [path]


def store_has(store: Store, places: Sequence[str]) -> bool:
    """Return whether a point has a value at one of several paths, or the store cannot tell."""
    try:
        either = AnyPlace(tuple(map(Exists, places)))
        return any(store.points(read_filter(either, store.payload_indexes()), limit=1))
    except CocoaError:
        return True


def sampled_keys(store: Store) -> set[str]:
    """Return the keys of a sample of points, as filters name them."""
    return keys_of([point.payload for point in store.points(limit=SAMPLE)])


def keys_of(payloads: Sequence[Payload]) -> set[str]:
    """Return the keys of payloads, as filters name them: columns without ``metadata``, if they can be."""
    columns = (each for payload in payloads if isinstance(each := payload.get("metadata"), dict))
    fields = {key for payload in payloads for key in payload} - NODE_KEYS - {"metadata"}
    return fields | {column_key(key) for each in columns for key in each}


def create_index(store: Store, key: str, kind: str | None = None) -> tuple[str, str]:
    """Create the index that filters on a key need; return the path of its field, and its type.

    :param kind: The type; None infers it from a sample of points: texts get ``keyword``, whole values.
    :raises UsageError: If ``kind`` is not a type, or is not given and the values in the sample have no one type.
    """
    paths = [key] if key in NODE_KEYS else field_paths(key)
    if kind not in (None, *INDEX_KINDS):
        raise UsageError(f"{kind!r} is not a type of index; give {', '.join(INDEX_KINDS)}")
    payloads = [point.payload for point in store.points(limit=SAMPLE)]
    types = {path: {type(value) for payload in payloads for value in values(payload, path)} for path in paths}
    field = next(filter(types.get, paths), paths[-1])
    found = {float} if types[field] == {int, float} else types[field]
    if kind is None and key in NODE_KEYS:
        kind = base.KEYWORD
    elif kind is None and not found:
        raise UsageError(
            f"none of {len(payloads)} images in {store.name} has the key {key!r}, so its type is unknown; index such"
            " images first, or give the type"
        )
    elif kind is None and (len(found) > 1 or not found <= KINDS.keys()):
        names = ", ".join(sorted(each.__name__ for each in found))
        raise UsageError(f"{key} has values of the types {names}; give the type of index")
    kind = kind or KINDS[next(iter(found))]
    store.create_payload_index(field, kind)
    return field, kind


def values(payload: Payload, path: str) -> Iterator[Any]:
    """Yield the values at a path in Qdrant's notation, and the elements of lists there; empty ones are left out."""
    steps = [name.strip('"') for name, _ in re.findall(r'("[^"]+"|[^".\[\]]+)((?:\[\d*\])*)', path)]
    found: list[Any] = [payload]
    for step in steps:
        found = [value[step] for value in flat(found) if isinstance(value, dict) and step in value]
    yield from (value for value in flat(found) if value is not None and value != "")


def flat(found: Sequence[Any]) -> Iterator[Any]:
    """Yield values, and the elements of those that are lists."""
    for value in found:
        yield from flat(value) if isinstance(value, list) else [value]
