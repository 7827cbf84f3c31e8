"""A stage of another kind takes one file, and one line in a recipe's registry."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stages import LongerRecipe, MaskedLanguage, alone
from tiny_backbones import TINY_MAX_LENGTH

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.export import export_model
from cocoa_embed.model.training_record import read_run
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.oom import explain_out_of_memory
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.plan.dry_run import plan
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.stage import Stage
from cocoa_embed.train.stages.warmup.settings import WarmupSettings
from cocoa_embed.train.stages.warmup.stage import Warmup

STAGE = {"steps": 2, "batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1}


@pytest.fixture
def recipe(tiny_backbone_path: Path, scene_folder: Path) -> LongerRecipe:
    return LongerRecipe.parse(
        {
            "name": "longer",
            "backbone": str(tiny_backbone_path),
            "max_length": TINY_MAX_LENGTH,
            "data": {"folder": str(scene_folder), "limit": 8},
            "masked_language": {**STAGE, "ratio": 0.5, "mini_batch_size": 2},
        }
    )


def test_another_stage_is_planned_trained_and_exported(recipe: LongerRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [stage.stage for stage in plan(recipe, out).stages] == ["masked_language"]
    (result,) = run(recipe, out)
    assert read_run(out)["recipe"]["masked_language"]["ratio"] == 0.5
    assert export_model(result.folder, tmp_path / "model").is_dir()


def test_the_settings_of_another_stage_are_validated_too(recipe: LongerRecipe) -> None:
    assert isinstance(recipe.stages["masked_language"], MaskedLanguage)
    with pytest.raises(UsageError, match=r"masked_language\.ratio = 2: .*; unknown key 'masked_language\.rato'"):
        LongerRecipe.parse({**recipe.model_dump(), "masked_language": {**STAGE, "ratio": 2, "rato": 1}})


def stage_of(kind: type[Stage[Any]], **values: Any) -> Stage[Any]:
    settings = ContrastiveSettings if kind is Contrastive else WarmupSettings
    return alone(kind, settings(**{"batch_size": 8, "epochs": 2, **values}))


@pytest.mark.parametrize(
    ("kind", "values", "steps"),
    [
        (Warmup, {}, 5),
        (Contrastive, {}, 12),
        (Contrastive, {"directions": "symmetric"}, 6),
        (Contrastive, {"batch_size": 64}, 4),
        (Contrastive, {"epochs": None, "steps": 7}, 7),
        (Warmup, {"min_steps": 4}, 5),
        (Warmup, {"min_steps": 6}, 6),
    ],
)
def test_an_epoch_draws_each_row_once_in_each_direction(
    scene_rows: list[Row], kind: type[Stage[Any]], values: dict[str, Any], steps: int
) -> None:
    """A batch of the contrastive stage does not go on in the next epoch: 20 rows make three batches of 8."""
    rows = RowTable.of(scene_rows[:20])
    assert stage_of(kind, **values).step_count(rows) == steps


@pytest.mark.parametrize(
    ("kind", "adapter", "remedies"),
    [
        (Warmup, None, ["train adapters (warmup.adapter.kind=dora)", "shard them", "lower warmup.mini_batch_size"]),
        (Contrastive, None, ["train adapters (contrastive.adapter", "lower contrastive.mini_batch_tokens"]),
        (Warmup, {"kind": "dora"}, ["lower warmup.mini_batch_size"]),
    ],
)
def test_a_lack_of_memory_is_answered_with_what_the_stage_can_do(
    kind: type[Stage[Any]], adapter: dict[str, str] | None, remedies: list[str]
) -> None:
    found = stage_of(kind, adapter=adapter).weights_remedies()
    assert [text[: len(start)] for text, start in zip(found, remedies, strict=True)] == remedies
    with pytest.raises(CocoaError) as caught, explain_out_of_memory("warmup", found):
        raise torch.OutOfMemoryError
    assert str(caught.value).endswith(f"of stage warmup leave no memory; {', or '.join(found)}.")


@pytest.mark.parametrize(
    ("kind", "mini", "devices", "expected"),
    [
        (Warmup, None, 2, (8, 1)),
        (Warmup, 2, 2, (4, 2)),
        (Warmup, 16, 2, (8, 1)),
        (Warmup, "auto", 2, (8, 1)),
        (Contrastive, None, 2, (8, 1)),
        (Warmup, 3, 1, "8 is not a multiple of 3, the mini_batch_size 3 on 1 device"),
        (Warmup, None, 3, "8 is not a multiple of the 3 devices"),
        (Contrastive, None, 3, "8 is not a multiple of the 3 devices"),
    ],
)
def test_a_batch_is_divided_into_equal_parts_or_refused(
    kind: type[Stage[Any]], mini: int | str | None, devices: int, expected: tuple[int, int] | str
) -> None:
    stage = stage_of(kind, **({} if mini is None else {"mini_batch_size": mini}))
    if isinstance(expected, tuple):
        assert stage.micro_batches(devices) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            stage.micro_batches(devices)
