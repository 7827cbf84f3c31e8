"""Tables as readers see them: the same cells in Markdown, HTML and a terminal, and the best of each column in bold."""

from html.parser import HTMLParser

import pytest
from rich.console import Console

from cocoa_embed.report.tables import Score, Table, to_html, to_markdown, to_terminal

VOID = {"meta", "br", "wbr", "link", "img"}
HOSTILE = "<script>alert('x')</script> a|b & \"c\" *d* _e_ [f](g)\nh"


class Page(HTMLParser):
    """Reads a page: its cells by table, those in bold, and whether every element is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.bold: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] = self.tables[-1][-1][-1].strip()

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += f" ({data})" if self.open[-1] == "small" else data
        if "strong" in self.open:
            self.bold.append(data)


@pytest.fixture
def scores() -> Table:
    rows = [
        ["ours", Score("0.50", 0.504, "0.4–0.6"), Score("0.31", 0.31)],
        ["theirs", Score("0.50", 0.496, "0.3–0.7"), Score("0.42", 0.42)],
        ["partial", Score("0.90*"), Score("–")],
        ["chance", Score("0.95"), Score("0.02")],
    ]
    return Table("Scores", ["model", "recall", "mrr"], rows, ["Of 12 queries."])


EXPECTED = [
    ["model", "recall", "mrr"],
    ["ours", "0.50 (0.4–0.6)", "0.31"],
    ["theirs", "0.50 (0.3–0.7)", "0.42"],
    ["partial", "0.90*", "–"],
    ["chance", "0.95", "0.02"],
]


def test_the_best_of_each_column_is_bold_and_nothing_that_is_not_compared(scores: Table) -> None:
    """Scores that read the same are equally good; chance and incomplete scores are not compared."""
    assert [[cell.is_best for cell in row] for row in scores.cells] == [
        [False, True, False],
        [False, True, True],
        [False] * 3,
        [False] * 3,
    ]
    alone = Table("One model", ["model", "mrr"], [["ours", Score("0.31", 0.31)], ["chance", Score("0.02")]])
    assert not any(cell.is_best for row in alone.cells for cell in row), "there is nothing to compare it with"


def test_where_lower_is_better_values_are_negated() -> None:
    losses = Table("Losses", ["model", "loss"], [["a", Score("2.0", -2.0)], ["b", Score("1.5", -1.5)]])
    assert [row[1].is_best for row in losses.cells] == [False, True]


def test_html_markdown_and_terminal_show_the_same_cells_in_bold(scores: Table) -> None:
    page = Page(to_html("Results", [scores]))
    assert page.tables == [EXPECTED]
    assert page.bold == ["0.50", "0.50", "0.42"]
    text = to_markdown("Results", [scores])
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert lines[1] == ["---", "---:", "---:"]
    shown = [[cell.replace("*", "").replace("\\", "") for cell in row] for row in (lines[0], *lines[2:4])]
    assert shown == EXPECTED[:3]
    assert "| theirs | **0.50** (0.3–0.7) | **0.42** |" in text
    assert "| partial | 0.90\\* | – |" in text
    assert text.endswith("Of 12 queries.\n")
    console = Console(width=60, record=True, force_terminal=True)
    console.print(to_terminal(scores))
    assert console.export_text(styles=True, clear=False).count("\x1b[1m   0.50\x1b[0m") == 2
    assert [line.split() for line in console.export_text().splitlines() if "0." in line][:2] == [
        ["ours", "0.50", "0.31"], ["0.4–0.6"]
    ]  # fmt: skip


def test_no_text_is_taken_for_markup(scores: Table) -> None:
    table = Table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, "1"], ["c", ""]], [HOSTILE])
    page = to_html(HOSTILE, [table])
    parsed = Page(page)
    assert parsed.tables == [[[HOSTILE, "b"], [HOSTILE, "1"], ["c", ""]]]
    assert "script" not in parsed.tags
    assert parsed.addresses == []
    assert "http" not in page
    text = to_markdown(HOSTILE, [table])
    assert "<script" not in text
    assert "[f](g)" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.replace("\\|", "").count("|") for line in rows] == [3] * 4
