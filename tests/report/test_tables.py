"""Tables as readers see them: the same cells in Markdown, HTML and a terminal, and the best of each column in bold."""

import pytest
from browser import HtmlElements
from rich.console import Console

from cocoa_embed.report.tables import Score, Table, to_html, to_markdown, to_terminal

HOSTILE = "<script>alert('x')</script> a|b & \"c\" *d* _e_ [f](g)\nh"


def cells_of(page: HtmlElements) -> list[list[str]]:
    """Return the cells of a page's only table; the detail of a number in parentheses."""
    rows: list[list[str]] = []
    for each in page.all:
        if each.tag == "tr":
            rows.append([])
        elif each.tag in ("th", "td"):
            rows[-1].append(each.text)
        elif each.tag == "small":
            rows[-1][-1] = rows[-1][-1].removesuffix(each.text) + f" ({each.text})"
    return rows


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


def test_html_markdown_and_terminal_show_the_same_cells_and_the_best_of_each_column_in_bold(scores: Table) -> None:
    """Scores that read the same are equally good; chance and incomplete scores are not compared."""
    page = HtmlElements(to_html("Results", [scores]))
    assert cells_of(page) == EXPECTED
    assert [each.text for each in page.find("strong")] == ["0.50", "0.50", "0.42"]
    text = to_markdown("Results", [scores])
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    shown = [[cell.replace("**", "").replace("\\", "") for cell in row] for row in (lines[0], *lines[2:])]
    assert shown == EXPECTED
    assert "| theirs | **0.50** (0.3–0.7) | **0.42** |" in text
    console = Console(width=60, record=True, force_terminal=True)
    console.print(to_terminal(scores))
    assert console.export_text(styles=True, clear=False).count("\x1b[1m   0.50\x1b[0m") == 2
    words = [line.split() for line in console.export_text().splitlines() if "0." in line]
    assert words[:2] == [["ours", "0.50", "0.31"], ["0.4–0.6"]]
    single = Table("Scores", ["model", "score"], [["ours", Score("0.31", 0.31)], ["chance", Score("0.02")]])
    assert not single.cells[0][1].is_best, "there is nothing to compare it with"


def test_texts_are_escaped(scores: Table) -> None:
    table = Table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, "1"], ["c", ""]], [HOSTILE])
    page = HtmlElements(to_html(HOSTILE, [table]))
    shown = " ".join(HOSTILE.split())
    assert cells_of(page) == [[shown, "b"], [shown, "1"], ["c", ""]]
    assert not page.find("script")
    assert page.loaded() == []
    text = to_markdown(HOSTILE, [table])
    assert "<script" not in text
    assert "[f](g)" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.replace("\\|", "").count("|") for line in rows] == [3] * 4
