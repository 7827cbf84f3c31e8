"""All pages have one look, and a table that is wider than its page scrolls under its first column."""

from pathlib import Path

import pytest
from browser import Browser, needs_chromium
from run_records import run_record

from cocoa_embed.report.html import STYLES
from cocoa_embed.report.page import render_page
from cocoa_embed.report.tables import Score, Table, to_html

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

WIDE = Table("Scores", ["model", *(f"metric {n}" for n in range(12))], [["ours", *[Score("0.123", 0.123)] * 12]] * 2)


def test_every_page_has_the_stylesheet_of_the_search_page_and_forbids_what_it_does_not_need() -> None:
    style = (STYLES / "page.css").read_text(encoding="utf-8").strip()
    assert len(style) > 1000
    for page in (render_page(run_record(), "runs/small"), to_html("Results", [WIDE])):
        assert style in page
        assert "default-src 'none'" in page


@needs_chromium
def test_the_first_column_stays_in_sight_while_the_others_scroll(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(to_html("Results", [WIDE]), encoding="utf-8")
    left = "document.querySelector('tbody th').getBoundingClientRect().left"
    with Browser(tmp_path, width=390) as browser:
        browser.open((tmp_path / "page.html").as_uri())
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        before = browser.run(left)
        assert (
            browser.run("(each => (each.scrollLeft = 200, each.scrollLeft))(document.querySelector('.scroll'))") == 200
        )
        assert browser.run(left) == pytest.approx(before, abs=20)
