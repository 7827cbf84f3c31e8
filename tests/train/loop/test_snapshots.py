"""Weights kept on the way through a stage are checkpoints like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

from cocoa_embed.errors import UsageError
from cocoa_embed.model.export import export_model
from cocoa_embed.model.training_record import TRAINING_FILE, read_training
from cocoa_embed.train import pipeline
from cocoa_embed.train.loop.snapshots import remove_unfinished
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.record import StageResult, Start
from conftest import TINY_MAX_LENGTH

STAGE: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "schedule": "constant_with_warmup",
    "logging_steps": 1,
    "save_steps": 2,
}
LENGTHS_MIXED = {"group_by_length": False}
"""Grouped by length, the order of the rows is that of the whole stage, and a shorter one has another."""


def recipe(backbone: Path, data: Path, **stages: Any) -> Recipe:
    return Recipe.parse(
        {
            "name": "kept",
            "backbone": str(backbone),
            "max_length": TINY_MAX_LENGTH,
            "data": {"folder": str(data)},
            **{stage: {**STAGE, **values} for stage, values in stages.items()},
        }
    )


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tiny_backbone_path: Path, scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kept") / "out"
    stages = {
        "bridge": {**LENGTHS_MIXED, "steps": 4, "snapshot_steps": [2, 3]},
        "contrastive": {"steps": 2, "snapshot_steps": [1]},
    }
    run(recipe(tiny_backbone_path, scene_folder, **stages), out)
    return out


def test_snapshots_are_those_of_a_run_that_ends_there_where_the_learning_rate_is_held(
    whole: Path, tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    run(recipe(tiny_backbone_path, scene_folder, bridge={**LENGTHS_MIXED, "steps": 2}), tmp_path / "short")
    assert same_weights(whole / "bridge" / "step-2", tmp_path / "short" / "bridge")
    assert not same_weights(whole / "bridge" / "step-3", tmp_path / "short" / "bridge")


def test_so_are_those_of_a_contrastive_stage_past_an_epochs_end(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    few = {"data": {"limit": 8}, "directions": "forward"}  # two steps an epoch
    long, short = ({**few, "steps": steps} for steps in (5, 3))
    run(recipe(tiny_backbone_path, scene_folder, contrastive={**long, "snapshot_steps": [3]}), tmp_path / "long")
    run(recipe(tiny_backbone_path, scene_folder, contrastive=short), tmp_path / "short")
    assert same_weights(tmp_path / "long" / "contrastive" / "step-3", tmp_path / "short" / "contrastive")


def test_snapshots_change_nothing_of_what_is_learned(
    whole: Path, tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path
) -> None:
    stages = {"bridge": {**LENGTHS_MIXED, "steps": 4}, "contrastive": {"steps": 2}}
    run(recipe(tiny_backbone_path, scene_folder, **stages), tmp_path / "plain")
    for stage in stages:
        assert same_weights(whole / stage, tmp_path / "plain" / stage)


def test_snapshots_know_their_making(whole: Path) -> None:
    kept = read_training(whole / "contrastive" / "step-1")
    assert [(stage["stage"], stage["steps"]) for stage in kept["stages"]] == [("bridge", 4), ("contrastive", 1)]
    log = json.loads((whole / "bridge" / "step-2" / "log.json").read_text())
    assert [line["step"] for line in log] == [1, 2], "the line of its own step is there"


def test_weights_that_are_written_again_count_only_when_they_are_whole_again(
    whole: Path, tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(tiny_backbone_path, scene_folder, bridge={**LENGTHS_MIXED, "steps": 4, "snapshot_steps": [2, 3]})
    out = tmp_path / "out"

    def fail(self: PreTrainedModel, folder: Path, **options: object) -> None:
        raise OSError("the disk is full")

    run(given, out)
    (out / "bridge" / TRAINING_FILE).unlink()  # as if it had been killed at the end, and its checkpoints lost
    assert (out / "bridge" / "step-2" / TRAINING_FILE).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="the disk is full"):
            run(given, out, resume=True)
    assert not (out / "bridge" / "step-2" / TRAINING_FILE).exists()


def test_snapshots_export_and_start_another_stage(whole: Path, scene_folder: Path, tmp_path: Path) -> None:
    start = whole / "bridge" / "step-3"
    exported = SentenceTransformer(str(export_model(start, tmp_path / "model")), device="cpu")
    assert exported.encode("a ring").shape == (32,)
    run(recipe(start, scene_folder, contrastive={"steps": 1}), tmp_path / "next")
    stages = read_training(tmp_path / "next" / "contrastive")["stages"]
    assert [(stage["stage"], stage["steps"]) for stage in stages] == [("bridge", 3), ("contrastive", 1)]


def test_a_run_killed_after_a_kept_step_still_has_it_when_it_has_gone_on(
    whole: Path, tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    given = recipe(tiny_backbone_path, scene_folder, bridge={**LENGTHS_MIXED, "steps": 4, "snapshot_steps": [2, 3]})
    write = pipeline.write_record

    def die_at_the_last_step(recipe: Recipe, start: Start, results: list[StageResult]) -> None:
        if results[-1].steps == 4:
            raise Killed
        write(recipe, start, results)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_record", die_at_the_last_step)
        with pytest.raises(Killed):
            run(given, tmp_path / "out")
    kept = tmp_path / "out" / "bridge" / "step-2" / "model.safetensors"
    written = kept.stat().st_mtime_ns
    run(given, tmp_path / "out", resume=True)
    assert kept.stat().st_mtime_ns == written, "it was resumed from a later step"
    for folder in ("bridge", "bridge/step-2", "bridge/step-3"):
        assert same_weights(tmp_path / "out" / folder, whole / folder)


def test_what_a_killed_run_was_writing_goes_and_what_is_whole_stays(tmp_path: Path) -> None:
    for name in ("step-1", "step-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-1" / TRAINING_FILE).write_text("{}")
    (tmp_path / "step-2" / "model.safetensors").write_text("half of it")
    (tmp_path / "config.json").write_text("{}")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 0.5}])
def test_a_step_that_the_stage_does_not_come_to_is_refused(
    tiny_backbone_path: Path, scene_folder: Path, tmp_path: Path, length: dict[str, Any]
) -> None:
    given = recipe(tiny_backbone_path, scene_folder, bridge={**length, "snapshot_steps": [1, 3]})
    with pytest.raises(UsageError, match=r"bridge\.snapshot_steps has step 3, but the stage ends at step [123]"):
        run(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_merged_on_the_way(tiny_backbone_path: Path, scene_folder: Path) -> None:
    with pytest.raises(UsageError, match="snapshot_steps and adapter exclude each other"):
        recipe(
            tiny_backbone_path, scene_folder, bridge={"steps": 3, "snapshot_steps": [1], "adapter": {"kind": "lora"}}
        )
