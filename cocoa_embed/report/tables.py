"""Tables of results as Markdown, as a self-contained HTML page, and for a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text

from cocoa_embed.report.html import render

_MARKDOWN = re.compile(r"[\\`*~\[\]|]|\b_|_\b")


class Score(NamedTuple):
    """A cell with a number.

    :param text: The number as readers see it.
    :param value: The value that decides which score of a column is the best, set in bold; negate it if lower is better.
        None, for chance and the like, is not compared.
    :param detail: Text next to the number, such as its interval.
    """

    text: str
    value: float | None = None
    detail: str = ""


class Cell(NamedTuple):
    """A cell as it is drawn."""

    text: str
    detail: str
    is_best: bool
    is_number: bool


@dataclass(frozen=True)
class Table:
    """A table for readers; the best score of each column is set in bold.

    :param header: The names of the columns; the first column names the row.
    :param rows: The rows, each with as many cells as the header.
    :param notes: Sentences below the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Score]]
    notes: Sequence[str] = ()

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows as drawn. Scores with the same text are equally good; a single score is not set in bold."""
        best = [_best([cell for cell in column if isinstance(cell, Score)]) for column in zip(*self.rows, strict=True)]
        return [
            [
                Cell(cell.text, cell.detail, cell.value is not None and cell.text == text, is_number=True)
                if isinstance(cell, Score)
                else Cell(cell, "", is_best=False, is_number=False)
                for cell, text in zip(row, best, strict=True)
            ]
            for row in self.rows
        ]


def _best(scores: Sequence[Score]) -> str | None:
    compared = [(score.value, score.text) for score in scores if score.value is not None]
    return max(compared)[1] if len(compared) > 1 else None


def to_markdown(title: str, tables: Sequence[Table]) -> str:
    """Return the tables as GitHub's Markdown."""
    return "\n\n".join([f"# {_escape(title)}", *(_markdown_table(table) for table in tables)]) + "\n"


def _markdown_table(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    rows = [[_markdown_cell(cell) for cell in row] for row in table.cells]
    lines = [f"| {' | '.join(row)} |" for row in ([_escape(name) for name in table.header], rule, *rows)]
    return "\n\n".join([f"## {_escape(table.title)}", "\n".join(lines), *map(_escape, table.notes)])


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_escape(cell.text)}**" if cell.is_best else _escape(cell.text)
    return f"{text} ({_escape(cell.detail)})" if cell.detail else text


def _escape(text: str) -> str:
    """Return a text escaped so that Markdown shows it literally."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(lambda found: "\\" + found[0], plain)


def to_html(title: str, tables: Sequence[Table]) -> str:
    """Return the tables as a page that fits a phone and needs no network.

    :raises MissingExtraError: If Jinja2 is not installed.
    """
    return render(Path(__file__).with_name("tables.html.jinja"), "eval", title=title, tables=tables)


def to_terminal(table: Table) -> TerminalTable:
    """Return the table for a rich console, without its notes; details are below their numbers."""
    drawn = TerminalTable(title=Text(table.title), title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for name, cell in zip(table.header, table.cells[0], strict=True):
        drawn.add_column(
            Text(name), justify="right" if cell.is_number else "left", no_wrap=cell.is_number, overflow="fold"
        )
    for row in table.cells:
        drawn.add_row(*map(_terminal_cell, row))
    return drawn


def _terminal_cell(cell: Cell) -> Text:
    number = Text(cell.text, style="bold" if cell.is_best else "")
    return number.append(f"\n{cell.detail}", style="not bold") if cell.detail else number
