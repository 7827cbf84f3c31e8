"""The page of a run is one safe, complete file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import HtmlElements, needs_chromium, seen
from run_records import MASK, PICTURE, pairs_document, run_record, stage, tokens

from cocoa_embed.report.content import EvalResult, Search, SearchHit
from cocoa_embed.report.page import SHOWN_TOKENS, render_page
from cocoa_embed.report.tables import Table

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

HOSTILE = "<script>alert('caption')</script>"
SECTIONS = "evaluations searches curves patches bridge plateau words measures recipe data notes run".split()


def search(*correct: bool, text: str = "the right one", title: str = "text → image") -> Search:
    hits = [SearchHit(PICTURE, 0.91 - 0.49 * place, text, is_right) for place, is_right in enumerate(correct)]
    return Search(title, text, None, hits, text)


def result(table: Table | None = None, **changes: Any) -> EvalResult:
    tables = [table or Table("Text to image", ["model", "mrr"], [["ours", "0.5"], ["theirs", "0.4"]], notes=["Of 3."])]
    return EvalResult(pairs_document(**changes), tables, "runs/small/pairs.json", is_own=True)


def page_of(record: dict[str, Any] | None = None, **changes: Any) -> str:
    given: dict[str, Any] = {
        "results": [result()],
        "searches": [search(False, True)],
        "notes": ["One seed."],
        **changes,
    }
    return render_page(record or run_record(), "runs/small", **given)


def without_charts(**samples: Any) -> dict[str, Any]:
    """Return a record without logs, which is quick to render; ``samples`` change those of the bridge."""
    record = run_record()
    for each in record["stages"].values():
        each["log"] = []
    record["stages"]["bridge"]["samples"] |= samples
    return record


@pytest.fixture(scope="module")
def full() -> str:
    return page_of()


def test_the_page_is_well_formed_and_has_every_section(full: str) -> None:
    page = HtmlElements(full)
    assert [each.attributes["id"] for each in page.find("section")] == SECTIONS
    assert [each.attributes["href"] for each in page.find("a")] == [f"#{section}" for section in SECTIONS]
    identifiers = [each.attributes["id"] for each in page.all if "id" in each.attributes]
    assert len(identifiers) == len(set(identifiers))
    assert all(each.attributes["alt"] for each in page.find("img"))
    assert (len(page.find("h1")), len(page.find("h2"))) == (1, len(SECTIONS))
    assert json.loads(page.find("pre")[0].text) == run_record()["given"], "the recipe as a file"
    hits = [(each.attributes["class"], "right answer" in each.text) for each in page.find("li", "hit")]
    assert hits == [("hit", False), ("hit correct", True)]
    assert [each.text[:8] for each in page.find("span", "score")] == ["1.0.910", "2. ✓ rig"]
    chips = [each.text for each in page.find("span", "chip")]
    assert {"one", "two (predicted, correct)", "ten (predicted, wrong; truth:)six"} <= set(chips)
    assert "1 of 2 masked tokens correct" in full


def test_the_page_loads_nothing(full: str) -> None:
    assert set(re.findall(r"https?://[^\s\"'<>)]*", full)) <= {"http://www.w3.org/2000/svg"}
    page = HtmlElements(full)
    assert PICTURE in page.loaded()
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.loaded())
    assert not page.find("script")
    assert "@import" not in full
    targets = set(re.findall(r'(?:url\(|href=")#([^")]*)', full))
    assert any(target.startswith("stage-0-") for target in targets), "of a chart"
    assert targets <= set(re.findall(r'\bid="([^"]*)"', full))


def test_hostile_texts_are_escaped_everywhere() -> None:
    def hostile(value: Any) -> Any:  # noqa: ANN401  JSON of any kind
        """Return a record with every text replaced but pictures."""
        if isinstance(value, dict):
            return {key: hostile(each) for key, each in value.items()}
        if isinstance(value, list):
            return list(map(hostile, value))
        return HOSTILE if isinstance(value, str) and value != PICTURE else value

    record, stage_name = hostile(run_record()), f"{HOSTILE} loss"
    record["stages"][stage_name] = stage(f"{HOSTILE} $x loss", bad_rows={"count": 1, "first": [[HOSTILE] * 3]})
    record["recipe"][stage_name] = {HOSTILE: HOSTILE}
    record["stages"]["bridge"]["samples"]["mask"] = {**MASK, "labels": ["<script>"] * 5}
    record["stages"]["contrastive"] |= {"finished": False, "samples": {"failure": HOSTILE}}
    results = [result(Table(HOSTILE, [HOSTILE], [[HOSTILE], [HOSTILE]], notes=[HOSTILE]), model=HOSTILE)]
    searches = [search(False, text=HOSTILE, title=HOSTILE)._replace(expected=f"{HOSTILE}!")]
    text = render_page(record, HOSTILE, results, searches=searches, notes=[HOSTILE])
    assert text.count("&lt;script&gt;") > 45
    assert "<script" not in text
    assert HtmlElements(text).find("h1")


def test_empty_sections_are_left_out_and_searches_without_a_right_hit_say_so(full: str) -> None:
    record = without_charts(tokens=[])
    record["stages"]["warmup"]["samples"]["patches"] = []
    for key in ("samples", "held_out"):  # a stage that has not begun has neither
        del record["stages"]["contrastive"][key]
    text = page_of(record, results=[], searches=[search(False)], notes=())
    sections = [each.attributes["id"] for each in HtmlElements(text).find("section")]
    assert sections == ["searches", "words", "recipe", "data", "run"]
    words = "The right answer is not among these."
    assert words in text
    assert words not in full


def test_the_text_beside_the_mask_names_leaks_and_variants(full: str) -> None:
    for rows, words in (
        (["11101", *MASK["allowed"][1:]], "which the bridge must not allow"),
        (["11100", "11100", "11100", "00111", "00111"], "<code>&lt;EOS&gt;</code> itself does not attend to B"),
    ):
        assert words not in full
        assert words in " ".join(page_of(without_charts(mask={**MASK, "allowed": rows})).split())


def test_the_data_show_held_out_and_skipped_rows_and_long_texts_are_cut(full: str) -> None:
    many = ["word"] * 10_000
    record = without_charts(tokens=[tokens(tokens=many, masked=[False] * 10_000, predicted=many, image=None)])
    record["stages"]["warmup"] |= {"bad_rows": {"count": 40, "first": [["data", "row 1", "is broken"]]}}
    record["stages"]["warmup"]["samples"] = None
    text = page_of(record, searches=[search(False, text="word " * 10_000)], notes=["caf\udce9"])
    warmup, bridge, contrastive = (each.text for each in HtmlElements(text).find("div", "sources"))
    assert "warmup 1,200 rows 500 steps of 4 rows folder scenes fingerprint 0123456789ab" in warmup
    assert "40 rows skipped; bad_rows.jsonl lists all of them: row 1 (data): is broken" in warmup
    assert "2 of them held out, and all rows that show their images left out" in bridge
    assert "held out" not in contrastive
    assert text.count("word") < 2 * SHOWN_TOKENS
    assert f"… {10_000 - SHOWN_TOKENS:,} more" in text
    assert "caf\\udce9" in text, "names need not be Unicode"
    words = "Block A holds the image"
    assert (words in full, words in text) == (True, False), "a run on texts alone mentions no images"


@needs_chromium
def test_a_browser_shows_the_page_whole_on_a_phone_and_on_a_laptop(full: str, tmp_path: Path) -> None:
    long = "x" * 400
    record = run_record()
    record["stages"]["bridge"]["samples"]["tokens"] = [tokens(tokens=[long] * 3)]
    record["stages"]["warmup"]["samples"]["patches"][0]["caption"] = long
    record["stages"]["contrastive"] |= {"finished": False, "sources": {"data": {"file": long}}}
    record["recipe"]["warmup"]["key_with_a_very_long_name_indeed"] = long
    table = Table(long, ("metric", *["text to image"] * 9), [(long, *["0.500 (0.400–0.600)"] * 9)], notes=[long])
    wide = page_of(record, results=[result(table, model=long)], searches=[search(True, text=long)], notes=[long])
    pages = {"full": full, "long": wide}
    shown = {f"{name}-{width}": (width, page) for name, page in pages.items() for width in (390, 1100)}
    for name, view in seen(shown, tmp_path).items():
        assert view["width"] <= shown[name][0], name
        assert view["sections"] == SECTIONS, name
        assert view["decoded"] == view["images"] > 0, name
        assert view["broken"] == [] or name.startswith("long"), name
