"""The page of a run is one safe, complete file."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import needs_chromium, requested, seen
from run_records import MASK, PICTURE, pairs_document, run_record, stage, tokens

from cocoa_embed.report.content import RunPage, Search, SearchHit
from cocoa_embed.report.page import SHOWN_TOKENS, render_page
from cocoa_embed.report.run_page import EvalResult, run_page
from cocoa_embed.report.tables import Table

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

HOSTILE = "<script>alert('caption')</script>"
SECTIONS = [
    *("evaluations", "searches", "curves", "patches", "bridge", "plateau", "words", "measures"),
    *("recipe", "data", "notes", "run"),
]
VOID = {"meta", "img", "br", "hr", "input", "link", "wbr"}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), the text inside each, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(page)
        self.close()
        self.unclosed = [self.elements[index][0] for index in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        opened = self.elements[self._open.pop()][0]
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def find(self, tag: str, css_class: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        """Return (attributes, text) of the elements ``tag`` that have ``css_class``."""
        return [
            (attributes, " ".join("".join(text).split()))
            for name, attributes, text in self.elements
            if name == tag and (css_class is None or css_class in (attributes.get("class") or "").split())
        ]

    @property
    def sections(self) -> list[str]:
        return [str(attributes["id"]) for attributes, _ in self.find("section")]


def search(*correct: bool, text: str = "the right one") -> Search:
    hits = [SearchHit(PICTURE, 0.91 - 0.49 * place, text, is_right) for place, is_right in enumerate(correct)]
    return Search("text → image", text, None, hits, text)


def result(table: Table | None = None, **changes: Any) -> EvalResult:
    tables = [table or Table("Text to image", ["model", "mrr"], [["ours", "0.5"], ["theirs", "0.4"]], notes=["Of 3."])]
    return EvalResult(pairs_document(**changes), tables, "runs/small/pairs.json", is_own=True)


def page_of(record: dict[str, Any] | None = None, **changes: Any) -> str:
    given: dict[str, Any] = {
        "results": [result()],
        "searches": [search(False, True)],
        "notes": ["One seed."],
        "compared": {"contrastive only": {"stages": {"contrastive": stage("loss")}}},
        **changes,
    }
    return render_page(run_page(record or run_record(), "runs/small", **given))


@pytest.fixture(scope="module")
def full() -> str:
    return page_of()


def test_the_page_is_well_formed_and_has_every_section(full: str) -> None:
    page = Page(full)
    assert page.unclosed == []
    assert page.sections == SECTIONS
    assert [attributes["href"] for attributes, _ in page.find("a")] == [f"#{section}" for section in SECTIONS]
    identifiers = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert all(attributes["alt"] for attributes, _ in page.find("img"))
    assert (len(page.find("h1")), len(page.find("h2"))) == (1, len(SECTIONS))
    assert json.loads(page.find("pre")[0][1]) == run_record()["given"], "the recipe as a file"


def test_the_page_loads_nothing(full: str) -> None:
    assert set(re.findall(r"https?://[^\s\"'<>)]*", full)) <= {"http://www.w3.org/2000/svg"}
    page = Page(full)
    references = [
        str(value)
        for _, attributes, _ in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data")
    ]
    assert PICTURE in references
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in references)
    assert not page.find("script")
    assert not page.find("link")
    assert "@import" not in full
    assert "anywhere" not in full, "words would break in the middle on a phone"
    targets = set(re.findall(r'(?:url\(|href=")#([^")]*)', full))
    assert any(target.startswith("stage-0-") for target in targets), "of a chart"
    assert targets <= set(re.findall(r'\bid="([^"]*)"', full))


def hostile(value: Any) -> Any:  # noqa: ANN401  JSON of any kind
    """Return a record with every text replaced but pictures."""
    if isinstance(value, dict):
        return {key: hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return list(map(hostile, value))
    return HOSTILE if isinstance(value, str) and value != PICTURE else value


def test_hostile_texts_are_escaped_wherever_they_stand() -> None:
    record, stage_name = hostile(run_record()), f"{HOSTILE} loss"
    record["stages"][stage_name] = stage(f"{HOSTILE} $x loss", bad_rows={"count": 1, "first": [[HOSTILE] * 3]})
    record["recipe"][stage_name] = {HOSTILE: HOSTILE}
    record["stages"]["bridge"]["samples"]["mask"] = {**MASK, "labels": ["<script>"] * 5}
    record["stages"]["contrastive"] |= {"finished": False, "samples": {"failure": HOSTILE}}
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE], [HOSTILE]], notes=[HOSTILE])
    searches = [search(False, text=HOSTILE)._replace(title=HOSTILE, expected=f"{HOSTILE}!")]
    results = [result(table, model=HOSTILE)]
    text = render_page(run_page(record, HOSTILE, results, searches=searches, notes=[HOSTILE], command=HOSTILE))
    assert text.count("&lt;script&gt;") > 45
    assert "<script" not in text
    assert Page(text).unclosed == []


def test_sections_without_content_are_left_out() -> None:
    record = run_record()
    record["stages"]["warmup"]["samples"]["patches"] = []
    del record["stages"]["bridge"]["samples"]["mask"]
    assert set(SECTIONS) - set(Page(page_of(record, results=[])).sections) == {"patches", "bridge", "evaluations"}
    only_matching = run_record(stages={"contrastive": stage("loss", "accuracy_matching_image")})
    sections = Page(page_of(only_matching, searches=(), notes=())).sections
    assert sections == ["evaluations", "curves", "recipe", "data", "run"]
    assert Page(render_page(RunPage("Nothing", "yet"))).sections == []


def test_the_right_hit_is_marked_and_a_search_without_one_says_so(full: str) -> None:
    hits = Page(full).find("li", "hit")
    assert [("correct" in str(attributes["class"]).split()) for attributes, _ in hits] == [False, True]
    assert [re.findall(r"right answer|0\.910|0\.420", text) for _, text in hits] == [
        ["0.910"],
        ["right answer", "0.420"],
    ]
    words = "The right answer is not among these."
    assert words not in full
    assert words in page_of(searches=[search(False)])


def test_masked_tokens_show_prediction_and_truth(full: str) -> None:
    chips = [text for attributes, text in Page(full).find("span", "chip")]
    assert {"one", "two (predicted, correct)", "ten (predicted, wrong; truth:)six"} <= set(chips)
    assert "1 of 2 masked tokens correct" in full


def test_the_mask_says_what_leaks_and_what_is_causal(full: str) -> None:
    def with_mask(allowed: list[str]) -> str:
        record = run_record()
        record["stages"]["bridge"]["samples"]["mask"] = {**MASK, "allowed": allowed}
        return page_of(record)

    leak = with_mask(["11101", *MASK["allowed"][1:]])
    causal = with_mask(["10000", "11000", "11100", "00110", "00111"])
    blind = with_mask(["11100", "11100", "11100", "00111", "00111"])
    sayings = ("which the bridge must not allow", "was left causal", "itself does not look at B")
    found = [[saying in " ".join(page.split()) for saying in sayings] for page in (full, leak, causal)]
    assert found == [[False] * 3, [True, False, False], [False, True, False]]
    assert "<code>&lt;EOS&gt;</code> itself does not look at B" in blind


def test_a_run_on_text_alone_is_not_said_to_have_images(full: str) -> None:
    record = run_record()
    del record["stages"]["warmup"]
    record["stages"]["bridge"]["samples"]["tokens"] = [tokens(image=None)]
    page = page_of(record, searches=())
    for saying in ("Block A holds the image", "The image that the words describe"):
        assert saying in full
        assert saying not in page


def test_long_texts_and_sequences_are_cut() -> None:
    long, many = "word " * 10_000, ["word"] * 10_000
    record = run_record()
    record["stages"]["bridge"]["samples"]["tokens"] = [tokens(tokens=many, masked=[False] * 10_000, predicted=many)]
    page = page_of(record, searches=[search(False, text=long)])
    assert page.count("word") < 2 * SHOWN_TOKENS
    assert f"… {10_000 - SHOWN_TOKENS:,} more" in page


def test_names_that_are_no_unicode_do_not_stop_the_page() -> None:
    assert "caf\\udce9" in page_of(notes=["caf\udce9"])


@needs_chromium
def test_a_browser_shows_the_page_whole_at_the_width_of_a_phone_and_of_a_laptop(full: str, tmp_path: Path) -> None:
    long = "x" * 400
    record = run_record()
    record["stages"]["bridge"]["samples"]["tokens"] = [tokens(tokens=[long] * 3)]
    record["stages"]["warmup"]["samples"]["patches"][0]["caption"] = long
    record["stages"]["contrastive"] |= {"finished": False, "sources": {"data": {"file": long}}}
    record["recipe"]["warmup"]["key_with_a_very_long_name_indeed"] = long
    table = Table(long, ("metric", *["text to image"] * 9), [(long, *["0.500 (0.400–0.600)"] * 9)], notes=[long])
    wide = page_of(record, results=[result(table, model=long)], searches=[search(True, text=long)], notes=[long])
    shown = {
        f"{name}-{width}": (width, page) for name, page in (("full", full), ("long", wide)) for width in (390, 1100)
    }
    for name, view in seen(shown, tmp_path).items():
        assert view["width"] <= shown[name][0], name
        assert view["sections"] == SECTIONS, name
        assert view["decoded"] == view["images"] > 0, name
    (tmp_path / "page.html").write_text(wide, encoding="utf-8")
    assert requested(tmp_path / "page.html", tmp_path) == set()
