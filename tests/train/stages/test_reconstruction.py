"""The reconstruction stages: masked content and padding never leak, and the head runs on masked tokens only."""

from typing import Any, TypeAlias

import pytest
import torch
from stages import bridge_collator, bridge_model, moca_collator, moca_model, warmup_collator, warmup_model
from tiny_backbones import every_family
from torch import Tensor

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch

Case: TypeAlias = tuple[Any, Batch]
MADE: dict[str, tuple[Any, Any]] = {
    "warmup": (warmup_model, warmup_collator),
    "moca": (moca_model, moca_collator),
    "bridge": (bridge_model, bridge_collator),
}
STAGES = pytest.mark.parametrize("stage", MADE)
TEXT = Row(query=Item(text="white picture; cross"), positive=Item(text="blue cross"), source="")


def case_of(stage: str, backbone: Backbone, rows: list[Row]) -> Case:
    """Return a stage's model, and a batch of its collator."""
    make_model, make_collator = MADE[stage]
    return make_model(backbone), make_collator(backbone)(numbered(rows))


@pytest.fixture
def case(stage: str, tiny_backbone: Backbone, scene_rows: list[Row]) -> Case:
    """A stage's model, and a padded batch of rows with images and one of texts alone."""
    model, batch = case_of(stage, tiny_backbone, [*scene_rows[:3], TEXT])
    assert not batch["attention_mask"].all()
    return model, batch


def predictions(model: Any, batch: Batch) -> list[Tensor]:  # noqa: ANN401 - a model of either stage
    found = model.predict(batch)
    return [found] if isinstance(found, Tensor) else list(found)


@every_family
@STAGES
@torch.no_grad()
def test_a_row_is_predicted_alone_as_in_a_padded_batch(case: Case) -> None:
    model, batch = case
    found, grids = predictions(model, batch), batch["image_grid_thw"].prod(dim=1).tolist()
    together = [found[0].split(batch["masked_tokens"].sum(dim=1).tolist())]
    patches = {name: batch[name].split(grids) for name in ("pixel_values", "masked_patches") if name in batch}
    if "masked_patches" in batch:
        together.append(found[1].split([int(masked.sum()) for masked in patches["masked_patches"]]))
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        of_tokens = {name: value for name, value in batch.items() if value.shape == batch["input_ids"].shape}
        alone = {name: value[row : row + 1, :length] for name, value in of_tokens.items()}
        if row < len(batch["image_grid_thw"]):
            alone |= {name: value[row] for name, value in patches.items()}
            alone["image_grid_thw"] = batch["image_grid_thw"][row : row + 1]
        elif "masked_patches" in batch:
            alone["masked_patches"] = batch["masked_patches"][:0]
        for ours, expected in zip(predictions(model, alone), together, strict=True):
            if row == len(expected):
                assert len(ours) == 0, "a text has no patches"
                continue
            torch.testing.assert_close(ours, expected[row], atol=1e-4, rtol=0)


@every_family
@STAGES
@torch.no_grad()
def test_predictions_come_from_the_state_before_each_masked_token_or_mocas_its_own_and_from_no_target(
    stage: str, case: Case
) -> None:
    model, batch = case
    without_targets = {name: value for name, value in batch.items() if not name.startswith("target_")}
    for before, after in zip(predictions(model, batch), predictions(model, without_targets), strict=True):
        assert torch.equal(before, after), "the batch holds what is masked in its targets alone"
    kept: list[Tensor] = []
    model.backbone.get_decoder().norm.register_forward_hook(lambda _, inputs, output: kept.append(output))
    model.backbone.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(**batch)
    last_hidden_states, seen_by_head = kept
    places = batch["masked_tokens"].nonzero().tolist()
    assert len(batch["input_ids"]) < len(places) < batch["attention_mask"].sum()
    before = 0 if stage == "moca" else 1
    expected = torch.stack([last_hidden_states[row, position - before] for row, position in places])
    assert torch.equal(seen_by_head, expected)


@STAGES
@pytest.mark.parametrize("images", [0, 2])
def test_rows_without_an_image_are_trained_on(
    stage: str, tiny_backbone: Backbone, scene_rows: list[Row], images: int
) -> None:
    model, batch = case_of(stage, tiny_backbone, [TEXT, TEXT, *scene_rows[:images]])
    assert ("pixel_values" in batch) is (images > 0)
    outputs = model(**batch)
    assert outputs["loss"].isfinite()
    outputs["loss"].backward()
    if images == 0:
        parts = [
            family_of(model.backbone.config).vision(model.backbone),
            *([model.pixel_decoder] if "mae_loss" in outputs else []),
        ]
        assert outputs.get("mae_loss", torch.zeros(())) == 0
        assert all(weight.grad is not None for weight in model.parameters()), "processes meet at every weight"
        assert not any(weight.grad.any() for part in parts for weight in part.parameters())
