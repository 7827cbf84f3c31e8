"""Snapshots, weights saved during a stage, are checkpoints like any other."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from interrupted import killed_at, same_weights
from sentence_transformers import SentenceTransformer
from tiny_backbones import MakeRecipe
from transformers import PreTrainedModel

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.export import export_model
from cocoa_embed.model.training_record import TRAINING_FILE, read_training
from cocoa_embed.train.loop.checkpoints import remove_unfinished
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.recipe import Recipe

STAGE: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "schedule": "constant_with_warmup",
    "logging_steps": 1,
    "save_steps": 2,
}
BRIDGE = {"group_by_length": False}
"""With grouping by length, the order of the rows depends on the number of steps."""
WHOLE: dict[str, Any] = {
    "bridge": {**BRIDGE, "steps": 4, "snapshot_steps": [2, 3]},
    "contrastive": {"steps": 2, "snapshot_steps": [1]},
}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: MakeRecipe, tiny_backbone_path: Path) -> MakeRecipe:
    def make(backbone: Path = tiny_backbone_path, **stages: Any) -> Recipe:
        sections = {name: {**STAGE, **values} for name, values in stages.items()}
        return tiny_recipe(backbone=str(backbone), **sections)

    return make


@pytest.fixture(scope="module")
def whole(recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("snapshots") / "out"
    run(recipe(**WHOLE), out)
    return out


def test_a_snapshot_has_the_weights_of_a_run_that_ends_there(whole: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    """So the snapshot before it changes nothing."""
    run(recipe(bridge={**BRIDGE, "steps": 3}), tmp_path / "short")
    assert same_weights(whole / "bridge" / "step-3", tmp_path / "short" / "bridge")
    assert not same_weights(whole / "bridge" / "step-2", tmp_path / "short" / "bridge")


@pytest.mark.slow
def test_a_contrastive_snapshot_past_an_epochs_end_has_the_weights_of_a_shorter_run(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    few = {"data": {"limit": 8}, "directions": "forward"}  # two steps an epoch
    run(recipe(contrastive={**few, "steps": 5, "snapshot_steps": [3]}), tmp_path / "long")
    run(recipe(contrastive={**few, "steps": 3}), tmp_path / "short")
    assert same_weights(tmp_path / "long" / "contrastive" / "step-3", tmp_path / "short" / "contrastive")


def test_a_snapshot_is_incomplete_while_it_is_written_again(
    whole: Path, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PreTrainedModel, folder: Path, **options: object) -> None:
        raise OSError("the disk is full")

    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / "bridge" / TRAINING_FILE).unlink()  # as if it had been killed at the end, and its checkpoints lost
    assert (out / "bridge" / "step-2" / TRAINING_FILE).is_file()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(CocoaError, match=r"stage bridge cannot be written \(the disk is full\); make room, .*--resume"):
        run(recipe(**WHOLE), out, resume=True)
    assert not (out / "bridge" / "step-2" / TRAINING_FILE).exists()


def test_a_snapshot_records_its_stages_exports_and_starts_another_stage(
    whole: Path, recipe: MakeRecipe, tmp_path: Path
) -> None:
    start = whole / "contrastive" / "step-1"
    record = read_training(start)["stages"]
    assert record[1]["final"]["step"] == 1
    exported = SentenceTransformer(str(export_model(start, tmp_path / "model")), device="cpu")
    assert exported.encode("a ring").shape == (32,)
    run(recipe(start, contrastive={"steps": 1}), tmp_path / "next")
    stages = read_training(tmp_path / "next" / "contrastive")["stages"]
    assert stages[:2] == record
    assert [(stage["stage"], stage["steps"]) for stage in stages] == [("bridge", 4), *[("contrastive", 1)] * 2]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_snapshots_from_before_its_checkpoint(
    whole: Path, recipe: MakeRecipe, tmp_path: Path
) -> None:
    given = recipe(bridge=WHOLE["bridge"])
    with killed_at(4):
        run(given, tmp_path / "out")
    snapshot = tmp_path / "out" / "bridge" / "step-2" / "model.safetensors"
    written = snapshot.stat().st_mtime_ns
    run(given, tmp_path / "out", resume=True)
    assert snapshot.stat().st_mtime_ns == written, "it was resumed from step 2"
    for folder in ("bridge", "bridge/step-2", "bridge/step-3"):
        assert same_weights(tmp_path / "out" / folder, whole / folder)


def test_incomplete_snapshots_are_removed_and_complete_ones_stay(tmp_path: Path) -> None:
    for name in ("step-1", "step-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-1" / TRAINING_FILE).write_text("{}")
    (tmp_path / "step-2" / "model.safetensors").write_text("half of it")
    (tmp_path / "config.json").write_text("{}")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 0.5}])
def test_a_snapshot_at_or_after_the_last_step_is_refused(
    recipe: MakeRecipe, tmp_path: Path, length: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"bridge\.snapshot_steps has step 3, but the stage ends at step [123]"):
        run(recipe(bridge={**length, "snapshot_steps": [1, 3]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_snapshots_of_an_adapter_are_refused(recipe: MakeRecipe) -> None:
    with pytest.raises(UsageError, match="snapshot_steps and adapter exclude each other"):
        recipe(bridge={"steps": 3, "snapshot_steps": [1], "adapter": {"kind": "lora"}})
