"""What the page of a run says of ``run.json`` and of results of ``cocoa-embed eval``."""

from typing import Any

import pytest
from run_records import pairs_document, run_record, stage

from cocoa_embed.report.content import RunPage
from cocoa_embed.report.run_page import EvalResult, run_page


def page(record: dict[str, Any] | None = None, **changes: Any) -> RunPage:
    return run_page(record or run_record(), "runs/small", **changes)


def result(*, is_own: bool = True, data: str | None = "/held-out", **changes: Any) -> EvalResult:
    return EvalResult(pairs_document(**changes), [], "pairs.json", is_own, data)


def test_a_run_goes_by_its_folder() -> None:
    assert page().title == "small"
    assert run_page(run_record(), "runs/other").title == "other (small)"
    assert page().subtitle == "Trained from a-backbone: warmup, bridge and contrastive, in 3 min 45 s."
    assert page().alerts == []


def test_a_stage_that_is_not_finished_says_how_to_go_on_and_keeps_its_curves() -> None:
    record = run_record()
    record["stages"]["bridge"] |= {"finished": False, "step": 13, "steps": 60, "samples": None}
    record["stages"]["contrastive"] |= {"finished": False, "step": 0, "log": [], "samples": None}
    shown = page(record)
    assert "Stage bridge is not finished: it is at step 13 of 60." in shown.alerts[0]
    assert "cocoa-embed train RECIPE --out runs/small --resume" in shown.alerts[0]
    assert len(shown.alerts) == 2
    assert [curve.stage for curve in shown.curves] == ["warmup", "bridge"]
    record["stages"]["warmup"] |= {"finished": False}
    assert "has finished no stage yet" in page(record).subtitle


def test_samples_say_which_rows_they_are_or_why_there_are_none() -> None:
    warmup, bridge = page().samples
    assert "trains on these rows" in warmup.note
    assert bridge.note == "The stage was not trained on these rows; they are of the data of warmup."
    record = run_record()
    record["stages"]["warmup"]["samples"] = {"failure": "an image is gone"}
    assert page(record).alerts == ["Stage warmup could not make its samples: an image is gone."]
    assert [samples.stage for samples in page(record).samples] == ["bridge"]


def test_headlines_name_chance_interval_and_the_other_model() -> None:
    (headline,) = page(results=[result(other=pairs_document("contrastive only"))]).headlines
    assert (headline.label, headline.value) == ("text to image", "75.0%")
    assert headline.detail == "40.0% to 80.0% · contrastive only: 75.0% · chance: 25.0% of 4"


@pytest.mark.parametrize(
    ("changes", "words", "headlines"),
    [
        ({}, "The pairs are those of /held-out.", 1),
        ({"data": None}, "From pairs.json.", 1),
        ({"data": "/scenes"}, "These are training data of warmup and bridge:", 0),
        ({"is_own": False}, "not known to be of this run", 0),
    ],
)
def test_only_the_runs_model_on_data_it_was_not_trained_on_makes_a_headline(
    changes: dict[str, Any], words: str, headlines: int
) -> None:
    shown = page(results=[result(**changes)])
    assert words in shown.evaluations[0].note
    assert len(shown.headlines) == headlines
    assert shown.evaluations[0].title.startswith("Pairs: " if changes.get("is_own", True) else "Another model: ")


@pytest.mark.parametrize(
    ("mean", "is_complete", "details"),
    [(0.25, True, ["chance: 0.1%"]), (0.25, False, ["chance: 0.1% · 1 of 36 subsets"]), (None, False, [])],
)
def test_the_headline_of_mmeb_says_what_was_run(mean: float | None, is_complete: bool, details: list[str]) -> None:
    document = {
        "benchmark": "MMEB-V1",
        "model": "ours",
        "averages": {"overall": mean},
        "chance": {"overall": 0.001},
        "coverage": {"overall": {"run": 1, "of": 36, "complete": is_complete}},
    }
    shown = page(results=[EvalResult(document, [], "mmeb.json", is_own=True)])
    assert [headline.detail for headline in shown.headlines] == details


def test_losses_of_another_run_go_with_the_stage_of_the_same_name() -> None:
    curves = page(compared={"contrastive only": {"stages": {"contrastive": stage("loss")}}}).curves
    assert [list(curve.compared) for curve in curves] == [[], [], ["contrastive only"]]


def test_only_losses_accuracies_and_measures_are_drawn() -> None:
    logged = stage("loss", "new_loss", "learning_rate", "train_loss", "seen_accuracy")
    drawn = page(run_record(stages={"contrastive": logged})).curves[0].series
    assert list(drawn) == ["loss", "new_loss", "seen_accuracy"]


def test_the_recipe_has_what_was_given_before_the_defaults() -> None:
    recipe = page().recipe
    assert recipe is not None
    assert recipe.whole == [("seed", "17"), ("bidirectional", "yes"), ("prompts.query", "find: ")]
    assert recipe.given.header == ("key", "warmup", "bridge", "contrastive")
    assert ("learning_rate", "2e-05", "2e-05", "2e-05") in recipe.given.rows
    assert [row[0] for row in recipe.defaults.rows] == ["probe_rows"]


def test_the_data_say_what_was_kept_out_and_left_out() -> None:
    record = run_record()
    record["stages"]["warmup"]["bad_rows"] = {"count": 40, "first": [["data", "row 1", "is broken"]]}
    warmup, bridge, _ = page(record).data
    assert (warmup.rows, warmup.bad_count, len(warmup.bad)) == (1200, 40, 1)
    assert warmup.sources == [("data", "folder scenes", 1200)]
    assert warmup.notes == ["500 steps of 4 rows"]
    assert bridge.notes[0].startswith("2 of them kept out")


def test_the_facts_name_machine_and_what_was_inherited() -> None:
    record = run_record(inherited={"stages": [{"stage": "warmup"}], "data": []})
    record["stages"]["bridge"]["log"][-1] |= {"tokens_per_second": 1234.5, "mfu": 0.31}
    facts = dict(page(record).facts)
    assert facts["trained before this run"] == "warmup"
    assert "1,000 trained parameters" in facts["bridge"]
    assert "1,234 tokens/s, 31% of the device's FLOP/s" in facts["bridge"]
    assert facts["machine"] == "cpu, Linux x86_64, 2 CPU cores, Python 3.12"
