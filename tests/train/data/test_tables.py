from html.parser import HTMLParser
from typing import Any

import pytest

from cocoa_embed.data.mmeb import PUBLISHED, SUBSETS
from cocoa_embed.evaluation.mmeb import summary
from cocoa_embed.evaluation.mmeb_tables import mmeb_tables
from cocoa_embed.evaluation.pairs import METRICS
from cocoa_embed.evaluation.pairs_tables import pairs_tables
from cocoa_embed.report.tables import Table, to_html, to_markdown

VOID = {"meta", "br", "link", "img"}
HOSTILE = "<script>alert('x')</script> a|b & \"c\" *d* _e_ [f](g)\nh"


class Page(HTMLParser):
    """Reads a page: its cells by table, and whether every element is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.addresses: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.own: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            if ("class", "own") in attributes:
                self.own.append(self.tables[-1][-1])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def result(precision: float, **changed: Any) -> dict[str, Any]:
    names = ("precision@1", "hit@1", "hit@5", "hit@10", "mrr", "ndcg@5", "ndcg@10")
    return {
        "metrics": dict.fromkeys(names, precision), "rows": 1000, "rows_in_data": 1000, "rows_without_image": 0,
        "rows_merged": 0, "tied_rows": 0, "partial": False, "queries": 1000, "targets": 5000, "seconds": 1.5, **changed,
    }  # fmt: skip


@pytest.fixture
def partly_run() -> dict[str, Any]:
    results = {
        "ImageNet-1K": result(0.5),
        "N24News": result(0.7, rows=90, partial=True, rows_without_image=10, tied_rows=3),
        "MSCOCO": result(0.9, rows=20, rows_in_data=20, rows_merged=4),
    }
    return summary("my model", "f0", results, dict.fromkeys(SUBSETS.keys() - results.keys(), "not in the data"))


def cells(page: str) -> dict[str, list[str]]:
    """Return the cells of all tables of a page by their rows' first."""
    return {row[0]: row[1:] for table in Page(page).tables for row in table}


def test_a_partial_run_is_marked_as_such_beside_the_published_numbers(partly_run: dict[str, Any]) -> None:
    page = to_html("MMEB-V1", mmeb_tables(partly_run))
    rows = cells(page)
    assert rows["my model"] == [
        "60.0* (2/10)", "not run", "not run", "90.0* (1/4)", "70.0* (3/20)", "not run", "70.0* (3/36)"
    ]  # fmt: skip
    assert rows["CoCoA (Qwen2-VL-2B)"] == ["63.0", "57.4", "69.6", "85.8", "70.2", "60.7", "66.0"]
    assert rows["GME (Qwen2-VL-2B)"] == ["56.9", "41.2", "67.8", "53.4", "–", "–", "55.8"]
    assert "* incomplete" in page
    assert "1 of the subsets that were run do not have the 1000 rows of the public data" in page
    assert rows["ImageNet-1K"] == ["classification", "IND", *["50.0"] * 5, "1000", ""]
    assert rows["N24News"][-1] == "partial: 90 of 1000 rows; 10 rows without their images left out; 3 ties"
    assert rows["MSCOCO"][-1] == "the public data have 1000 rows; 4 rows list a target twice"
    assert rows["GQA"] == ["VQA", "OOD", *["–"] * 6, "not run: not in the data"]
    assert SUBSETS.keys() <= rows.keys()


def test_a_whole_run_has_no_marks() -> None:
    document = summary("m", "f0", {name: result(0.25) for name in SUBSETS}, {})
    assert document["averages"] == dict.fromkeys(document["averages"], 0.25)
    assert all(each["complete"] for each in document["coverage"].values())
    page = to_html("MMEB-V1", mmeb_tables(document))
    assert cells(page)["m"] == ["25.0"] * 7
    assert "incomplete" not in page
    assert "public data" not in page
    assert "not run" not in page


def test_averages_are_means_over_subsets_of_their_kind() -> None:
    scores = {name: number / 100 for number, name in enumerate(SUBSETS)}
    averages = summary("m", "f0", {name: result(score) for name, score in scores.items()}, {})["averages"]
    assert averages["overall"] == pytest.approx(sum(range(36)) / 3600)
    assert averages["classification"] == pytest.approx(0.045)
    assert averages["grounding"] == pytest.approx(0.335)
    assert averages["IND"] * 20 + averages["OOD"] * 16 == pytest.approx(36 * averages["overall"])


def test_the_page_needs_nothing_else_and_no_text_is_taken_for_html() -> None:
    page = to_html(HOSTILE, [Table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, "1"], ["c", "2"]], own=[1], notes=[HOSTILE])])
    parsed = Page(page)
    assert parsed.addresses == []
    assert "script" not in parsed.seen
    assert {"html", "head", "body", "table", "thead", "tbody", "title"} <= parsed.seen
    assert "http" not in page
    assert 'name="viewport"' in page
    assert parsed.tables == [[[HOSTILE, "b"], [HOSTILE, "1"], ["c", "2"]]]
    assert parsed.own == [["c", "2"]]


def test_markdown_keeps_its_columns_and_shows_texts_as_they_are() -> None:
    text = to_markdown(HOSTILE, [Table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, "1"], ["c", ""]], own=[1], notes=[HOSTILE])])
    assert "<script" not in text
    assert "[f](g)" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.replace("\\|", "").count("|") for line in rows] == [3] * 4
    assert rows[1] == "| --- | ---: |"
    assert rows[3] == "| **c** |  |"
    assert text.splitlines()[0].startswith("# &lt;script&gt;")
    assert text.endswith("h\n")


def test_markdown_and_html_hold_the_same_cells(partly_run: dict[str, Any]) -> None:
    tables = mmeb_tables(partly_run)
    text = to_markdown("MMEB-V1", tables)
    assert text.count("\n| ") == sum(len(table.rows) + 2 for table in tables)
    assert "| **my model** | **60.0\\* (2/10)** | **not run** |" in text
    assert f"| {PUBLISHED[-1].model} | 64.7 | 66.5 | 72.5 | 90.1 | 75.7 | 64.3 | 70.6 |" in text


@pytest.mark.parametrize("compared", [False, True])
def test_pairs_are_told_with_intervals_and_differences(compared: bool) -> None:
    scores = {
        "model": "mine",
        "subsets": {"text_to_image": dict.fromkeys(METRICS, 0.5)},
        "intervals": {"text_to_image": dict.fromkeys(METRICS, (0.4, 0.61))},
    }
    settings = {"level": 0.95, "resamples": 5000, "seed": 7}
    counts = {"text_to_image": {"queries": 40, "documents": 20, "groups": 19}}
    document: dict[str, Any] = {**scores, **settings, "counts": counts}
    if compared:
        difference = {"difference": -0.25, "low": -0.3, "high": 0.01, "p": 0.0312}
        document |= {"other": {**scores, "model": "theirs"}}
        document["comparison"] = {"text_to_image": {"mrr": difference}}
    page = to_html("pairs", pairs_tables(document))
    rows = cells(page)
    assert rows["mine"] == ["0.500 (0.400–0.610)"] * len(METRICS)
    assert "40 queries in 19 groups, 20 documents" in page
    assert ("theirs" in rows) == compared
    if compared:
        assert rows["mrr"] == ["-0.250", "-0.300 to +0.010", "0.0312"]
        assert "mine less theirs" in page
