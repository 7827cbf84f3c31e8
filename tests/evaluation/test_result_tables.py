"""The tables of MMEB-V1 and of pairs: what they mark, what they compare, and that they fit a screen."""

from pathlib import Path
from typing import Any

import pytest
from browser import needs_chromium, seen
from run_records import pairs_document
from scored_model import ScoredModel

from cocoa_embed.data.mmeb import SUBSETS
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.evaluation.metrics import METRICS
from cocoa_embed.evaluation.mmeb import METRICS as METRICS_OF_MMEB
from cocoa_embed.evaluation.mmeb import summary
from cocoa_embed.evaluation.mmeb_tables import mmeb_tables
from cocoa_embed.evaluation.pairs_tables import SHOWN_METRICS, pairs_tables
from cocoa_embed.report.tables import Table, to_html


def result(precision: float, **changed: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("rows_merged", "tied_rows"), 0)
    scores = dict.fromkeys(("precision@1", *METRICS_OF_MMEB), precision)
    return {**scores, **counts, "chance": 0.01, "rows": 1000, "rows_in_data": 1000, "partial": False, **changed}


def mmeb_document(results: dict[str, dict[str, Any]], model: str = "my model") -> dict[str, Any]:
    not_run = dict.fromkeys(SUBSETS.keys() - results.keys(), "not in the data")
    return summary(Encoder(ScoredModel(), model), results, not_run)


PARTLY_RUN = {
    "ImageNet-1K": result(0.5),
    "N24News": result(0.7, rows=90, partial=True, tied_rows=3),
    "MSCOCO": result(0.9, rows=20, rows_in_data=20, rows_merged=4),
}


def compared(*models: str) -> dict[str, Any]:
    """Return the document of two models, the second of which is better."""
    better = {"subsets": {"text_to_image": dict.fromkeys(METRICS, 0.6)}}
    ours, theirs = (pairs_document(model, **scores) for model, scores in zip(models, ({}, better), strict=True))
    difference = {"difference": -0.1, "low": -0.3, "high": 0.01, "p": 0.0312}
    return {**ours, "other": theirs, "comparison": {"text_to_image": dict.fromkeys(METRICS, difference)}}


def rows_of(table: Table) -> dict[str, list[str]]:
    """Return the cells of a table by their row's first: details in parentheses, the best in asterisks."""
    return {
        row[0].text: [
            (f"*{cell.text}*" if cell.is_best else cell.text) + (f" ({cell.detail})" if cell.detail else "")
            for cell in row[1:]
        ]
        for row in table.cells
    }


def test_an_incomplete_run_is_marked_and_not_compared_with_the_published_numbers() -> None:
    averages, subsets = mmeb_tables(mmeb_document(PARTLY_RUN))
    rows = rows_of(averages)
    assert rows["my model"] == [
        "60.0* (2/10)", "not run", "not run", "90.0* (1/4)", "70.0* (3/20)", "not run", "70.0* (3/36)"
    ]  # fmt: skip
    assert rows["CoCoA (Qwen2-VL-2B)"] == ["63.0", "57.4", "69.6", "85.8", "70.2", "60.7", "66.0"]
    assert rows["GME (Qwen2-VL-2B)"] == ["56.9", "41.2", "67.8", "53.4", "–", "–", "55.8"]
    assert rows["MoCa (Qwen2.5-VL-7B)"] == ["*65.8*", "64.7", "*75.0*", "*92.4*", "74.7", "*67.6*", "*71.5*"]
    assert rows["chance"] == ["1.0", "–", "–", "1.0", "1.0", "–", "1.0"]
    assert "* is not comparable with the published numbers" in averages.notes[1]
    rows = rows_of(subsets)
    assert rows.keys() == SUBSETS.keys()
    assert rows["ImageNet-1K"] == ["classification", "IND", *["50.0"] * 5, "1.0", "1000", ""]
    assert rows["N24News"][-1] == "partial: 90 of 1000 rows; 3 ties"
    assert rows["MSCOCO"][-1] == "the public data have 1000 rows; 4 rows list a target twice"
    assert rows["GQA"] == ["VQA", "OOD", *["–"] * 7, "not run: not in the data"]


def test_a_complete_run_is_compared_with_the_published_numbers() -> None:
    document = mmeb_document({name: result(0.71) for name in SUBSETS})
    assert document["averages"] == pytest.approx(dict.fromkeys(document["averages"], 0.71))
    averages, _ = mmeb_tables(document)
    assert rows_of(averages)["my model"] == ["*71.0*", "*71.0*", "71.0", "71.0", "71.0", "*71.0*", "71.0"]
    assert len(averages.notes) == 1
    smaller = mmeb_document({name: result(0.99, rows=20, rows_in_data=20) for name in SUBSETS})
    assert {cell[:5] for cell in rows_of(mmeb_tables(smaller)[0])["my model"]} == {"99.0*"}, "these are other rows"


def test_pairs_show_intervals_chance_and_differences() -> None:
    (table,) = pairs_tables(pairs_document("mine"))
    mine = dict.fromkeys(METRICS, "0.500 (0.400–0.800)") | {"hit@1": "0.750 (0.400–0.800)"}
    assert rows_of(table) == {"mine": [mine[name] for name in METRICS], "chance": ["0.250"] * len(METRICS)}
    assert "3 queries in 3 groups, 4 documents" in table.notes[0]
    table, comparison = pairs_tables(compared("mine", "theirs"), SHOWN_METRICS)
    assert table.header == ("model", *SHOWN_METRICS)
    assert rows_of(table)["mine"] == ["0.500 (0.400–0.800)"] * 4
    assert rows_of(table)["theirs"] == ["*0.600* (0.400–0.800)"] * 4
    assert rows_of(comparison) == {name: ["-0.100 (-0.300 to +0.010)", "0.0312"] for name in SHOWN_METRICS}
    assert "mine minus theirs" in comparison.notes[0]


@needs_chromium
def test_a_page_fits_the_screen_and_breaks_no_word(tmp_path: Path) -> None:
    long = "runs/a_long_name_of_a-run/contrastive"
    pages = {
        "pairs": to_html(f"Pairs of {'x' * 80}", pairs_tables(compared(long, f"owner/{long}"))),
        "mmeb": to_html("MMEB-V1", mmeb_tables(mmeb_document(PARTLY_RUN, long))),
    }
    frames = {f"{name} {width}": (width, page) for name, page in pages.items() for width in (1100, 390)}
    for name, page in seen(frames, tmp_path).items():
        width = frames[name][0]
        assert page["width"] <= width, name
        assert page["broken"] == [], name
        assert not (page["scrolled"] and width == 1100), name
