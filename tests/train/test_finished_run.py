"""The folder of a run, read back: whole, under way, pruned to save disk, of an earlier version, and broken."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.folders import RUN_MARKER
from cocoa_embed.model.training_record import TRAINING_FILE
from cocoa_embed.train.data.mixture import ReadRows, write_bad_rows
from cocoa_embed.train.data.rows import BadRow
from cocoa_embed.train.loop.checkpoints import COMPLETE, mark_complete
from cocoa_embed.train.plan.checks import BAD_ROWS_FILE, CHECKPOINTS, DATA_FILE, RECIPE_FILE, bad_rows
from cocoa_embed.train.recipe import STAGES, Recipe
from cocoa_embed.train.run_report.finished_run import read_run, run_of
from cocoa_embed.train.run_report.recipe_table import recipe_yaml
from cocoa_embed.train.settings import DataSettings

STEPS = {"warmup": 3, "bridge": 4, "contrastive": 5}
LOG = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def written_recipe(**changes: Any) -> dict[str, Any]:
    stages = {stage: {"steps": steps, "batch_size": 4} for stage, steps in STEPS.items()}
    values = {"name": "small", "backbone": "somewhere", "data": {"folder": "scenes"}, **stages}
    for stage, section in changes.items():
        values[stage] = {**values[stage], **section}
    return Recipe.parse(values).model_dump(mode="json")


def record(*stages: tuple[str, int]) -> dict[str, Any]:
    told = [
        {"stage": stage, "steps": steps, "rows": 24, "seconds": 1.5, "final": {"step": steps, "loss": 0.5}}
        for stage, steps in stages
    ]
    return {"backbone": "somewhere", "origin": "unknown", "recipe": {}, "stages": told}


def write(file: Path, document: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))


def write_run(folder: Path, *finished: str, earlier: tuple[tuple[str, int], ...] = ()) -> Path:
    """Write a run as far as ``read_run`` looks at one: no weights."""
    folder.mkdir()
    (folder / RUN_MARKER).touch()
    write(folder / RECIPE_FILE, written_recipe())
    known = {"fingerprint": "abc", "rows": {"data": 24}, "sources": {"data": {"folder": "scenes"}}}
    write(folder / DATA_FILE, dict.fromkeys(STEPS, known))
    for number, stage in enumerate(finished, 1):
        write(folder / stage / "log.json", LOG)
        write(folder / stage / TRAINING_FILE, record(*earlier, *((each, STEPS[each]) for each in finished[:number])))
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_run(tmp_path / "small", *STAGES)


@pytest.fixture
def under_way(tmp_path: Path) -> Path:
    """A run whose bridge is at step 4 of many; what was written last is not whole."""
    run = write_run(tmp_path / "small", "warmup")
    for step in (2, 4, 6):
        checkpoint = run / CHECKPOINTS / "bridge" / f"checkpoint-{step}"
        lines = [{"step": number, "loss": 1.0 / number, "epoch": 0.5} for number in range(1, step + 1)]
        write(checkpoint / "trainer_state.json", {"log_history": lines, "global_step": step})
        if step < 6:
            mark_complete(checkpoint, seconds=10.0 * step)
    return run


# Pruned


def test_stages_without_weights_are_finished(whole: Path) -> None:
    assert list(whole.rglob("*.safetensors")) == [], "the premise"
    found = read_run(whole)
    assert [(result.stage, result.steps, result.log) for result in found.results] == [
        (stage, STEPS[stage], LOG) for stage in STAGES
    ]
    assert (found.missing, found.gone, found.unfinished) == ({}, [], [])


@pytest.mark.parametrize("gone", [["warmup"], ["bridge"], ["warmup", "bridge"]])
def test_a_stage_whose_folder_has_gone_is_finished_as_a_later_one_tells(whole: Path, gone: list[str]) -> None:
    for stage in gone:
        shutil.rmtree(whole / stage)
    found = read_run(whole)
    assert found.gone == gone
    assert found.missing == {}
    assert [(result.stage, result.steps, result.rows, result.seconds) for result in found.results] == [
        (stage, STEPS[stage], 24, 1.5) for stage in STAGES
    ]
    for result in found.results:
        assert result.log == ([{"step": STEPS[result.stage], "loss": 0.5}] if result.stage in gone else LOG)


@pytest.mark.parametrize("final", [None, {}, "absent"])
def test_a_record_may_say_nothing_of_how_a_stage_ended(whole: Path, final: object) -> None:
    document = record(*STEPS.items())
    document["stages"][0] |= {"final": final}
    if final == "absent":
        del document["stages"][0]["final"]
    write(whole / "contrastive" / TRAINING_FILE, document)
    shutil.rmtree(whole / "warmup")
    assert read_run(whole).results[0].log == []


@pytest.mark.parametrize("change", [{"steps": None}, {"final": {"loss": 1.0}}, {"final": {"step": 3, "loss": None}}])
def test_what_a_later_record_says_of_a_stage_may_be_broken(whole: Path, change: dict[str, Any]) -> None:
    document = record(*STEPS.items())
    document["stages"][0] |= change
    write(whole / "contrastive" / TRAINING_FILE, document)
    shutil.rmtree(whole / "warmup")
    with pytest.raises(CocoaError, match=r"contrastive/cocoa_training\.json.*[Rr]estore it"):
        read_run(whole)


def test_a_last_stage_whose_folder_has_gone_cannot_be_told_from_one_that_is_not_finished(whole: Path) -> None:
    shutil.rmtree(whole / "contrastive")
    found = read_run(whole)
    assert (found.gone, found.missing) == ([], {"contrastive": 0})


def test_the_stages_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    run = write_run(tmp_path / "small", "warmup", "bridge", earlier=(("warmup", 70), ("bridge", 80)))
    shutil.rmtree(run / "warmup")
    found = read_run(run)
    assert [(result.stage, result.steps) for result in found.results] == [("warmup", 3), ("bridge", 4)]


# Under way


def test_a_stage_under_way_is_told_by_its_newest_whole_checkpoint(under_way: Path) -> None:
    found = read_run(under_way)
    assert found.missing == {"bridge": 4, "contrastive": 0}
    (bridge,) = found.unfinished
    assert (bridge.stage, bridge.steps, bridge.rows, bridge.seconds) == ("bridge", 4, 24, 40.0)
    assert [line["step"] for line in bridge.log] == [1, 2, 3, 4]
    assert bridge.final["loss"] == 0.25
    assert [result.stage for result in found.results] == ["warmup"]


@pytest.mark.parametrize(
    ("file", "document", "words"),
    [
        (COMPLETE, None, "cannot be read"),
        (COMPLETE, {"files": None}, "cannot be read"),
        (COMPLETE, {"files": {}}, "'seconds'"),
        ("trainer_state.json", [], "cannot be read"),
        ("trainer_state.json", {"log_history": None}, "no list of log lines"),
        ("trainer_state.json", {"log_history": [{"step": 1, "loss": None}]}, "line 1 of stage bridge: loss is null"),
    ],
)
def test_a_broken_checkpoint_is_one_sentence(under_way: Path, file: str, document: object, words: str) -> None:
    checkpoint = under_way / CHECKPOINTS / "bridge" / "checkpoint-4"
    write(checkpoint / file, document)
    if file != COMPLETE:
        mark_complete(checkpoint, seconds=1.0)
    with pytest.raises(CocoaError) as caught:
        read_run(under_way)
    assert words in str(caught.value)
    assert str(under_way) in str(caught.value)
    assert "stage bridge" in str(caught.value)
    assert str(caught.value).endswith("Remove that checkpoint to go on without it.")


@pytest.mark.parametrize("part", ["bridge", "bridge/step-500", "contrastive", "checkpoints/contrastive"])
def test_a_part_of_a_run_is_refused_with_the_runs_name(whole: Path, part: str) -> None:
    """Whether the stage has ended or not, and however deep weights are kept."""
    (whole / "contrastive" / TRAINING_FILE).unlink()
    (whole / part).mkdir(parents=True, exist_ok=True)
    assert run_of(whole / part) == whole
    with pytest.raises(UsageError, match="name the run, ") as caught:
        read_run(whole / part)
    assert str(caught.value).endswith(f"name the run, {whole}")


def test_no_run_is_found_where_none_is(whole: Path, tmp_path: Path) -> None:
    assert run_of(whole) is None
    assert run_of(tmp_path) is None
    deep = whole / "bridge" / "step-5" / "deeper"
    deep.mkdir(parents=True)
    assert run_of(deep) is None


# Rows that were left out


def test_each_stage_has_left_out_its_own_rows(whole: Path) -> None:
    both, refused = BadRow("data", "row 1", "is bad"), BadRow("data", "row 2", "no block B")
    read = {
        stage: ReadRows([], bad, {}, {}, "") for stage, bad in (("bridge", [both, refused]), ("contrastive", [both]))
    }
    write_bad_rows(whole / BAD_ROWS_FILE, bad_rows(read))
    found = read_run(whole)
    assert [(row.source, row.stages) for row in found.bad] == [("row 1", ("bridge", "contrastive")),
                                                               ("row 2", ("bridge",))]  # fmt: skip
    assert [row.source for row in found.bad_of("bridge")] == ["row 1", "row 2"]
    assert [row.source for row in found.bad_of("contrastive")] == ["row 1"]
    assert found.bad_of("warmup") == []


def test_a_run_of_an_earlier_version_does_not_tell_whose_rows_were_left_out(whole: Path) -> None:
    write(whole / BAD_ROWS_FILE, {"subset": "data", "source": "row 1", "reason": "is bad"})
    found = read_run(whole)
    assert found.bad_of("warmup") == found.bad_of("contrastive") == [BadRow("data", "row 1", "is bad")]


# Broken

KNOWN = {"fingerprint": "abc", "rows": {"data": 24}}
RECORD = record(("bridge", 4))


@pytest.mark.parametrize(
    ("name", "document", "words"),
    [
        ("recipe.json", {"name": "x", "bridge": 3}, "bridge is 3, an object is expected"),
        ("recipe.json", {"name": "x", "bridge": {"data": [1]}}, "bridge.data is [1], an object is expected"),
        ("recipe.json", {"name": "x", "data": "scenes"}, 'data is "scenes", an object is expected'),
        ("recipe.json", {"name": "x", "prompts": [1]}, "prompts is [1], an object is expected"),
        ("data.json", {"bridge": None}, "stage bridge, null stands where an object is expected"),
        ("data.json", {"bridge": {**KNOWN, "rows": None}}, "stage bridge, rows is null"),
        ("data.json", {"bridge": {**KNOWN, "rows": {"data": None}}}, 'stage bridge, rows is {"data": null}'),
        ("data.json", {"bridge": {**KNOWN, "fingerprint": None}}, "stage bridge, fingerprint is null"),
        ("data.json", {"bridge": {**KNOWN, "sources": None}}, "stage bridge, "),
        ("data.json", {"bridge": {**KNOWN, "sources": {"data": None}}}, "stage bridge, "),
        ("data.json", {"bridge": {**KNOWN, "sources": {"data": {"folder": 3}}}}, "stage bridge, "),
        ("bridge/log.json", None, "bridge"),
        ("bridge/log.json", [{"step": None}], "line 1 of stage bridge: step is null, a whole number is expected"),
        ("bridge/log.json", [{"step": 1.5}], "step is 1.5, a whole number is expected"),
        ("bridge/log.json", [{"step": 1}, {"step": 2, "loss": None}], "line 2 of stage bridge: loss is null, a number"),
        ("bridge/log.json", [{"step": 1, "loss": [1]}], "line 1 of stage bridge: loss is [1], a number"),
        ("bad_rows.jsonl", {"subset": "data", "source": None, "reason": "x"}, "cannot be read"),
        ("bad_rows.jsonl", {"subset": "data", "source": "x", "reason": "x", "stages": 3}, "cannot be read"),
        ("bad_rows.jsonl", [], "cannot be read"),
        (f"bridge/{TRAINING_FILE}", {**RECORD, "stages": None}, "nothing of the stage's steps, rows and seconds"),
        (f"bridge/{TRAINING_FILE}", {**RECORD, "stages": [{"steps": 1, "rows": 1, "seconds": None}]}, "nothing of"),
        (f"bridge/{TRAINING_FILE}", {**RECORD, "stages": [{"steps": "x", "rows": 1, "seconds": 1}]}, "nothing of"),
    ],
)
def test_what_is_broken_is_told_in_one_sentence_with_the_way_out(
    whole: Path, name: str, document: object, words: str
) -> None:
    write(whole / name, document)
    with pytest.raises(CocoaError) as caught:
        read_run(whole)
    message = str(caught.value)
    assert message.startswith(str(whole / name)), "the run and the stage"
    assert words in message
    assert any(way_out in message.lower() for way_out in ("restore", "remove"))


def test_what_the_way_out_says_is_one(whole: Path) -> None:
    write(whole / "bridge" / "log.json", [])
    write(whole / DATA_FILE, {})
    found = read_run(whole)
    assert found.rows == {}
    assert found.results[1].log == []


# The recipe, to be run again


def again(run: Path) -> Recipe:
    return Recipe.parse(yaml.safe_load(recipe_yaml(read_run(run))))


def test_what_a_stage_was_given_over_the_recipes_own_stays_though_it_is_the_default(whole: Path) -> None:
    values = written_recipe(data={"on_bad_row": "skip"}, bridge={"data": {"on_bad_row": "stop"}})
    write(whole / RECIPE_FILE, values)
    found = again(whole)
    assert {stage: found.data_of(stage).on_bad_row for stage in STAGES} == {
        "warmup": "skip",
        "bridge": "stop",
        "contrastive": "skip",
    }


def test_a_stage_may_take_back_what_the_recipe_says_of_all(whole: Path) -> None:
    """Of a run that does not tell its sources, they are those that its recipe names."""
    values = written_recipe(data={"limit": 9, "captions": "captions"}, bridge={"data": {"limit": None}})
    write(whole / RECIPE_FILE, values)
    write(whole / DATA_FILE, dict.fromkeys(STEPS, KNOWN))
    found = again(whole)
    limits = {stage: found.sources_of(stage)["data"].limit for stage in STAGES}
    assert limits == {"warmup": 9, "bridge": None, "contrastive": 9}


def test_a_recipe_of_an_earlier_version_has_every_key_and_so_tells_what_is_not_as_by_default(whole: Path) -> None:
    every_key = {name: known.default for name, known in DataSettings.model_fields.items()}
    values = written_recipe()
    values["data"] = {**every_key, "folder": "scenes", "captions": "captions", "on_bad_row": "skip"}
    values["bridge"]["data"] = {**every_key, "paraphrases": 1}
    write(whole / RECIPE_FILE, values)
    write(whole / DATA_FILE, dict.fromkeys(STEPS, KNOWN))
    bridge = again(whole).sources_of("bridge")["data"]
    assert (bridge.captions, bridge.paraphrases) == ("captions", 1)
    assert again(whole).data_of("bridge").on_bad_row == "skip"


def test_a_recipe_that_this_version_does_not_know_is_no_file_to_run_again(whole: Path) -> None:
    write(whole / RECIPE_FILE, {**written_recipe(), "of_another_version": 1})
    assert recipe_yaml(read_run(whole)) == ""
