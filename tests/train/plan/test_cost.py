"""The FLOPs of a batch agree with torch's counter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from stages import warmup_collator, warmup_model
from tiny_backbones import FAMILIES, LoadTiny, every_family
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.demo.pretrain.tokenizer import build_tokenizer
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.plan.cost import BatchShape, StepCost, batch_shape, forward_flops, model_size
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages import reconstruction
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel


@pytest.fixture(autouse=True)
def no_idle_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the vision pass of a batch without images, which the cost model does not count."""
    monkeypatch.setattr(reconstruction, "_idle_vision_pass", lambda model: torch.zeros(()))


def stage(**values: Any) -> StageSettings:
    return StageSettings.model_validate({"steps": 1, "batch_size": 1, **values})


def case(backbone: Backbone, rows: list[Row], *, images: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """A warm-up batch of images and texts, or a bridge batch of texts alone."""
    if images:
        return warmup_model(backbone).train(), warmup_collator(backbone)(numbered(rows))
    texts = [replace(row, query=Item(text=row.positive.text)) for row in rows]
    batch = BridgeCollator(backbone.processor, seed=0)(numbered(texts))
    assert "pixel_values" not in batch
    return BridgeModel(backbone.model).train(), batch


def padded_shape(batch: dict[str, Tensor]) -> BatchShape:
    rows, length = batch["input_ids"].shape
    return replace(batch_shape(batch), lengths=(length,) * rows)


@pytest.mark.parametrize(("images", "freeze_vision"), [(True, False), (True, True), (False, False)])
@every_family
def test_flops_agree_with_torchs_counter(
    load_tiny: LoadTiny, scene_rows: list[Row], images: bool, freeze_vision: bool
) -> None:
    # Eager attention: torch counts one product more for the backward pass of its fused kernels.
    backbone = load_tiny("eager")
    model, batch = case(backbone, scene_rows[:4], images=images)
    family_of(backbone.model.config).vision(backbone.model).requires_grad_(not freeze_vision)
    size, shape = model_size(backbone.model.config), padded_shape(batch)
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch)["loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = forward.get_total_flops()
    assert sum(forward_flops(size, shape)) == pytest.approx(counted, rel=0.02)
    step = StepCost(size, freeze_vision=freeze_vision).of_shape(shape)
    assert step == pytest.approx(counted + backward.get_total_flops(), rel=0.02)


def test_frozen_weights_save_their_own_gradients(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    shape = batch_shape(BridgeCollator(tiny_backbone.processor, seed=0)(numbered(scene_rows[:4])))
    config = tiny_backbone.model.config
    sections = (stage(adapter={}, freeze_vision=True), stage(adapter={}), stage())
    text_adapted, adapted, everything = (StepCost.of(config, section).of_shape(shape) for section in sections)
    assert sum(forward_flops(model_size(config), shape)) < text_adapted < adapted < everything


@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 6), (2, 14)])
def test_attention_windows_at_an_images_edge_are_smaller(height: int, width: int) -> None:
    model, _ = FAMILIES["qwen2_5_vl"](build_tokenizer(0))
    model.set_attn_implementation("eager")
    shape = BatchShape(lengths=(), image_grids=((1, height, width), (1, 4, 4)))
    size = model_size(model.config)
    pixels = torch.zeros(shape.patches, size.geometry.patch_width)
    with FlopCounterMode(display=False) as counter:
        model.base_model.visual(pixels, grid_thw=torch.tensor(shape.image_grids))
    assert sum(forward_flops(size, shape)) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_a_batch_costs_the_sum_of_its_columns_without_padding(tiny_backbone: Backbone) -> None:
    batch = {
        "anchor_input_ids": torch.zeros(2, 5),
        "anchor_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "anchor_image_grid_thw": torch.tensor([[1, 4, 6]]),
        "positive_attention_mask": torch.ones(2, 3, dtype=torch.int64),
        "label": None,
    }
    cost = StepCost(model_size(tiny_backbone.model.config))
    anchor, positive = BatchShape((5, 2), image_grids=((1, 4, 6),)), BatchShape((3, 3))
    assert cost(batch) == cost.of_shape(anchor) + cost.of_shape(positive)
