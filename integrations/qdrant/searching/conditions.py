"""Conditions on the payload of a point: one tree, for every way to write a filter and every storage backend. Pure."""

from __future__ import annotations

import math
import mimetypes
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TypeAlias, TypeGuard
from unicodedata import normalize

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.qdrant.points import NODE_KEYS, REVISION
from cocoa_embed.sources.base import LARGEST_INTEGER

Scalar: TypeAlias = str | bool | int | float

TEXT, NUMBER, TIME = "text", "number", "time"
FIELD_TYPES = {
    **dict.fromkeys(("path", "relative_path", "paths", "relative_paths", "sha256", "thumbnail"), TEXT),
    **dict.fromkeys(("mime", "caption", "caption_source"), TEXT),
    **dict.fromkeys(("width", "height", "bytes"), NUMBER),
    **dict.fromkeys(("mtime", "mtimes"), TIME),
}
"""The fields that the indexer writes at the top level of a payload. A time is stored in seconds since 1970."""

OWN_FIELDS = FIELD_TYPES.keys() | NODE_KEYS | {"metadata"}
"""The top level of a payload; any other key may also be a column of ``metadata.jsonl``, below ``metadata``."""

EXACT_INTEGER = 2**53
"""Integers up to here are exact as floats, which ranges are made of."""

_STEP = r"""\s*("[^"\\]+"|[^".\[\]\s\\](?:[^".\[\]\\]*[^".\[\]\s\\])?)\s*((?:\[\d*\])*)\s*"""
_WORD = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class And:
    """All conditions hold."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Or:
    """At least one condition holds."""

    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class AnyPlace(Or):
    """One condition on each of the paths at which a payload may hold a key."""

    conditions: tuple[OneOf | Range | HasWords | Exists, ...]


@dataclass(frozen=True)
class TextOrPeriod(Or):
    """A column equals a text, or is within the period that the text names; it is of one kind or of the other."""


@dataclass(frozen=True)
class Not:
    """The condition does not hold; true where the field is missing."""

    condition: Condition


@dataclass(frozen=True)
class OneOf:
    """The field, or an element of a list in it, equals one of the values: 1 equals 1.0, and True is not 1.

    An integer above ``EXACT_INTEGER`` equals integers only.
    """

    path: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Range:
    """The field, or an element of a list in it, is a number or an ISO 8601 date within the bounds."""

    path: str
    bounds: Mapping[str, float | datetime]
    """The bounds, by ``gt``, ``gte``, ``lt`` or ``lte``."""


@dataclass(frozen=True)
class HasWords:
    """The field, or an element of a list in it, contains all words of a text, in any order and case."""

    path: str
    text: str


@dataclass(frozen=True)
class Exists:
    """The field is there, and is neither null, an empty list nor an empty text."""

    path: str


Condition: TypeAlias = And | Or | Not | OneOf | Range | HasWords | Exists


def all_of(conditions: Iterable[Condition]) -> Condition:
    """Return the condition that all of several hold."""
    listed = tuple(conditions)
    return listed[0] if len(listed) == 1 else And(listed)


def any_of(conditions: Iterable[Condition]) -> Condition:
    """Return the condition that at least one of several holds."""
    listed = tuple(conditions)
    return listed[0] if len(listed) == 1 else Or(listed)


def field_paths(key: str) -> list[str]:
    """Return the paths, in Qdrant's notation, at which a payload may hold what a filter calls ``key``.

    A dot leads to a nested field, ``[]`` to all elements of a list and ``[0]`` to its first; a name that contains a dot
    stands in double quotes. ``author`` is found as ``author``, where LlamaIndex writes it, and as ``metadata.author``;
    the ``path`` of a copy in ``paths``.

    :raises UsageError: If the key is malformed.
    """
    if re.fullmatch(rf"{_STEP}(?:\.{_STEP})*", key) is None:
        raise UsageError(f'{key!a} is not a key; name a field, as in width, exif.iso or "a.b"')
    steps = [(name.strip('"'), brackets) for name, brackets in re.findall(_STEP, key)]
    path = ".".join((name if re.fullmatch(r"[\w-]+", name) else f'"{name}"') + brackets for name, brackets in steps)
    if path in ("path", "relative_path"):
        return [path, f"{path}s"]
    return [path] if steps[0][0] in OWN_FIELDS else [path, f"metadata.{path}"]


def column_key(name: str) -> str:
    """Return what a filter calls a column: ``metadata.path`` if the name alone means a field of the payload."""
    return f"metadata.{name}" if name in OWN_FIELDS | {REVISION} else name


def field_type(key: str) -> str | None:
    """Return the type of an own field; None for any other key.

    :raises UsageError: If the key is malformed.
    """
    return FIELD_TYPES.get(field_paths(key)[0])


def one_of(key: str, values: Sequence[Scalar]) -> Condition:
    """Return the condition that a field equals one of the values, however accents in a text are composed.

    ``mtime`` takes dates too: a year, a month or a day stands for all of it, in UTC; a moment may name another zone.

    :raises UsageError: If a value does not fit the field.
    """
    type_ = field_type(key)
    if type_ == TIME:
        return any_of(_at_time(key, value) for value in values)
    for value in values:
        check_type(key, type_, value)
    if key == "mime":
        values = [media_type(str(value)) for value in values]
    for value in values if type_ == TEXT and key != "caption" else ():
        check_whole(key, str(value))
    spelled = tuple(form for value in values for form in (normal_forms(value) if isinstance(value, str) else [value]))
    return on_paths(key, lambda path: OneOf(path, spelled))


def normal_forms(text: str) -> list[str]:
    """Return a text, and what it is with accents composed and decomposed (é is one code point or two)."""
    return list(dict.fromkeys((text, normalize("NFC", text), normalize("NFD", text))))


def in_period(key: str, text: str) -> Condition:
    """Return the condition that a column holds a date within a year, month or day, or the same moment.

    :raises UsageError: If the text is not a date.
    """
    start, end = parse_period(text)
    return on_paths(key, lambda path: Range(path, {"gte": start, "lt" if start < end else "lte": end}))


def media_type(name: str) -> str:
    """Return the media type that a name stands for: ``png``, ``.jpg`` and ``IMAGE/JPG`` too."""
    kind, _, suffix = name.lower().rpartition("/")
    return mimetypes.guess_type(f"x.{suffix.lstrip('.')}")[0] or f"{kind or 'image'}/{suffix.lstrip('.')}"


def check_whole(key: str, value: str) -> None:
    """Refuse a value that no image can have in a field that is compared as a whole.

    :raises UsageError: If it is a pattern, a folder, or a relative path in a field of absolute paths.
    """
    if "*" in value:
        raise UsageError(
            f"{key} is compared as a whole, so {value!a} is not a pattern; search for words with ~, as in {key}~jpeg"
        )
    if key in ("path", "paths") and not re.match(r"[/\\]|[A-Za-z][\w+.-]*:", value):
        raise UsageError(f"{key} holds absolute paths, and {value!a} is not one; compare it with relative_path")
    if key in ("path", "paths", "relative_path", "relative_paths") and value.endswith(("/", "\\")):
        raise UsageError(f"{key} is compared as a whole, but {value!a} is a folder; give the path of an image")


def _at_time(key: str, value: Scalar) -> Condition:
    if is_number(value):
        return on_paths(key, lambda path: OneOf(path, (value,)))
    start, end = (moment.timestamp() for moment in parse_period(str(value)))
    return on_paths(key, lambda path: Range(path, {"gte": start, "lt": end}) if start < end else OneOf(path, (start,)))


def compare(key: str, bound: str, value: Scalar) -> Condition:
    """Return the condition that a field is above or below a value, a number or a date.

    :param bound: The name of a bound of ``Range``. A year, a month or a day stands for its first moment; with ``lte``,
        for its last.
    :raises UsageError: If the value does not fit the field.
    """
    type_ = field_type(key)
    if type_ == TEXT:
        raise UsageError(f"{key} is a text, which has no order")
    check_type(key, type_, value)
    limit: float | datetime
    if is_number(value):
        limit = value
    else:
        start, end = parse_period(str(value))
        bound, limit = ("lt", end) if bound == "lte" and start < end else (bound, start)
        limit = limit.timestamp() if type_ == TIME else limit
    return on_paths(key, lambda path: Range(path, {bound: limit}))


def has_words(key: str, text: str) -> Condition:
    """Return the condition that a field contains all words of a text, however accents are composed.

    :raises UsageError: If the text has no word, or the field is a number.
    """
    if field_type(key) in (NUMBER, TIME):
        raise UsageError(f"{key} is a number and has no words")
    if _WORD.search(text) is None:
        raise UsageError(f"there is no word in {text!a}")
    return any_of(on_paths(key, partial(HasWords, text=form)) for form in normal_forms(text))


def on_paths(key: str, condition: Callable[[str], OneOf | Range | HasWords | Exists]) -> Condition:
    """Return the condition that the field at one of the paths of a key fulfils ``condition``.

    :raises UsageError: If the key is malformed.
    """
    places = tuple(map(condition, field_paths(key)))
    return places[0] if len(places) == 1 else AnyPlace(places)


def check_type(key: str, type_: str | None, value: Scalar) -> None:
    """Refuse a value that a field of a type cannot have.

    :raises UsageError: If it is one.
    """
    if (type_ == TEXT and not isinstance(value, str)) or (is_number(value) is False and type_ == NUMBER):
        raise UsageError(f"{key} is a {type_}, but {value!a} is not")


def is_number(value: Scalar) -> TypeGuard[int | float]:
    """Return whether a value is a number.

    :raises UsageError: If it is one that Qdrant cannot compare with.
    """
    if isinstance(value, str | bool):
        return False
    if not is_storable(value):
        raise UsageError(f"{value} is not a finite number of at most 64 bits")
    return True


def is_storable(number: float) -> bool:
    """Return whether Qdrant can store a number: not NaN, not infinite, and no integer beyond 64 bits."""
    return abs(number) <= LARGEST_INTEGER if isinstance(number, int) else math.isfinite(number)


def parse_period(text: str) -> tuple[datetime, datetime]:
    """Return the first moment of an ISO 8601 year, month or day, and the first one after it; a moment twice.

    :raises UsageError: If the text is not a date.
    """
    is_period = re.fullmatch(r"\d{4}(-\d\d){0,2}", text) is not None
    try:
        if not is_period and re.match(r"\d{4}-\d\d-\d\d.", text) is None:
            raise ValueError(text)
        whole = text + "-01-01"[len(text) - 4 :] if is_period else re.sub("[zZ]$", "+00:00", text)
        start = datetime.fromisoformat(whole)  # Python 3.10 does not know the Z
        start = start if start.tzinfo else start.replace(tzinfo=timezone.utc)
        if not is_period:
            return start, start
        end = start + timedelta(days={4: 366, 7: 31, 10: 1}[len(text)])
        return start, end if len(text) == 10 else end.replace(day=1, month=end.month if len(text) == 7 else 1)
    except (ValueError, OverflowError):
        raise UsageError(
            f"{text!a} is not a number or a date, such as 2026, 2026-01-31 or 2026-01-31T12:00+01:00"
        ) from None
