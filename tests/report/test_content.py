"""What the page of a run shows of ``run.json`` and of results of ``cocoa-embed eval``."""

from typing import Any

import pytest
from run_records import pairs_document, run_record, stage

from cocoa_embed.report import content
from cocoa_embed.report.content import EvalResult


def result(*, is_own: bool = True, data: str | None = "/held-out", **changes: Any) -> EvalResult:
    return EvalResult(pairs_document(**changes), [], "pairs.json", is_own, data)


STAGES = run_record()["stages"]


def test_a_run_is_named_by_its_folder() -> None:
    assert content.title(run_record(), "runs/small") == "small"
    assert content.title(run_record(), "runs/other/") == "other (small)"
    assert content.subtitle(run_record()) == "Trained from a-backbone: warmup, bridge and contrastive, in 3 min 45 s."
    assert list(content.alerts(STAGES, "runs/small")) == []


def test_a_stage_without_an_end_or_samples_has_an_alert_and_samples_a_note_about_their_rows() -> None:
    stages = {
        "bridge": stage(finished=False, step=13, steps=60),
        "contrastive": stage(samples={"failure": "an image is gone"}),
    }
    unfinished, failed = content.alerts(stages, "runs/small")
    assert "Stage bridge is not finished: it is at step 13 of 60." in unfinished
    assert "cocoa-embed train RECIPE --out runs/small --resume" in unfinished
    assert failed == "Stage contrastive could not make its samples: an image is gone."
    assert "has finished no stage yet" in content.subtitle(run_record(stages={"bridge": stages["bridge"]}))
    held_out = "The stage was not trained on these rows; they come from the data of warmup."
    assert content.samples_note(STAGES["bridge"]) == held_out
    assert "trains on these rows" in content.samples_note(STAGES["warmup"])


def mmeb(mean: float | None) -> EvalResult:
    coverage = {"run": 1, "of": 36, "complete": False}
    averages = {"averages": {"overall": mean}, "chance": {"overall": 0.001}, "coverage": {"overall": coverage}}
    return EvalResult({"benchmark": "MMEB-V1", "model": "ours", **averages}, [], "mmeb.json", is_own=True)


@pytest.mark.parametrize(
    ("scored", "words", "headlines"),
    [
        (result(), "The pairs are those of /held-out.", ["75.0% 40.0% to 80.0% · chance: 25.0% of 4"]),
        (result(other=pairs_document("alone")), "", ["75.0% 40.0% to 80.0% · alone: 75.0% · chance: 25.0% of 4"]),
        (result(data="/scenes"), "These are training data of warmup and bridge:", []),
        (result(is_own=False), "not known to come from this run", []),
        (mmeb(0.25), "", ["25.0% chance: 0.1% · 1 of 36 subsets"]),
        (mmeb(None), "", []),
    ],
)
def test_only_the_runs_own_model_on_data_it_was_not_trained_on_has_headlines_beside_chance(
    scored: EvalResult, words: str, headlines: list[str]
) -> None:
    assert words in content.evaluation_note(scored, STAGES)
    assert [f"{each.value} {each.detail}" for each in content.headlines(scored, STAGES)] == headlines
    assert content.evaluation_title(scored).startswith("Another model: ") != scored.is_own


def test_the_facts_have_speed_machine_and_inherited_stages() -> None:
    record = run_record(inherited={"stages": [{"stage": "warmup"}], "data": []})
    record["stages"]["bridge"]["log"][-1] |= {"tokens_per_second": 1234.5, "mfu": 0.31}
    facts = dict(content.facts(record, "runs/small"))
    assert facts["trained before this run"] == "warmup"
    assert facts["bridge"] == (
        "500 steps in 1 min 15 s, 1,000 trained parameters, loss 0.995, 1,234 tokens/s, 31% of the device's FLOP/s"
    )
    assert facts["machine"] == "cpu, Linux x86_64, 2 CPU cores, Python 3.12"
