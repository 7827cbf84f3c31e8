from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_backbones import FAMILIES, every_family
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cocoa_embed.demo.captioner import build_tokenizer
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.rows import Item, Row, numbered
from cocoa_embed.train.loop.adapters import prepare_trainable
from cocoa_embed.train.plan.cost import (
    BatchShape,
    batch_shape,
    batch_shapes,
    forward_flops,
    measure_matmul_flops,
    model_size,
    total_training_flops,
    training_flops,
)
from cocoa_embed.train.plan.memory import (
    activation_bytes,
    count_parameters,
    logit_bytes,
    stage_parameters,
    training_memory,
)
from cocoa_embed.train.settings import StageSettings
from cocoa_embed.train.stages import reconstruction
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel

LoadTiny = Callable[[str], Backbone]


@pytest.fixture(autouse=True)
def no_idle_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch without images runs for nothing is not counted; beside so small a model it would show."""
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


@pytest.mark.parametrize(("images", "freeze_vision"), [(True, False), (True, True), (False, False)])
@every_family
def test_the_operations_are_those_that_torch_counts(
    load_tiny: LoadTiny, scene_rows: list[Row], images: bool, freeze_vision: bool
) -> None:
    # Eager attention: torch counts one product more for the backward pass of its fused kernels.
    backbone = load_tiny("eager")
    model, batch = case(backbone, scene_rows[:4], images=images)
    model.backbone.base_model.visual.requires_grad_(not freeze_vision)
    size, shape = model_size(backbone.model.config), batch_shape(batch)
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch)["loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = forward.get_total_flops()
    assert forward_flops(size, shape).total == pytest.approx(counted, rel=0.02)
    step = training_flops(size, shape, freeze_vision=freeze_vision)
    assert step == pytest.approx(counted + backward.get_total_flops(), rel=0.02)


def test_frozen_weights_save_their_own_gradients_alone(load_tiny: LoadTiny, scene_rows: list[Row]) -> None:
    backbone = load_tiny("eager")
    batch = BridgeCollator(backbone.processor, seed=0)(numbered(scene_rows[:4]))
    size, shape = model_size(backbone.model.config), batch_shape(batch)
    everything = training_flops(size, shape)
    adapted = training_flops(size, shape, adapter=True, vision_adapter=True)
    assert forward_flops(size, shape).total < adapted < everything == total_training_flops(size, [shape])
    assert training_flops(size, shape, adapter=True) < adapted


@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 6), (2, 14)])
def test_windows_at_an_images_edge_are_shorter(height: int, width: int) -> None:
    model, _ = FAMILIES["qwen2_5_vl"](build_tokenizer(0))
    model.set_attn_implementation("eager")
    shape = BatchShape(rows=0, length=0, tokens=0, image_grids=((1, height, width), (1, 4, 4)))
    size = model_size(model.config)
    pixels = torch.zeros(shape.patches, size.geometry.patch_width)
    with FlopCounterMode(display=False) as counter:
        model.base_model.visual(pixels, grid_thw=torch.tensor(shape.image_grids))
    assert forward_flops(size, shape).total == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_a_batchs_shape_is_read_from_it(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    _, batch = case(tiny_backbone, scene_rows[:3], images=True)
    shape = batch_shape(batch)
    assert (shape.rows, shape.length) == tuple(batch["input_ids"].shape)
    assert shape.tokens == batch["attention_mask"].sum() < shape.positions
    assert shape.patches == len(batch["pixel_values"])
    assert shape.hidden_tokens == batch["masked_tokens"].sum()
    assert shape.hidden_patches == batch["masked_patches"].sum()
    assert batch_shapes(batch) == [shape]


def test_the_sides_of_a_contrastive_batch_have_shapes_of_their_own() -> None:
    batch = {
        "anchor_input_ids": torch.zeros(2, 5),
        "anchor_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "anchor_image_grid_thw": torch.tensor([[1, 4, 6]]),
        "positive_attention_mask": torch.ones(2, 3),
        "label": None,
    }
    assert batch_shapes(batch) == [
        BatchShape(rows=2, length=5, tokens=7, image_grids=((1, 4, 6),)),
        BatchShape(rows=2, length=3, tokens=6),
    ]


def test_a_batch_that_has_left_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="the batch is on meta"):
        batch_shape({"attention_mask": torch.ones(1, 2, device="meta")})


@pytest.mark.parametrize("freeze_vision", [True, False])
@every_family
def test_parameters_are_counted_without_weights(load_tiny: LoadTiny, freeze_vision: bool) -> None:
    model = load_tiny("sdpa").model
    model.base_model.visual.requires_grad_(not freeze_vision)
    counts = stage_parameters(model.config, stage(freeze_vision=freeze_vision))
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (counts.trainable < counts.total) == freeze_vision


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("freeze_vision", [False, True])
@every_family
def test_adapters_are_counted_as_they_are_made(load_tiny: LoadTiny, kind: str, freeze_vision: bool) -> None:
    model = load_tiny("sdpa").model
    section = stage(adapter={"kind": kind, "r": 4}, freeze_vision=freeze_vision)
    counts = stage_parameters(model.config, section)
    prepare_trainable(model, section)
    assert counts == count_parameters(model)
    assert 0 < counts.trainable < counts.total


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Return the bytes that the backward pass of ``run`` needs, each storage once, without the model's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("images", [True, False])
@every_family
def test_activations_are_those_that_the_backward_pass_needs(
    load_tiny: LoadTiny, scene_rows: list[Row], images: bool
) -> None:
    backbone = load_tiny("sdpa")
    model, batch = case(backbone, scene_rows[:4], images=images)
    size, shape = model_size(backbone.model.config), batch_shape(batch)
    log_softmax = logit_bytes(size, shape, autocast=False) // 3
    kept = kept_bytes(model, lambda: model(**batch)["loss"])
    assert activation_bytes(size, shape, autocast=False) + log_softmax == pytest.approx(kept, rel=0.1)


@every_family
def test_activations_under_autocast_stand_beside_casts_of_the_weights(
    load_tiny: LoadTiny, scene_rows: list[Row]
) -> None:
    backbone = load_tiny("sdpa")
    model, batch = case(backbone, scene_rows[:4], images=True)
    size, shape = model_size(backbone.model.config), batch_shape(batch)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch)["loss"]

    log_softmax = logit_bytes(size, shape) * 4 // 10
    casts = 2 * sum(parameter.numel() for parameter in model.parameters())
    estimate = activation_bytes(size, shape) + log_softmax + casts
    assert estimate == pytest.approx(kept_bytes(model, run), rel=0.25)


@every_family
def test_checkpoints_keep_each_layers_input_and_one_layer(load_tiny: LoadTiny, scene_rows: list[Row]) -> None:
    backbone = load_tiny("sdpa")
    model, batch = case(backbone, scene_rows[:4], images=False)
    size, shape = model_size(backbone.model.config), batch_shape(batch)
    everything = kept_bytes(model, lambda: model(**batch)["loss"])
    model.backbone.gradient_checkpointing_enable()
    inputs = kept_bytes(model, lambda: model(**batch)["loss"])
    assert inputs < everything / 3
    peak = inputs + (everything - inputs) / size.text.layers
    log_softmax = logit_bytes(size, shape, autocast=False) // 3
    estimate = activation_bytes(size, shape, autocast=False, gradient_checkpointing=True) + log_softmax
    assert estimate == pytest.approx(peak, rel=0.15)


def test_memory_is_the_sum_of_its_parts_and_is_sharded(tiny_backbone: Backbone) -> None:
    config = tiny_backbone.model.config
    size, shape = model_size(config), BatchShape(rows=2, length=16, tokens=32, hidden_tokens=4)
    counts = stage_parameters(config, stage())
    alone = training_memory(counts, size, shape)
    shared = training_memory(counts, size, shape, world_size=4)
    assert alone.weights + alone.gradients + alone.optimizer == 16 * counts.total
    assert shared.weights == alone.weights // 4
    assert shared.activations == alone.activations
    assert alone.total == 16 * counts.total + alone.casts + alone.activations + alone.logits
    frozen = training_memory(stage_parameters(config, stage(freeze_vision=True)), size, shape, freeze_vision=True)
    assert frozen.gradients < alone.gradients
    assert training_memory(counts, size, shape, dense_mask=False).activations < alone.activations


def test_the_yardstick_is_a_speed() -> None:
    assert measure_matmul_flops(torch.device("cpu"), torch.float32, repeats=2) > 1e8
