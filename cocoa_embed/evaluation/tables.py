"""Tables of results, and how they are written: as Markdown, and as one HTML page that needs no other file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cocoa_embed.errors import require

_TEMPLATE = Path(__file__).with_name("tables.html.jinja")
_MARKDOWN = re.compile(r"[\\`*\[\]|]")


@dataclass(frozen=True)
class Table:
    """A table as people read it.

    :param header: The names of the columns; the first column names the row.
    :param rows: As many cells each as the header has.
    :param own: The rows that are put forward, by number.
    :param notes: Sentences below.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    own: Sequence[int] = ()
    notes: Sequence[str] = ()


def to_markdown(title: str, tables: Sequence[Table]) -> str:
    """Return the tables as GitHub's Markdown."""
    lines = [f"# {_escape(title)}"]
    for table in tables:
        cells = [table.header, *table.rows]
        bold = [f"**{_escape(cell)}**" if cell else "" for number in table.own for cell in table.rows[number]]
        written = [" | ".join(map(_escape, row)) for row in cells]
        for place, number in enumerate(table.own):
            width = len(table.header)
            written[number + 1] = " | ".join(bold[place * width : (place + 1) * width])
        rule = "|".join(["---", *["---:"] * (len(table.header) - 1)])
        lines += ["", f"## {_escape(table.title)}", "", f"| {written[0]} |", f"|{rule}|"]
        lines += [f"| {row} |" for row in written[1:]]
        lines += [line for note in table.notes for line in ("", _escape(note))]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(lambda found: "\\" + found[0], plain)


def to_html(title: str, tables: Sequence[Table]) -> str:
    """Return the tables as a page that can be read on a telephone and needs no network.

    :raises MissingExtraError: If Jinja2 is not installed.
    """
    environment = require("jinja2", "eval").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return str(template.render(title=title, tables=tables)) + "\n"
