"""The demo's report is one safe, complete file, and says what its data say."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import needs_chromium, requested, seen
from PIL import Image

from cocoa_embed.report import figures, masks, series
from cocoa_embed.report.content import (
    BridgeMask,
    Curve,
    DataUsed,
    Evaluation,
    Gallery,
    Headline,
    Hit,
    PatchReconstruction,
    QueryResult,
    RecipeTable,
    RetrievalRow,
    RunReport,
    StageData,
    TokenReconstruction,
)
from cocoa_embed.report.page import render_report, token_text, write_report
from cocoa_embed.report.tables import Table

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

HOSTILE = "<script>alert('caption')</script>"
SECTIONS = (
    *("results", "evaluations", "searches", "curves", "patches", "bridge", "plateau", "words", "diagnostics"),
    *("galleries", "recipe", "data", "notes", "run"),
)
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


def image(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (56, 56), colour)


def curve(stage: str, *names: str) -> Curve:
    rise = [(step, 0.5 + step / 1000) for step in range(0, 500, 5)]
    return Curve(
        stage, {name: [(step, value / (index + 1)) for step, value in rise] for index, name in enumerate(names)}, 75
    )


def mask(length_a: int = 3, length_b: int = 4) -> BridgeMask:
    blocks = np.array(["A"] * length_a + ["EOS"] + ["B"] * length_b)
    allowed = (blocks[:, None] == blocks) | (blocks == "EOS")[:, None] | (blocks == "EOS")
    return BridgeMask(allowed, [f"t{index}" for index in range(len(blocks))], blocks.tolist())


@pytest.fixture
def report() -> RunReport:
    hits = [Hit(image("blue"), 0.91, "a wrong one", False), Hit(image(), 0.42, "the right one", True)]
    return RunReport(
        title="A demo",
        subtitle="of everything",
        facts=[("Seed", "17")],
        table=[
            RetrievalRow("all three stages", "text → image", 0.9, 0.95, 0.99, 0.93),
            RetrievalRow("contrastive only", "text → image", 0.8, 0.97, 0.99, 0.86),
            RetrievalRow("chance", "text → image", 0.01, 0.05, 0.1, float("nan")),
        ],
        curves=[
            curve("warm-up", "loss", "mntp_loss", "mae_loss"),
            curve("bridge", "loss", *series.PLATEAU, *series.GEOMETRY),
            curve("contrastive", "loss", "alignment"),
            curve("contrastive only", "loss"),
        ],
        patches=[PatchReconstruction(image(), image("gray"), image("blue"), "a red picture")],
        tokens=[
            TokenReconstruction(["one", "two", "six"], [False, True, True], ["one", "two", "ten"], "warm-up", image())
        ],
        bridge_mask=mask(),
        queries=[QueryResult("text → image", "the right one", None, hits, "the right one")],
        notes=["One seed."],
        alerts=["Not finished."],
        headlines=[Headline("Image to text", "12.5 %", "of right answers are first", "of 8")],
        evaluations=[
            Evaluation("Pairs", "Of a folder.", [Table("Scores", ["model", "mrr"], [["ours", "0.5"]], own=[0])])
        ],
        galleries=[
            Gallery(
                "The worst",
                "Far off.",
                [QueryResult("a", "b", None, [Hit(None, 0.3, "words", True, 7)], None, 7, -0.1)],
            )
        ],
        recipe=RecipeTable([("seed", "17")], ["bridge"], [("steps", ["9"])], [("weight_decay", ["0"])], "seed: 17"),
        data=DataUsed(
            [StageData("bridge", [("data", "folder scenes", 1200)], "0123456789abcdef")], 1, [("data", "x", "y")]
        ),
        sample_notes={"warm-up": "Trained on these."},
    )


def sections(page: Page) -> list[str]:
    return [str(attributes["id"]) for attributes, _ in page.find("section")]


def test_page_is_well_formed_and_has_every_section(report: RunReport) -> None:
    page = Page(render_report(report))
    assert page.unclosed == []
    assert sorted(sections(page)) == sorted(SECTIONS)
    links = [attributes["href"] for attributes, _ in page.find("a")]
    assert links == [f"#{section}" for section in sections(page)]
    identifiers = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert all(attributes["alt"] for attributes, _ in page.find("img"))
    assert len(page.find("h1")) == 1
    assert len(page.find("h2")) == len(SECTIONS)


def test_page_loads_nothing(report: RunReport) -> None:
    text = render_report(report)
    addresses = set(re.findall(r"https?://[^\s\"'<>)]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    page = Page(text)
    references = [
        str(value)
        for _, attributes, _ in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data")
    ]
    assert any(reference.startswith("data:image/png;base64,") for reference in references)
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in references)
    assert not page.find("script")
    assert not page.find("link")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_references_inside_charts_resolve(report: RunReport) -> None:
    text = render_report(report)
    identifiers = set(re.findall(r'\bid="([^"]*)"', text))
    targets = set(re.findall(r'(?:url\(|href=")#([^")]*)', text))
    assert any(target.startswith("stage-0-") for target in targets)
    assert targets <= identifiers


def test_hostile_texts_are_escaped_wherever_they_stand(report: RunReport) -> None:
    hit, query, tokens, bridge = report.queries[0].hits[0], report.queries[0], report.tokens[0], mask()
    hostile = RunReport(
        title=HOSTILE,
        subtitle=HOSTILE,
        facts=[(HOSTILE, HOSTILE)],
        table=[replace(report.table[0], name=HOSTILE, direction=HOSTILE)],
        curves=[Curve(HOSTILE, {HOSTILE: [(0, 1.0), (1, 2.0)], f"{HOSTILE} $x loss": [(0, 1.0)]}, 1)],
        patches=[replace(report.patches[0], caption=HOSTILE)],
        tokens=[replace(tokens, tokens=[HOSTILE] * 3, predicted=[HOSTILE, '"><img src=x>', HOSTILE], stage=HOSTILE)],
        bridge_mask=replace(bridge, labels=["<script>"] * len(bridge.labels)),
        queries=[
            replace(query, title=HOSTILE, text=HOSTILE, expected=HOSTILE + "!", hits=[replace(hit, caption=HOSTILE)])
        ],
        notes=[HOSTILE],
        alerts=[HOSTILE],
        headlines=[Headline(HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
        evaluations=[
            Evaluation(HOSTILE, HOSTILE, [Table(HOSTILE, [HOSTILE], [[HOSTILE], [HOSTILE]], notes=[HOSTILE])])
        ],
        galleries=[
            Gallery(HOSTILE, HOSTILE, [replace(query, text=HOSTILE, hits=[replace(hit, image=None, caption=HOSTILE)])])
        ],
        recipe=RecipeTable([(HOSTILE, HOSTILE)], [HOSTILE], [(HOSTILE, [HOSTILE])], [(HOSTILE, [HOSTILE])], HOSTILE),
        data=DataUsed([StageData(HOSTILE, [(HOSTILE, HOSTILE, 1)] * 2, HOSTILE)], 1, [(HOSTILE, HOSTILE, HOSTILE)]),
        sample_notes={HOSTILE: HOSTILE, "warm-up": HOSTILE},
        command=HOSTILE,
    )
    text = render_report(hostile)
    page = Page(text)
    assert text.count("&lt;script&gt;") > 45
    assert "<script" not in text
    assert not [attributes for attributes, _ in page.find("img") if attributes["src"] == "x"]
    assert page.find("h1")[0][1] == HOSTILE


def test_right_hit_is_marked_and_wrong_ones_are_not(report: RunReport) -> None:
    hits = Page(render_report(replace(report, galleries=[]))).find("li", "hit")
    assert [("correct" in str(attributes["class"]).split()) for attributes, _ in hits] == [False, True]
    assert "right answer" not in hits[0][1]
    assert "right answer" in hits[1][1]
    assert "0.910" in hits[0][1]
    assert "0.420" in hits[1][1]


def test_query_without_its_right_answer_says_so(report: RunReport) -> None:
    query = report.queries[0]
    missed = replace(report, queries=[replace(query, hits=query.hits[:1])])
    words = "The right answer is not among these."
    assert words not in render_report(report)
    assert words in render_report(missed)


def test_empty_sections_are_left_out(report: RunReport) -> None:
    full = Page(render_report(report))
    assert {"patches", "bridge"} <= set(sections(full))
    assert set(sections(Page(render_report(replace(report, patches=[]))))) == set(SECTIONS) - {"patches"}
    assert set(sections(Page(render_report(replace(report, bridge_mask=None))))) == set(SECTIONS) - {"bridge"}
    without_plateau = replace(report, curves=[curve("bridge", "loss", "accuracy_matching_image")])
    assert set(sections(Page(render_report(without_plateau)))) == set(SECTIONS) - {"plateau", "diagnostics"}
    for name in ("evaluations", "galleries", "recipe", "data"):
        without = replace(report, **{name: None if name in ("recipe", "data") else []})
        assert set(sections(Page(render_report(without)))) == set(SECTIONS) - {name}
    bare = Page(render_report(RunReport("Nothing", "yet")))
    assert sections(bare) == []
    assert bare.find("a") == []


def test_best_values_are_bold_whoever_has_them(report: RunReport) -> None:
    page = Page(render_report(report))
    table = next(text for attributes, text in page.find("table") if attributes["class"] == "results")
    assert "–" in table
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', render_report(report), flags=re.DOTALL)
    bold = {html.unescape(name): re.findall(r"<strong>(.*?)</strong>", cells) for name, cells in rows}
    assert bold["all three stages"] == ["90.0 %", "99.0 %", "0.930"]
    assert bold["contrastive only"] == ["97.0 %", "99.0 %"]
    assert bold["chance"] == []
    assert [text for _, text in page.find("span", "value")][:2] == ["90.0 %", "12.5 %"]


def test_best_values_are_chosen_within_a_direction(report: RunReport) -> None:
    other = [replace(row, direction="image → text", recall_at_1=row.recall_at_1 / 2) for row in report.table]
    mixed = [row for pair in zip(report.table, other, strict=True) for row in pair]
    text = render_report(replace(report, table=mixed))
    assert "<strong>90.0 %</strong>" in text
    assert "<strong>45.0 %</strong>" in text
    assert text.count('scope="rowgroup"') == 2


def test_hidden_words_show_prediction_and_truth(report: RunReport) -> None:
    page = Page(render_report(report))
    chips = [text for attributes, text in page.find("span", "chip")]
    assert "one" in chips
    assert "two (predicted, right)" in chips
    assert "ten (predicted, wrong; truth:)six" in chips
    assert "1 of 2 hidden words right" in render_report(report)


def test_bridge_mask_shows_what_is_allowed_and_what_leaks(report: RunReport) -> None:
    sound = mask()
    runs = masks.mask_runs(sound)
    assert sum(run.length for run in runs) == sound.allowed.sum()
    assert {run.kind for run in runs} == {"a", "eos", "b"}
    assert masks.block_table(sound) == {
        "A": {"A": "yes", "EOS": "yes", "B": "no"},
        "EOS": {"A": "yes", "EOS": "yes", "B": "yes"},
        "B": {"A": "no", "EOS": "yes", "B": "yes"},
    }
    leaking = sound.allowed.copy()
    leaking[-1, 0] = True
    leak = replace(sound, allowed=leaking)
    found = [run for run in masks.mask_runs(leak) if run.kind == "leak"]
    assert found == [masks.Run(len(leaking) - 1, 0, 1, "leak")]
    assert masks.block_table(leak)["B"]["A"] == "partly"
    assert 'class="leak"' in render_report(replace(report, bridge_mask=leak))
    assert "should not allow" in render_report(replace(report, bridge_mask=leak))
    assert "should not allow" not in render_report(report)


def test_a_causal_mask_is_no_fault(report: RunReport) -> None:
    sound = mask()
    causal = replace(sound, allowed=np.tril(sound.allowed))
    assert masks.is_causal(causal)
    assert not masks.is_causal(sound)
    page = render_report(replace(report, bridge_mask=causal))
    assert 'class="partly"' in page
    assert 'class="leak"' not in page
    assert "left causal" in page
    assert "left causal" not in render_report(report)


def test_only_the_stages_that_ran_are_told_of(report: RunReport) -> None:
    bridge = render_report(replace(report, curves=[curve("bridge", "loss")]))
    assert "<strong>bridge</strong>" in bridge
    for saying in ("<strong>warm-up</strong>", "<strong>contrastive</strong>", "learns in stages"):
        assert saying not in bridge
        assert saying in render_report(report)
    after = figures.stage_panels([curve(stage, "loss") for stage in ("bridge", "contrastive", "contrastive only")])
    assert after[-1].lines[0].label == "after bridge"


def test_text_and_its_reconstructions_are_not_said_to_have_images(report: RunReport) -> None:
    words = [replace(report.tokens[0], image=None, stage=stage) for stage in ("warm-up", "bridge")]
    page = render_report(
        replace(report, pictures=False, tokens=words, patches=[], queries=[], curves=report.curves[:1], galleries=[])
    )
    for saying in ("the image", "the caption"):
        assert saying in render_report(report)
        assert saying not in page[page.index("<main>") :]


def test_who_wrote_the_page_is_what_the_caller_says(report: RunReport) -> None:
    assert "Written by <code>cocoa-embed report</code>" in render_report(replace(report, command="cocoa-embed report"))
    assert "cocoa-embed demo" not in render_report(report)


def test_stages_have_a_panel_each_and_the_comparison_shares_one(report: RunReport) -> None:
    panels = figures.stage_panels(report.curves)
    assert [(panel.title, panel.quantity) for panel in panels] == [
        ("warm-up", "loss"),
        ("bridge", "loss"),
        ("contrastive", "loss"),
    ]
    assert [line.label for line in panels[2].lines] == ["after warm-up and bridge", "contrastive only"]
    plateau = figures.plateau_panel(report.curves)
    assert plateau is not None
    assert len(plateau.lines) == 2
    assert [panel.title for panel in figures.stage_panels(report.curves[3:])] == ["contrastive only"]


def test_values_that_are_not_numbers_leave_a_gap() -> None:
    broken = Curve("warm-up", {"loss": [(0, 2.0), (1, float("nan")), (2, 1.0)], "mae_loss": [(0, float("inf"))]}, 1)
    (panel,) = figures.stage_panels([broken])
    assert [line.points for line in panel.lines] == [[(0, 2.0), (2, 1.0)]]


def test_running_mean_keeps_a_constant_and_damps_noise() -> None:
    constant = [(step, 3.0) for step in range(100)]
    assert np.allclose(figures.smoothed(constant), constant)
    noisy = [(step, float(step % 2)) for step in range(100)]
    assert np.std([value for _, value in figures.smoothed(noisy)]) < 0.3 * np.std([value for _, value in noisy])
    assert figures.smoothed(noisy[:20]) == noisy[:20]


def test_large_images_are_scaled_down_and_other_modes_become_rgb() -> None:
    large = Image.new("CMYK", (2000, 500))
    uri = figures.data_uri(large)
    assert uri.startswith("data:image/png;base64,")
    assert len(uri) < 20_000
    assert large.size == (2000, 500)


@pytest.mark.parametrize("changes", [{"labels": ["a"]}, {"blocks": ["A"]}, {"blocks": ["?"] * 8}])
def test_mask_of_other_sizes_or_blocks_is_refused(changes: dict[str, Any]) -> None:
    sound = mask()
    assert len(sound.labels) == 8
    with pytest.raises(ValueError, match=r"8|\?"):
        replace(sound, **changes)


def test_token_lists_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens, 1 hidden, 2 predicted"):
        TokenReconstruction(["a", "b"], [True], ["a", "b"], "bridge")


def test_same_report_gives_the_same_bytes(report: RunReport, tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report(report)


@needs_chromium
def test_page_fits_phone_and_desktop(report: RunReport, tmp_path: Path) -> None:
    assert report.recipe is not None
    long = replace(
        report,
        bridge_mask=mask(8, 30),
        notes=["w" * 300],
        facts=[("Machine", "x" * 200)],
        alerts=["a" * 300],
        evaluations=[Evaluation("e" * 200, "n" * 200, [Table("t" * 100, ["c" * 20] * 12, [["v" * 20] * 12])])],
        galleries=[replace(report.galleries[0], title="g" * 200, note="n" * 300)],
        recipe=replace(report.recipe, rows=[("k" * 60, ["v" * 60] * 3)], yaml="y" * 400),
        data=DataUsed([StageData("bridge", [("s" * 100, "o" * 300, 7)], "f" * 64)], 1, [("s", "r" * 300, "w" * 300)]),
    )
    page = render_report(long)
    too_wide = page.replace("<main>", '<main><div style="width: 3000px">wide</div>')
    shown = seen({"phone": (390, page), "desktop": (1280, page), "too wide": (390, too_wide)}, tmp_path)
    assert shown["too wide"]["width"] > 3000
    assert shown["phone"]["width"] <= 390
    assert shown["desktop"]["width"] <= 1280
    for name in ("phone", "desktop"):
        assert sorted(shown[name]["sections"]) == sorted(SECTIONS)
        assert shown[name]["decoded"] == shown[name]["images"] == page.count("<img ") > 0


@needs_chromium
def test_a_browser_asks_the_network_for_nothing(report: RunReport, tmp_path: Path) -> None:
    asking = '<img src="http://127.0.0.1:9/asked.png">'
    for name, page in {"own": render_report(report), "asking": asking, "refused": render_report(report)}.items():
        refused = page.replace("<main>", f"<main>{asking}") if name == "refused" else page
        (tmp_path / f"{name}.html").write_text(refused, encoding="utf-8")
    assert requested(tmp_path / "asking.html", tmp_path) == {"http://127.0.0.1:9/asked.png"}
    assert requested(tmp_path / "own.html", tmp_path) == set()
    assert requested(tmp_path / "refused.html", tmp_path) == set(), "the page's policy holds whatever comes into it"


def test_a_table_is_shown_with_its_own_row_and_its_notes_in_this_pages_style(report: RunReport) -> None:
    table = Table("Scores", ["model", "mrr"], [["ours", "0.5"], ["theirs", "0.4"]], own=[0], notes=["Of 12 queries."])
    page = Page(render_report(replace(report, evaluations=[Evaluation("Pairs", "", [table])])))
    (shown,) = [text for _, text in page.find("figure", "scores")]
    assert shown == "Scores modelmrr ours0.5 theirs0.4 Of 12 queries."
    assert [text for _, text in page.find("tr", "ours")] == ["all three stages 90.0 % 95.0 % 99.0 % 0.930", "ours0.5"]


def test_a_query_far_off_says_how_far_and_its_answer_has_its_own_place(report: RunReport) -> None:
    page = Page(render_report(report))
    (verdict,) = [text for _, text in page.find("p", "verdict")]
    assert verdict == "Right answer in place 70.100 behind the best wrong one"
    assert [text for _, text in page.find("ol", "texts")] == ["7. ✓ right answer0.300 words"]
    first = replace(report.galleries[0].queries[0], rank=1, margin=0.25)
    found = render_report(replace(report, galleries=[Gallery("The best", "", [first])]))
    assert [text for _, text in Page(found).find("p", "verdict")] == ["Found first0.250 ahead of the best wrong one"]


def test_the_embeddings_measures_have_a_chart_a_stage_and_their_last_values() -> None:
    bridge = Curve("bridge", {"alignment": [(0, 1.5), (50, 1.25)], "uniformity": [(50, -2.0)]}, 1)
    contrastive = Curve("contrastive", {"alignment": [(0, 1.0), (5, float("nan")), (9, 0.5)]}, 1)
    alignment, uniformity = figures.measures([bridge, contrastive])
    assert alignment.title == "Alignment"
    assert alignment.lasts == [("bridge", "1.25"), ("contrastive", "0.5")]
    assert [panel.title for panel in alignment.panels] == ["bridge", "contrastive"]
    assert alignment.panels[1].lines[0].points == [(0, 1.0), (9, 0.5)]
    assert uniformity.lasts == [("bridge", "−2")]
    assert uniformity.panels == [], "one point is a number, and no course"
    assert figures.measures([Curve("bridge", {"loss": [(0, 1.0)]}, 1)]) == []
    assert figures.stage_panels([bridge]) == [], "they are in a section of their own"


def test_the_plateau_shows_accuracy_without_an_image_where_it_was_measured(report: RunReport) -> None:
    with_it = figures.plateau_panel([curve("bridge", *series.PLATEAU, series.NO_IMAGE)])
    assert with_it is not None
    assert [line.label for line in with_it.lines][2] == "without an image"
    words = "Without any image it is"
    assert words not in render_report(report)
    assert words in render_report(replace(report, curves=[curve("bridge", *series.PLATEAU, series.NO_IMAGE)]))


@pytest.mark.parametrize(
    ("token", "shown"),
    [("Ġred", "red"), ("Ã¼ber", "über"), ("Ġä½ł", "你"), ("Ã", "�"), ("Ċ", "⏎"), ("Ġ", "␣"), ("", "∅"), ("a b", "a b")],
)
def test_tokens_are_shown_as_the_text_that_they_stand_for(token: str, shown: str) -> None:
    assert token_text(token) == shown


def test_a_large_mask_is_condensed_and_still_says_who_sees_whom() -> None:
    large = mask(300, 100)
    large = replace(large, labels=["image"] * 300 + large.labels[300:])
    small = masks.condensed(large)
    assert small.labels[0] == "300 × image"
    assert small.labels[1] == "t300"
    assert small.labels[-1] == "… 88 more"
    assert len(small.labels) == 1 + 1 + masks.SHOWN_POSITIONS + 1
    assert masks.block_table(small) == masks.block_table(large)
    as_it_is = mask(3, 20)
    assert masks.condensed(as_it_is) is as_it_is
    leaking = large.allowed.copy()
    leaking[310, 5] = True
    found = masks.condensed(replace(large, allowed=leaking))
    assert sum(run.length for run in masks.mask_runs(found) if run.kind == "leak") == 1


def test_photographs_become_jpegs_and_drawings_stay_as_they_are() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    assert figures.data_uri(Image.fromarray(noise)).startswith("data:image/jpeg;base64,")
    assert figures.data_uri(Image.fromarray(noise[:100, :100])).startswith("data:image/png;base64,")
    assert figures.data_uri(Image.new("RGB", (300, 300))).startswith("data:image/png;base64,")


def test_names_that_are_no_unicode_do_not_keep_the_page_from_being_written(report: RunReport, tmp_path: Path) -> None:
    write_report(replace(report, notes=["caf\udce9.png"]), tmp_path / "report.html")
    assert "caf\\udce9.png" in (tmp_path / "report.html").read_text(encoding="utf-8")
