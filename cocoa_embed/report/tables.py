"""Tables of results, and how they are written: as Markdown, and as one HTML page that needs no other file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cocoa_embed.errors import require

_TEMPLATE = Path(__file__).with_name("tables.html.jinja")
_MARKDOWN = re.compile(r"[\\`*~\[\]|]|\b_|_\b")


class Cell(NamedTuple):
    """A cell as it is drawn."""

    text: str
    detail: str
    is_best: bool
    is_number: bool


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

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows as they are drawn."""
        return [
            [Cell(text, "", number in self.own, place > 0) for place, text in enumerate(row)]
            for number, row in enumerate(self.rows)
        ]


def to_markdown(title: str, tables: Sequence[Table]) -> str:
    """Return the tables as GitHub's Markdown."""
    return "\n\n".join([f"# {_escape(title)}", *(_markdown_table(table) for table in tables)]) + "\n"


def _markdown_table(table: Table) -> str:
    rows = [[_escape(cell) for cell in row] for row in table.rows]
    for number in table.own:
        rows[number] = [f"**{cell}**" if cell else "" for cell in rows[number]]
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in ([_escape(name) for name in table.header], rule, *rows)]
    return "\n\n".join([f"## {_escape(table.title)}", "\n".join(lines), *map(_escape, table.notes)])


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
