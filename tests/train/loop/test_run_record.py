"""A run is recorded when it begins, while it trains, and at its end."""

import shutil
from pathlib import Path

from interrupted import killed_at
from tiny_backbones import STAGE, MakeRecipe

from cocoa_embed.model.training_record import read_run, read_training
from cocoa_embed.train import Recipe, run
from cocoa_embed.train.loop.run_record import read_start
from cocoa_embed.train.plan.checks import CHECKPOINTS


def test_a_finished_run_records_recipe_data_and_machine(
    finished: Path, small_recipe: Recipe, scene_folder: Path
) -> None:
    found = read_run(finished)
    assert found["version"] == 1
    assert Recipe.parse(found["recipe"]) == small_recipe
    assert Recipe.parse(found["given"]) == small_recipe
    assert (found["backbone"], found["origin"]) == (small_recipe.backbone, "folder")
    assert found["inherited"] == {"stages": [], "data": []}
    assert found["machine"]["processes"] == 1
    assert set(found["libraries"]) >= {"torch", "transformers"}
    warmup, bridge, contrastive = found["stages"].values()
    assert contrastive["sources"] == {"data": {"folder": str(scene_folder), "limit": 9}}
    assert contrastive["places"] == [str(scene_folder.resolve())]
    assert contrastive["rows"] == {"data": 9}
    assert warmup["bad_rows"] == {"count": 0, "first": []}
    assert (warmup["held_out"], len(bridge["held_out"]["rows"])) == ({"rows": [], "seen_by": []}, 4)
    assert bridge["held_out"]["seen_by"] == ["warmup"]
    assert warmup["trained_parameters"] > bridge["trained_parameters"] > 0, "the pixel decoder too"
    for stage in found["stages"].values():
        assert stage["finished"]
        assert stage["step"] == stage["steps"] == 2
        assert [line["step"] for line in stage["log"] if "loss" in line] == [1, 2]
    for stage in ("warmup", "bridge", "contrastive"):
        assert read_training(finished / stage)["run"] == found["id"]


def test_a_run_from_a_checkpoint_records_the_stages_and_data_before_it(
    finished: Path, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    start = finished / "warmup"
    run(tiny_recipe(name="next", backbone=str(start), bridge={**STAGE, "steps": 1, "probe_rows": 0}), tmp_path / "out")
    found, earlier = read_run(tmp_path / "out"), read_training(start)
    assert found["inherited"] == {"stages": earlier["stages"], "data": [earlier["data"]]}
    assert found["backbone"] == earlier["backbone"]
    assert found["stages"]["bridge"]["held_out"] == {"rows": [], "seen_by": []}
    assert [stage["stage"] for stage in read_start(str(tmp_path / "out" / "bridge")).stages] == ["warmup", "bridge"]


def test_a_killed_run_has_recorded_the_step_of_its_newest_checkpoint(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with killed_at(2):
        run(tiny_recipe(bridge={**STAGE, "save_steps": 1}, contrastive={"steps": 2, "batch_size": 4}), tmp_path / "out")
    stages = read_run(tmp_path / "out")["stages"]
    assert [(stage["finished"], stage["step"]) for stage in stages.values()] == [(False, 1), (False, 0)]
    assert [line["step"] for line in stages["bridge"]["log"]] == [1]
    assert (tmp_path / "out" / CHECKPOINTS / "bridge" / "checkpoint-1").is_dir()


def test_a_stage_without_its_folder_is_trained_again(copy: Path, small_recipe: Recipe) -> None:
    shutil.rmtree(copy / "contrastive")
    assert [result.stage for result in run(small_recipe, copy, resume=True)] == list(small_recipe.stages)
    assert (copy / "contrastive" / "model.safetensors").is_file()
