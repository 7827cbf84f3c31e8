"""What both reconstruction stages keep to: masked content and padding never leak, and the head runs where it must."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_backbones import every_family
from torch import Tensor, nn

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.reconstruction import position_ids
from cocoa_embed.train.stages.rendering import joined, render_items
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel

STAGES = pytest.mark.parametrize("stage", ["warmup", "bridge"])


@pytest.fixture
def case(stage: str, tiny_backbone: Backbone, scene_rows: list[Row]) -> tuple[Any, Batch]:
    """A stage's model, and a padded batch of rows with images and one of texts alone."""
    rows = [*scene_rows[:3], Row(query=Item(text="white picture; cross"), positive=Item(text="blue cross"), source="")]
    model: nn.Module
    if stage == "warmup":
        model = WarmupModel(tiny_backbone.model, tiny_backbone.geometry)
        batch = WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)(numbered(rows))
    else:
        model, batch = BridgeModel(tiny_backbone.model), BridgeCollator(tiny_backbone.processor, seed=0)(numbered(rows))
    assert not batch["attention_mask"].all()
    return model.eval(), batch


def predictions(model: Any, batch: Batch) -> list[Tensor]:  # noqa: ANN401 - a model of either stage
    found = model.predict(batch)
    return [found] if isinstance(found, Tensor) else list(found)


@every_family
@STAGES
@torch.no_grad()
def test_what_is_in_the_padding_changes_nothing(case: tuple[Any, Batch]) -> None:
    model, batch = case
    sentinel = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 100)}
    for before, after in zip(predictions(model, batch), predictions(model, sentinel), strict=True):
        assert torch.equal(before, after)


@every_family
@STAGES
@torch.no_grad()
def test_a_row_is_predicted_alone_as_in_a_padded_batch(case: tuple[Any, Batch]) -> None:
    model, batch = case
    tokens = batch["masked_tokens"].sum(dim=1).tolist()
    grids = batch["image_grid_thw"].prod(dim=1).tolist()
    together = [predictions(model, batch)[0].split(tokens)]
    if "masked_patches" in batch:
        masked_patches = batch["masked_patches"].split(grids)
        counts = [int(masked.sum()) for masked in masked_patches]
        together.append(predictions(model, batch)[1].split(counts))
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    for row in range(3):
        sequence = {name: value[row : row + 1, : lengths[row]] for name, value in batch.items() if value.dim() == 2
                    and value.shape == batch["input_ids"].shape}  # fmt: skip
        alone = {**sequence, "image_grid_thw": batch["image_grid_thw"][row : row + 1]}
        alone["pixel_values"] = batch["pixel_values"].split(grids)[row]
        if "masked_patches" in batch:
            alone["masked_patches"] = masked_patches[row]
        for found, expected in zip(predictions(model, alone), together, strict=True):
            torch.testing.assert_close(found, expected[row], atol=1e-4, rtol=0)


@every_family
@STAGES
@torch.no_grad()
def test_the_head_runs_on_the_state_before_each_masked_token_and_nowhere_else(case: tuple[Any, Batch]) -> None:
    model, batch = case
    kept: list[Tensor] = []
    model.backbone.get_decoder().norm.register_forward_hook(lambda _, inputs, output: kept.append(output))
    model.backbone.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(**batch)
    last_hidden_states, seen_by_head = kept
    places = batch["masked_tokens"].nonzero().tolist()
    assert len(batch["input_ids"]) < len(places) < batch["attention_mask"].sum()
    expected = torch.stack([last_hidden_states[row, position - 1] for row, position in places])
    assert torch.equal(seen_by_head, expected)


@STAGES
@pytest.mark.parametrize("text_only", [False, True])
def test_rows_without_an_image_are_trained_on(
    case: tuple[Any, Batch], tiny_backbone: Backbone, scene_rows: list[Row], text_only: bool
) -> None:
    model, _ = case
    collators: dict[type, Callable[..., Batch]] = {
        WarmupModel: WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0),
        BridgeModel: BridgeCollator(tiny_backbone.processor, seed=0),
    }
    texts = [Row(query=Item(text=f"{n} blue cross"), positive=Item(text="a ring"), source="") for n in range(2)]
    batch = collators[type(model)](numbered([*texts, *([] if text_only else scene_rows[:2])]))
    assert ("pixel_values" in batch) is not text_only
    outputs = model(**batch)
    assert outputs["loss"].isfinite()
    outputs["loss"].backward()
    if text_only:
        parts = [model.backbone.base_model.visual, *([model.pixel_decoder] if "mae_loss" in outputs else [])]
        assert outputs.get("mae_loss", torch.zeros(())) == 0
        assert all(weight.grad is not None for weight in model.parameters()), "processes meet at every weight"
        assert not any(weight.grad.any() for part in parts for weight in part.parameters())


def test_positions_of_a_text_are_the_same_with_and_without_images_beside_it(
    tiny_backbone: Backbone, scene_rows: list[Row]
) -> None:
    text, with_image = Item(text="a blue cross on white"), joined(scene_rows[0])
    alone = position_ids(tiny_backbone.model, render_items(tiny_backbone.processor, [text]))
    beside = position_ids(tiny_backbone.model, render_items(tiny_backbone.processor, [text, with_image]))
    assert beside.shape[2] > alone.shape[2]
    assert torch.equal(alone[:, 0], beside[:, 0, : alone.shape[2]])


def test_positions_of_an_image_are_its_rows_and_columns(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    batch = render_items(tiny_backbone.processor, [Item(image=scene_rows[0].image)])
    side = int(batch["image_grid_thw"][0, 1]) // 2
    positions = position_ids(tiny_backbone.model, batch)[:, 0, 1 : 1 + side**2].tolist()
    rows_and_columns = [[1 + n // side for n in range(side**2)], [1 + n % side for n in range(side**2)]]
    assert positions == [[1] * side**2, *rows_and_columns]
