"""Filters in the text syntax of the command line: ``mime=image/png``, ``width>=1000``, ``author=Ann|Bob``. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.qdrant.searching import conditions
from cocoa_embed.integrations.qdrant.searching.conditions import TEXT, TIME, Condition, Not, Scalar, all_of, any_of
from cocoa_embed.sources.base import storable

FORMS = (
    "write KEY=VALUE, KEY!=VALUE, KEY<VALUE, KEY<=VALUE, KEY>VALUE, KEY>=VALUE, KEY~WORDS, KEY!~WORDS,"
    " KEY=ONE|OTHER, KEY (has a value) or !KEY (has none)"
)
SIGNS = {"≠": "!=", "≤": "<=", "≥": ">="}
QUOTES = {'"': '"', "'": "'", "“": "”"}
BOUNDS = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}

_KEY = r"""\s*(?P<key>(?:"[^"]*"|[^"=<>!~≠≤≥])+?)\s*"""
_PRESENCE = re.compile(rf"\s*(?P<absent>!?){_KEY}", re.DOTALL)
_COMPARISON = re.compile(rf"{_KEY}(?P<operator>!=|!~|<=|>=|==?|<|>|~|≠|≤|≥)\s*(?P<value>.*?)\s*", re.DOTALL)
_MISTYPED = re.compile(r"""([^\s:"]+)(?:\s*:\s*|\s+)(\S.*)""", re.DOTALL)
_CHOICE = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|“[^”]*”|[^|]*?)\s*(\||\Z)""", re.DOTALL)
_SECOND = re.compile(r"""(?:[\s;,&]|\b)(?:and|&&?|,|;)\s*!?[\w.]+\s*[<>!~≠≤≥=]""", re.IGNORECASE)
"""Matches where a value seems to continue with a second condition."""
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,18})(?:\.\d+)?(?:[eE][+-]?\d+)?")


def parse_filters(texts: Sequence[str]) -> Condition:
    """Return the condition that all filters hold.

    ``=`` compares whole values: a number or a boolean with one, or with a string of the same characters; a value in
    quotes is a string. ``!=`` is the opposite and also holds where the key is missing. ``<``, ``<=``, ``>`` and
    ``>=`` compare numbers and dates. ``~`` looks for words: all of them must be in the text, in any order and case. In
    a list, one element must match. Accents may be composed or not. A key alone holds where it has a value that is not
    empty. Any key that is not a field of the payload is a column of ``metadata.jsonl``: ``author`` means
    ``metadata.author`` too. A date is in UTC unless it names another zone; ``mtime=2026-01-31`` is that whole day, and
    so is ``taken=2026-01-31`` of a column.

    :raises UsageError: If a text is not a filter; the message says how to write one.
    """
    return all_of(parse_filter(text) for text in texts)


def parse_filter(text: str) -> Condition:
    """Return the condition that one filter states.

    :raises UsageError: If the text is not a filter.
    """
    try:
        return _parse(storable(text))
    except UsageError as error:
        raise UsageError(f"{text!a} is not a filter: {error}") from None


def _parse(text: str) -> Condition:
    if presence := _PRESENCE.fullmatch(text):
        key = presence["key"]
        if mistyped := _MISTYPED.fullmatch(key):
            raise UsageError(f'did you mean {mistyped[1]}={mistyped[2]}? Put a key of this name in quotes: "{key}"')
        exists = conditions.on_paths(key, conditions.Exists)
        return Not(exists) if presence["absent"] else exists
    parts = _COMPARISON.fullmatch(text)
    if parts is None:
        raise UsageError(FORMS)
    key, operator = parts["key"], SIGNS.get(parts["operator"], parts["operator"])
    condition = _compare(key, operator.removeprefix("!"), split_choices(parts["value"]))
    return Not(condition) if operator.startswith("!") else condition


def _compare(key: str, operator: str, choices: Sequence[str]) -> Condition:
    if operator == "~":
        return any_of(conditions.has_words(key, unquote(choice)) for choice in choices)
    type_ = conditions.field_type(key)
    values = [read_values(choice, type_) for choice in choices]
    if operator in BOUNDS:
        # Of a column, 2026 may be a number or a year.
        limits = [limit for value in values for limit in (value if is_year(value[0]) else value[:1])]
        return any_of(conditions.compare(key, BOUNDS[operator], limit) for limit in limits)
    equal = conditions.one_of(key, [value for alternatives in values for value in alternatives])
    periods = [conditions.in_period(key, choice) for choice in choices if type_ is None and is_date(choice)]
    return conditions.TextOrPeriod((equal, *periods)) if periods else equal


def is_date(choice: str) -> bool:
    """Return whether a value without quotes is a date of a column; a year is a number, as few columns have times."""
    try:
        return "-" in choice and conditions.parse_period(choice) is not None
    except UsageError:
        return False


def is_year(value: Scalar) -> bool:
    """Return whether a number may be a year."""
    return type(value) is int and 1000 <= value <= 9999


def split_choices(value: str) -> list[str]:
    """Return the values between the bars of ``ONE|OTHER``.

    :raises UsageError: If one is missing or begins like an operator.
    """
    choices = []
    for choice, bar in _CHOICE.findall(value):
        if not choice:
            raise UsageError(f'a value is missing; {FORMS}, and "" for an empty text')
        if choice[0] in "=<>~":
            raise UsageError(f'{FORMS}; put a value that begins with {choice[0]} in quotes: "{choice}"')
        if choice[0] not in QUOTES and _SECOND.search(choice):
            raise UsageError(
                f'each filter is one condition, and all must hold; give several, or put the value in quotes: "{choice}"'
            )
        choices.append(choice)
        if not bar:
            break
    return choices


def unquote(choice: str) -> str:
    """Return a value without its quotes, if it has any; only in double quotes is a backslash special.

    :raises UsageError: If a quote is missing.
    """
    if QUOTES.get(choice[0]) == choice[-1] and len(choice) > 1 and choice[0] != '"':
        return choice[1:-1]
    if not choice.startswith('"'):
        return choice
    try:
        return json.loads(choice)
    except ValueError as error:
        raise UsageError(f"{choice!a} is not a text in double quotes ({error})") from error


def read_values(choice: str, type_: str | None) -> list[Scalar]:
    """Return what a written value may stand for: what its field holds or, for a column, a number or boolean or text.

    :param type_: The type of the field, None for a column.
    :raises UsageError: If a quote is missing.
    """
    text = unquote(choice)
    if text != choice or type_ == TEXT or (type_ == TIME and re.fullmatch(r"\d{4}", choice)):
        return [text]
    number = json.loads(text) if _NUMBER.fullmatch(text) else None
    number = number if number is not None and conditions.is_storable(number) else None
    if type_ is not None:
        return [text if number is None else number]
    typed = {"true": True, "false": False}.get(text, number)
    return [text] if typed is None else [typed, text]
