"""The cost model agrees with torch's FLOP counter and with the memory that the backward pass keeps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_backbones import FAMILIES, every_family
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.demo.captioner import build_tokenizer
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.adapters import prepare_trainable
from cocoa_embed.train.plan.cost import BatchShape, StepCost, batch_shape, forward_flops, model_size
from cocoa_embed.train.plan.memory import Parameters, count_parameters, stage_parameters, training_memory
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages import reconstruction
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel

LoadTiny = Callable[[str], Backbone]


@pytest.fixture(autouse=True)
def no_idle_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the vision pass of a batch without images, which the cost model does not count."""
    monkeypatch.setattr(reconstruction, "_idle_vision_pass", lambda model: torch.zeros(()))


def stage(**values: Any) -> StageSettings:
    return StageSettings.model_validate({"steps": 1, "batch_size": 1, **values})


def case(backbone: Backbone, rows: list[Row], *, images: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """A warm-up batch of images and texts, or a bridge batch of texts alone."""
    if images:
        batch = WarmupCollator(backbone.processor, backbone.geometry, seed=0)(numbered(rows))
        return WarmupModel(backbone.model, backbone.geometry).train(), batch
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
    model.backbone.base_model.visual.requires_grad_(not freeze_vision)
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


@pytest.mark.parametrize(
    ("kind", "freeze_vision"), [(None, False), (None, True), ("lora", False), ("dora", False), ("dora", True)]
)
def test_parameters_are_counted_without_weights_and_tied_ones_once(
    tiny_backbone: Backbone, kind: str | None, freeze_vision: bool
) -> None:
    model = tiny_backbone.model
    whole = sum(value.numel() for name, value in model.state_dict().items() if name != "lm_head.weight")
    vision = sum(value.numel() for value in model.base_model.visual.parameters())
    section = stage(adapter=kind and {"kind": kind, "r": 4}, freeze_vision=freeze_vision)
    counts = stage_parameters(model.config, section, lambda model: None)
    prepare_trainable(model, section)
    added = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    assert (added > 0) == (kind is not None)
    trained = added if kind else whole - vision * freeze_vision
    assert counts == count_parameters(model) == Parameters(whole + added, trained)


def kept_bytes(model: nn.Module, batch: dict[str, Tensor], *, autocast: bool = False) -> int:
    """Return the bytes that the backward pass keeps, each storage once, without the model's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("images", "autocast", "checkpointing", "tolerance"),
    [(True, False, False, 0.1), (False, False, False, 0.1), (True, True, False, 0.25), (False, False, True, 0.15)],
)
@every_family
def test_activations_are_those_that_the_backward_pass_keeps(
    load_tiny: LoadTiny, scene_rows: list[Row], images: bool, autocast: bool, checkpointing: bool, tolerance: float
) -> None:
    backbone = load_tiny("sdpa")
    model, batch = case(backbone, scene_rows[:4], images=images)
    size, shape = model_size(backbone.model.config), padded_shape(batch)
    kept = kept_bytes(model, batch, autocast=autocast)
    if checkpointing:  # each layer keeps its input, and one layer everything
        model.backbone.gradient_checkpointing_enable()
        inputs = kept_bytes(model, batch)
        assert inputs < kept / 3
        kept = inputs + (kept - inputs) // size.text.layers
    how = {"autocast": autocast, "gradient_checkpointing": checkpointing}
    estimate = training_memory(count_parameters(model), size, shape, **how)
    log_softmax = 4 * shape.masked_tokens * size.vocabulary
    assert estimate.activations + estimate.casts + log_softmax == pytest.approx(kept, rel=tolerance)


def test_sharding_divides_weights_and_optimizer_states(tiny_backbone: Backbone) -> None:
    config = tiny_backbone.model.config
    size, shape = model_size(config), BatchShape(lengths=(16, 16), masked_tokens=4)
    counts = stage_parameters(config, stage(), lambda model: None)
    alone = training_memory(counts, size, shape)
    sharded = training_memory(counts, size, shape, world_size=4)
    assert alone.weights + alone.gradients + alone.optimizer == 16 * counts.total
    assert (sharded.weights, sharded.activations) == (alone.weights // 4, alone.activations)
    assert alone.total == 16 * counts.total + alone.casts + alone.activations + alone.logits
    assert training_memory(counts, size, shape, dense_mask=False).activations < alone.activations
