"""Filters on the payload as people write them: ``mime=image/png``, ``width>=1000``, ``author=Ann|Bob``. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import NamedTuple

from cocoa_embed.errors import UsageError, require
from cocoa_embed.integrations.qdrant.points import NODE_KEYS, storable

require("qdrant_client", "qdrant")

from qdrant_client import models  # noqa: E402 - after the error that names the extra

TEXT_KEYS = frozenset(
    {"path", "relative_path", "paths", "relative_paths", "sha256", "mime", "caption", "caption_source", "thumbnail"}
)
TIME_KEYS = frozenset({"mtime", "mtimes"})
NUMBER_KEYS = frozenset({"width", "height", "bytes"}) | TIME_KEYS
PAYLOAD_KEYS = TEXT_KEYS | NUMBER_KEYS | NODE_KEYS | {"metadata"}
"""The top level of a payload; any other key is a column of ``metadata.jsonl``."""

EXACT_INTEGER = 2**53
"""The integers up to here are floats too, which a range of numbers is made of."""
LARGEST_INTEGER = 2**63
"""Integers from here on can only be compared as strings."""
SECONDS_A_DAY = 24 * 60 * 60
FORMS = (
    "write KEY=VALUE, KEY!=VALUE, KEY<VALUE, KEY<=VALUE, KEY>VALUE, KEY>=VALUE, KEY~WORDS, KEY!~WORDS,"
    " KEY=ONE|OTHER, KEY (it is there) or !KEY (it is not)"
)
_CONDITION = re.compile(
    r"""\s*(?P<key>(?:"[^"]*"|[^"=<>!~])+?)\s*(?P<operator>!=|!~|<=|>=|=|<|>|~)\s*(?P<value>.*?)\s*""", re.DOTALL
)
_PRESENCE = re.compile(r"""\s*(?P<absent>!?)\s*(?P<key>(?:"[^"]*"|[^"=<>!~])+?)\s*""", re.DOTALL)
_SEGMENT = re.compile(r"""\s*("[^"]*"|[^".\[\]]+)\s*((?:\[\d*\])*)\s*(?:\.|$)""")
_CHOICE = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|[^|]*?)\s*(?:\||$)""", re.DOTALL)
_BARE_NAME = re.compile(r"[\w-]+")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"[^\W_]")


class Value(NamedTuple):
    """One value of a condition."""

    text: str
    """What the payload may hold as a string."""
    is_quoted: bool
    """Whether it is a string and nothing else."""

    @property
    def number(self) -> int | float | None:
        """What the payload may hold as a number."""
        if self.is_quoted or _NUMBER.fullmatch(self.text) is None:
            return None
        number = json.loads(self.text)
        return (
            number if math.isfinite(number) and (isinstance(number, float) or abs(number) < LARGEST_INTEGER) else None
        )

    @property
    def boolean(self) -> bool | None:
        """What the payload may hold as a boolean."""
        return None if self.is_quoted else {"true": True, "false": False}.get(self.text)


def parse_filters(texts: Sequence[str]) -> models.Filter:
    """Return the filter that lets points through of which all of ``texts`` hold.

    ``=`` compares whole values: a number or a boolean with one, or with a string of the same letters; anything else,
    and what stands in double quotes, with a string. ``!=`` is its opposite, so it holds too where the key is absent.
    ``<`` and the like compare numbers, or dates with strings that are dates. ``~`` looks for words: each of them has
    to be a whole word of the text, in whatever order and case; this holds with a text index and without, in every
    home. Of a list in the payload, one element has to match. A key of none of the payload's own fields is a column of
    ``metadata.jsonl``: ``author`` means ``metadata.author``. A date or a time given for ``mtime`` stands for its
    seconds, in UTC where it names no other zone; ``mtime=2026-01-31`` is that whole day.

    :raises UsageError: If one is written in no such form, or compares what cannot be compared.
    """
    must: list[models.Condition] = []
    must_not: list[models.Condition] = []
    for text in texts:
        condition, holds = parse_condition(text)
        (must if holds else must_not).append(condition)
    return models.Filter(must=must or None, must_not=must_not or None)


def parse_condition(text: str) -> tuple[models.Condition, bool]:
    """Return one condition, and whether it has to hold or must not.

    :raises UsageError: If it is written in no known form.
    """
    # As the payload has the undecodable bytes of a file's name.
    text = storable(text)
    presence = _PRESENCE.fullmatch(text)
    if presence is not None:
        key = payload_path(text, presence["key"])
        return models.IsEmptyCondition(is_empty=models.PayloadField(key=key)), presence["absent"] == "!"
    parts = _CONDITION.fullmatch(text)
    if parts is None:
        raise UsageError(f"{text!a} is no filter; {FORMS}")
    key, operator = payload_path(text, parts["key"]), parts["operator"]
    choices = split_choices(text, parts["value"])
    build = COMPARISONS[operator.removeprefix("!")]
    conditions = [condition for choice in choices for condition in build(text, key, choice)]
    holds = not operator.startswith("!")
    return (conditions[0] if len(conditions) == 1 else models.Filter(should=conditions)), holds


def payload_path(text: str, key: str) -> str:
    """Return the path of a key in the payload, in Qdrant's notation.

    :raises UsageError: If it is none.
    """
    names, top, start = [], "", 0
    while start < len(key):
        segment = _SEGMENT.match(key, start)
        name = "" if segment is None else segment[1].strip().strip('"')
        if segment is None or not name or (segment.end() == len(key) and key.endswith(".")):
            raise UsageError(f"{text!a} is no filter: {key!a} is no key; {FORMS}")
        top = top or name
        names.append((name if _BARE_NAME.fullmatch(name) else f'"{name}"') + segment[2])
        start = segment.end()
    return ".".join(names if top in PAYLOAD_KEYS else ["metadata", *names])


def split_choices(text: str, value: str) -> list[Value]:
    """Return the values between the bars of ``ONE|OTHER``.

    :raises UsageError: If there is none, or one is empty without quotes.
    """
    choices, start = [], 0
    while start <= len(value):
        match = _CHOICE.match(value, start)
        choice = "" if match is None else match[1]
        if match is None or not choice:
            raise UsageError(f'{text!a} is no filter: a value is missing; {FORMS}, and "" for an empty text')
        choices.append(unquoted(text, choice))
        if match.end() == len(value) and not match[0].endswith("|"):
            break
        start = match.end()
    return choices


def unquoted(text: str, choice: str) -> Value:
    """Return a value, without its quotes.

    :raises UsageError: If a quote is missing.
    """
    if not choice.startswith('"'):
        return Value(choice, is_quoted=False)
    try:
        return Value(json.loads(choice), is_quoted=True)
    except ValueError as error:
        raise UsageError(f"{text!a} is no filter: {choice!a} is no text in double quotes ({error})") from error


def equal(text: str, key: str, value: Value) -> list[models.Condition]:
    """Return the conditions of which one holds where the payload has this value.

    :raises UsageError: If the key is that of a number, and the value none.
    """
    if key in TIME_KEYS and value.number is None:
        return [models.FieldCondition(key=key, range=span(*moments(text, key, value)))]
    if key in NUMBER_KEYS:
        return [equal_number(key, required_number(text, key, value))]
    conditions = [] if value.number is None or key in TEXT_KEYS else [equal_number(key, value.number)]
    exact: list[bool | str] = [value.text] if value.boolean is None else [value.boolean, value.text]
    matches = [models.FieldCondition(key=key, match=models.MatchValue(value=one)) for one in exact]
    return [*conditions, *matches]


def equal_number(key: str, number: int | float) -> models.Condition:
    """Return the condition that the payload has this number, as an integer or not."""
    if abs(number) > EXACT_INTEGER and isinstance(number, int):
        return models.FieldCondition(key=key, match=models.MatchValue(value=number))
    return models.FieldCondition(key=key, range=models.Range(gte=number, lte=number))


def ordered(name: str) -> Callable[[str, str, Value], list[models.Condition]]:
    """Return what builds the condition that a value is less or more than another one.

    :param name: Of the bound in Qdrant's ranges.
    """

    def build(text: str, key: str, value: Value) -> list[models.Condition]:
        if key in TEXT_KEYS:
            raise UsageError(f"{text!a} is no filter: {key} is a text; compare it by = or != or ~")
        if key in TIME_KEYS and value.number is None:
            return [models.FieldCondition(key=key, range=models.Range(**{name: moments(text, key, value)[0]}))]
        if value.number is None and key not in NUMBER_KEYS:
            moment = parse_moment(value.text)
            if moment is not None:
                return [models.FieldCondition(key=key, range=models.DatetimeRange(**{name: moment}))]
        return [models.FieldCondition(key=key, range=models.Range(**{name: required_number(text, key, value)}))]

    return build


def containing(text: str, key: str, value: Value) -> list[models.Condition]:
    """Return the condition that the payload has a text with all of some words.

    :raises UsageError: If there are none, or the key is that of a number.
    """
    if key in NUMBER_KEYS:
        raise UsageError(f"{text!a} is no filter: {key} is a number; compare it by = or != or < or >")
    if _WORD.search(value.text) is None:
        raise UsageError(f"{text!a} is no filter: there is no word in {value.text!a} to look for")
    return [models.FieldCondition(key=key, match=models.MatchText(text=value.text))]


COMPARISONS: dict[str, Callable[[str, str, Value], list[models.Condition]]] = {
    "=": equal,
    "~": containing,
    "<": ordered("lt"),
    "<=": ordered("lte"),
    ">": ordered("gt"),
    ">=": ordered("gte"),
}


def required_number(text: str, key: str, value: Value) -> int | float:
    """Return a value as the number that it has to be.

    :raises UsageError: If it is none.
    """
    number = value.number
    if number is None:
        also = "" if key in NUMBER_KEYS - TIME_KEYS else " and no date such as 2026-01-31 or 2026-01-31T12:00+01:00"
        raise UsageError(f"{text!a} is no filter: {value.text!a} is no number{also}")
    return number


def moments(text: str, key: str, value: Value) -> tuple[float, float | None]:
    """Return the seconds of a date or time, and those of the day's end if it is a date.

    :raises UsageError: If it is neither.
    """
    moment = parse_moment(value.text)
    if moment is None:
        raise UsageError(
            f"{text!a} is no filter: {value.text!a} is no number of seconds for {key}, and no date such as 2026-01-31"
            " or 2026-01-31T12:00+01:00"
        )
    is_day = re.fullmatch(r"\d{4}-\d\d-\d\d", value.text) is not None
    return moment.timestamp(), moment.timestamp() + SECONDS_A_DAY if is_day else None


def span(start: float, end: float | None) -> models.Range:
    """Return the range from ``start`` up to ``end``, or of ``start`` alone."""
    return models.Range(gte=start, lte=start) if end is None else models.Range(gte=start, lt=end)


def parse_moment(text: str) -> datetime | None:
    """Return an ISO 8601 date or time, in UTC if it names no zone; None if it is none."""
    if re.match(r"\d{4}-\d\d-\d\d", text) is None:
        return None
    try:
        # Python 3.10 knows no Z.
        moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)
