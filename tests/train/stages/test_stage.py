"""A stage of another kind takes one file, and one line in a recipe's registry."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stages import LongerRecipe, MaskedLanguage, alone
from transformers import TrainerCallback

from cocoa_embed.errors import UsageError
from cocoa_embed.model.export import export_model
from cocoa_embed.train import pipeline
from cocoa_embed.train.data.rows import Row
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.plan.dry_run import plan
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.warmup.settings import WarmupSettings
from cocoa_embed.train.stages.warmup.stage import Warmup
from conftest import TINY_MAX_LENGTH

STAGE = {"steps": 2, "batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1}


@pytest.fixture
def recipe(tiny_backbone_path: Path, scene_folder: Path) -> LongerRecipe:
    return LongerRecipe.parse(
        {
            "name": "longer",
            "backbone": str(tiny_backbone_path),
            "max_length": TINY_MAX_LENGTH,
            "data": {"folder": str(scene_folder)},
            "contrastive": {**STAGE, "data": {"limit": 8}},
            "masked_language": {**STAGE, "ratio": 0.5, "mini_batch_size": 2},
        }
    )


class Killed(BaseException):
    pass


class KillAfterOneStep(TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if args[1].global_step == 1:
            raise Killed


def test_another_stage_is_planned_trained_resumed_and_exported(
    recipe: LongerRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, show = tmp_path / "out", pipeline.show_progress
    assert [stage.stage for stage in plan(recipe, out).stages] == ["contrastive", "masked_language"]
    whole = run(recipe, tmp_path / "whole")

    def kill_the_last_stage(trainer: CocoaTrainer, stage: str, shown: dict[str, str]) -> None:
        show(trainer, stage, shown)
        if stage == "masked_language":
            trainer.add_callback(KillAfterOneStep())

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "show_progress", kill_the_last_stage)
        with pytest.raises(Killed):
            run(recipe, out)
    results = run(recipe, out, resume=True)
    assert [result.stage for result in results] == ["contrastive", "masked_language"]
    weights = [load_file(result.folder / "model.safetensors") for result in (whole[-1], results[-1])]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert json.loads((out / "recipe.json").read_text())["masked_language"]["ratio"] == 0.5
    assert export_model(results[-1].folder, tmp_path / "model").is_dir()


def test_contrastive_learning_from_one_row_is_refused(scene_rows: list[Row]) -> None:
    stage = alone(Contrastive, settings(ContrastiveSettings))
    stage.check_rows(scene_rows[:2])
    with pytest.raises(UsageError, match="has one row"):
        stage.check_rows(scene_rows[:1])


def test_its_settings_are_validated_with_the_others(recipe: LongerRecipe) -> None:
    assert isinstance(recipe.stages["masked_language"], MaskedLanguage)
    with pytest.raises(UsageError, match=r"masked_language\.ratio = 2: .*; unknown key 'masked_language\.rato'"):
        LongerRecipe.parse({**recipe.model_dump(), "masked_language": {**STAGE, "ratio": 2, "rato": 1}})


def settings(kind: type[StageSettings], **values: Any) -> StageSettings:
    return kind(**{"batch_size": 8, "epochs": 2, **values})


@pytest.mark.parametrize(
    ("kind", "given", "steps"),
    [
        (Warmup, settings(WarmupSettings), 5),
        (Contrastive, settings(ContrastiveSettings), 10),
        (Contrastive, settings(ContrastiveSettings, directions="symmetric"), 5),
        (Contrastive, settings(ContrastiveSettings, epochs=None, steps=7), 7),
    ],
)
def test_an_epoch_is_each_row_once_in_each_direction_of_its_own(
    kind: type[Any], given: StageSettings, steps: int
) -> None:
    assert alone(kind, given).step_count(rows=20) == steps


@pytest.mark.parametrize(
    ("kind", "mini", "devices", "expected"),
    [
        (Warmup, None, 2, (8, 1)),
        (Warmup, 2, 2, (4, 2)),
        (Warmup, 16, 2, (8, 1)),
        (Contrastive, 2, 2, (8, 1)),
        (Warmup, 3, 1, "8 is not a multiple of 3, the mini_batch_size 3 on 1 device"),
        (Warmup, None, 3, "8 is not a multiple of the 3 devices"),
        (Contrastive, 2, 3, "8 is not a multiple of the 3 devices"),
    ],
)
def test_a_batch_is_divided_into_equal_parts_or_refused(
    kind: type[Any], mini: int | None, devices: int, expected: tuple[int, int] | str
) -> None:
    own = ContrastiveSettings if kind is Contrastive else WarmupSettings
    stage = alone(kind, settings(own, mini_batch_size=mini))
    if isinstance(expected, tuple):
        assert stage.micro_batches(devices) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            stage.micro_batches(devices)
