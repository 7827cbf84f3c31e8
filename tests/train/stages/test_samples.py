import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stages import alone

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.images.load import load_image
from cocoa_embed.model.attention import Block, bridge_mask, make_causal
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.training_record import read_run
from cocoa_embed.train import Recipe, pipeline, run
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import DescribedBatches
from cocoa_embed.train.loop.stage_trainer import row_numbers
from cocoa_embed.train.stages import samples
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge
from cocoa_embed.train.stages.reconstruction import bridge_model_mask
from cocoa_embed.train.stages.samples import (
    SAMPLE_ROWS,
    bridge_samples,
    patches_to_image,
    stage_samples,
    warmup_samples,
)
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel
from conftest import STAGE, TINY_MAX_LENGTH

TEXT = Row(query=Item(text="blue cross on white"), positive=Item(text="white picture; blue cross"), source="")


def pixels(image: Image.Image | str) -> np.ndarray:
    """Return the pixels of an image or of a data URI of one."""
    return np.asarray(load_image(image)).astype(int)


def warmup_of(backbone: Backbone, rows: list[Row]) -> dict[str, Any]:
    collator = WarmupCollator(backbone.processor, backbone.geometry, seed=0)
    return warmup_samples(WarmupModel(backbone.model, backbone.geometry), collator, collator(numbered(rows)), rows)


def bridge_of(backbone: Backbone, rows: list[Row], model: BridgeModel | None = None) -> dict[str, Any]:
    collator = BridgeCollator(backbone.processor, mask_ratio=0.5, seed=0)
    return bridge_samples(model or BridgeModel(backbone.model), collator, collator(numbered(rows)), rows)


@pytest.mark.parametrize("size", [(56, 56), (112, 56), (56, 84)])
def test_patches_put_together_are_the_image(tiny_backbone: Backbone, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    prepared = tiny_backbone.processor.image_processor(images=[Image.fromarray(noise)], return_tensors="pt")
    grid = prepared["image_grid_thw"][0]
    image = patches_to_image(prepared["pixel_values"], grid, tiny_backbone.geometry, tiny_backbone.processor)
    side = tiny_backbone.geometry.patch_size
    assert image.size == (int(grid[2]) * side, int(grid[1]) * side) == size, "the premise: nothing was resized"
    assert np.array_equal(np.asarray(image), noise)


def test_the_warm_ups_images_differ_where_patches_were_masked_and_nowhere_else(
    tiny_backbone: Backbone, scene_rows: list[Row]
) -> None:
    rows = scene_rows[:3]
    collator = WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)
    masked_patches = collator(numbered(rows))["hidden_patches"].split(16)
    for row, shown, masked in zip(rows, warmup_of(tiny_backbone, rows)["patches"], masked_patches, strict=True):
        assert isinstance(row.image, Path)
        original = pixels(shown["original"])
        assert np.array_equal(original, np.asarray(load_image(row.image)))
        assert shown["caption"] == row.positive.text
        covered = int(masked.sum()) * tiny_backbone.geometry.patch_size**2
        assert 0 < covered < original[..., 0].size
        for other in ("masked", "reconstructed"):
            assert 0 < (pixels(shown[other]) != original).any(axis=-1).sum() <= covered
        assert shown["masked"] != shown["reconstructed"]


def test_tokens_that_were_not_masked_stand_as_they_were(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    rows = scene_rows[:4]
    found = [*warmup_of(tiny_backbone, rows)["tokens"], *bridge_of(tiny_backbone, rows)["tokens"]]
    for shown, row in zip(found, [*rows, *rows], strict=True):
        assert tiny_backbone.processor.tokenizer.convert_tokens_to_string(shown["tokens"]) == row.positive.text
        assert 0 < sum(shown["masked"]) < len(shown["masked"])
        kept = [index for index, masked in enumerate(shown["masked"]) if not masked]
        assert [shown["predicted"][index] for index in kept] == [shown["tokens"][index] for index in kept]


def allowed_of(mask: dict[str, list[str]]) -> np.ndarray:
    return np.array([[cell == "1" for cell in row] for row in mask["allowed"]])


@pytest.mark.parametrize("eos_attends_to_b", [True, False])
def test_the_shown_mask_is_the_one_that_was_trained_with(
    tiny_backbone: Backbone, scene_rows: list[Row], eos_attends_to_b: bool
) -> None:
    model = BridgeModel(tiny_backbone.model, eos_attends_to_b=eos_attends_to_b)
    mask = bridge_of(tiny_backbone, scene_rows[:2], model)["mask"]
    blocks = torch.tensor([[Block[name] for name in mask["blocks"]]])
    length = len(mask["labels"])
    expected = bridge_mask(blocks, eos_attends_to_b=eos_attends_to_b)[0, :length, :length]
    assert np.array_equal(allowed_of(mask), expected.numpy())
    assert set(mask["blocks"]) == {"A", "EOS", "B"}


def test_so_is_that_of_a_model_that_was_left_causal(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    make_causal(tiny_backbone.model)
    collator = BridgeCollator(tiny_backbone.processor, mask_ratio=0.5, seed=0)
    used = bridge_model_mask(tiny_backbone.model, collator(numbered(scene_rows[:2]))["blocks"])
    assert isinstance(used, torch.Tensor)
    assert used.dtype == torch.bool, "the premise: sdpa's, who attends to whom"
    allowed = allowed_of(bridge_of(tiny_backbone, scene_rows[:2])["mask"])
    assert np.array_equal(allowed, used[0, 0, : len(allowed), : len(allowed)].numpy())
    assert not np.triu(allowed, 1).any()


@pytest.mark.parametrize("pictured", [[False], [False, True, False]])
def test_rows_without_an_image_have_tokens_and_no_images(
    tiny_backbone: Backbone, scene_rows: list[Row], pictured: list[bool]
) -> None:
    rows = [scene_rows[0] if has_image else TEXT for has_image in pictured]
    warmup, bridge = warmup_of(tiny_backbone, rows), bridge_of(tiny_backbone, rows)
    for shown in (warmup, bridge):
        assert [each["image"] is not None for each in shown["tokens"]] == pictured
    assert [each["caption"] for each in warmup["patches"]] == [scene_rows[0].positive.text] * sum(pictured)


def test_a_prediction_that_the_tokenizer_does_not_have_is_an_empty_token(
    tiny_backbone: Backbone, scene_rows: list[Row]
) -> None:
    beyond = len(tiny_backbone.processor.tokenizer)

    class Beyond(BridgeModel):
        """Has a head that is wider than the tokenizer, as those of Qwen are."""

        def predict(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            logits = super().predict(batch)
            return torch.nn.functional.one_hot(torch.full(logits.shape[:1], beyond)).float()

    (shown,) = bridge_of(tiny_backbone, scene_rows[:1], Beyond(tiny_backbone.model))["tokens"]
    assert {word for word, masked in zip(shown["predicted"], shown["masked"], strict=True) if masked} == {""}


# In a run


def test_both_stages_leave_samples_of_the_rows_that_the_bridge_keeps_out(finished: Path) -> None:
    stages = read_run(finished)["stages"]
    warmup, bridge = stages["warmup"]["samples"], stages["bridge"]["samples"]
    assert (warmup["held_out"], bridge["held_out"]) == (False, True)
    assert len(warmup["patches"]) == len(warmup["tokens"]) == SAMPLE_ROWS
    assert len(bridge["tokens"]) == 4
    assert bridge["mask"]["blocks"][0] == "A"
    assert stages["contrastive"]["samples"] is None


def test_samples_that_cannot_be_made_cost_the_run_nothing_and_say_why(
    tiny_backbone_path: Path,
    scene_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory\nis left")

    monkeypatch.setattr(samples, "bridge_samples", fail)
    values = {"name": "test", "backbone": str(tiny_backbone_path), "max_length": TINY_MAX_LENGTH, "bridge": STAGE}
    with caplog.at_level(logging.WARNING, logger="cocoa_embed.train.stages.samples"):
        (result,) = run(Recipe.parse({**values, "data": {"folder": str(scene_folder)}}), tmp_path / "out")
    assert (result.folder / "model.safetensors").is_file()
    stage = read_run(tmp_path / "out")["stages"]["bridge"]
    assert stage["finished"]
    assert stage["samples"] == {"failure": "RuntimeError: no memory is left"}
    assert "no memory is left" in caplog.text


def trainer_of(backbone: Backbone, devices: int = 1) -> Any:  # noqa: ANN401
    """Stand for a bridge's trainer on so many devices, as far as samples look at one."""
    return SimpleNamespace(
        model=BridgeModel(backbone.model).train(),
        data_collator=DescribedBatches(BridgeCollator(backbone.processor, seed=0), row_numbers, None),
        accelerator=SimpleNamespace(num_processes=devices, unwrap_model=lambda model: model, autocast=nullcontext),
        is_fsdp_enabled=False,
        is_world_process_zero=lambda: True,
    )


@pytest.mark.parametrize(
    ("devices", "mini_batch_size", "expected"),
    [(1, None, [4, 2]), (2, None, [2, 2, 2]), (4, None, [1] * 6), (1, 2, [2, 2, 2]), (2, 8, [2, 2, 2])],
)
def test_no_more_rows_run_at_once_than_a_device_trains_on(
    tiny_backbone: Backbone, scene_rows: list[Row], devices: int, mini_batch_size: int | None, expected: list[int]
) -> None:
    section = BridgeSettings(steps=1, batch_size=4, mini_batch_size=mini_batch_size)
    parts = list(samples._batches(trainer_of(tiny_backbone, devices), section, scene_rows[:6]))
    assert [len(batch["input_ids"]) for batch, _ in parts] == [len(rows) for _, rows in parts] == expected


def test_a_model_goes_on_training_though_its_samples_fail(
    tiny_backbone: Backbone, scene_rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_backbone)
    modes = []

    def fail(batch: object) -> None:
        modes.append(trainer.model.training)
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(trainer.model, "predict", fail)
    found = stage_samples(trainer, alone(Bridge, BridgeSettings(steps=1, batch_size=4)), scene_rows[:2], [])
    assert found == {"failure": "RuntimeError: no memory is left"}
    assert modes == [False], "the premise: it failed in another mode"
    assert all(module.training for module in trainer.model.modules())


def test_rows_with_images_come_first_each_image_once_and_rows_kept_out_before_all(
    tiny_backbone: Backbone, scene_rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_run", lambda _, __, batches: {"rows": [row for _, rows in batches for row in rows]})
    stage = alone(Bridge, BridgeSettings(steps=1, batch_size=4))

    def shown(rows: list[Row], *held_out: Row) -> Any:  # noqa: ANN401
        return stage_samples(trainer_of(tiny_backbone), stage, rows, held_out)

    assert shown([TEXT] * 20) == {"held_out": False, "rows": [TEXT] * SAMPLE_ROWS}
    twice = [TEXT, *(row for row in scene_rows for _ in range(2))]
    assert shown(twice)["rows"] == scene_rows[:SAMPLE_ROWS]
    assert shown(twice, scene_rows[9]) == {"held_out": True, "rows": [scene_rows[9]]}


def test_samples_change_nothing_of_what_is_trained(
    finished: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "stage_samples", lambda *_: None)
    run(small_recipe, tmp_path / "without")
    for stage in small_recipe.stages:
        ours, theirs = (load_file(out / stage / "model.safetensors") for out in (finished, tmp_path / "without"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
