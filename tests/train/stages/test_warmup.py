from pathlib import Path

import pytest
import torch
from stages import alone, warmup_collator, warmup_model, warmup_settings
from tiny_backbones import every_family

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.attention import as_model_mask, bidirectional_mask, make_causal
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.forward_inputs import with_host_inputs
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.trainer import StageContext
from cocoa_embed.train.stages.losses import mae_loss, masked_token_loss
from cocoa_embed.train.stages.warmup.stage import Warmup, WarmupCollator, WarmupModel


@pytest.fixture
def collator(tiny_backbone: Backbone) -> WarmupCollator:
    return warmup_collator(tiny_backbone)


@pytest.fixture
def model(tiny_backbone: Backbone) -> WarmupModel:
    return warmup_model(tiny_backbone)


@pytest.fixture
def batch(collator: WarmupCollator, scene_rows: list[Row]) -> Batch:
    return collator(numbered(scene_rows[:4]))


@pytest.mark.parametrize(("weight", "normalise"), [(0.0, False), (0.5, True), (3.0, False)])
def test_the_loss_is_mntp_plus_the_weighted_mae(
    tiny_backbone: Backbone, batch: Batch, weight: float, normalise: bool
) -> None:
    model = warmup_model(tiny_backbone, mae_weight=weight, normalise_targets=normalise)
    outputs = model(**batch)
    logits, patches = model.predict(batch)
    assert outputs["mntp_loss"].item() == masked_token_loss(logits, batch["target_ids"]).item()
    expected = mae_loss(patches, batch["target_patches"], normalise_targets=normalise)
    assert outputs["mae_loss"].item() == expected.item()
    assert expected.item() != mae_loss(patches, batch["target_patches"], normalise_targets=not normalise).item()
    torch.testing.assert_close(outputs["loss"], outputs["mntp_loss"] + weight * outputs["mae_loss"], rtol=0, atol=0)


def test_images_without_text_are_trained_by_their_pixels_alone(
    model: WarmupModel, collator: WarmupCollator, scene_rows: list[Row]
) -> None:
    image = Item(images=(scene_rows[0].image,))
    batch = collator(numbered([Row(query=image, positive=image, source="")]))
    assert not batch["masked_tokens"].any()
    outputs = model(**batch)
    torch.testing.assert_close(outputs["loss"], 0.5 * outputs["mae_loss"])


@every_family
@pytest.mark.parametrize("loss", ["mntp_loss", "mae_loss", "loss"])
def test_gradients_of_each_loss_reach_every_weight_that_it_depends_on(
    model: WarmupModel, batch: Batch, loss: str
) -> None:
    model(**batch)[loss].backward()
    for name, weight in model.named_parameters():
        # A key's bias moves every score of a row alike: the softmax does not see it.
        if loss == "loss" and not name.endswith("k_proj.bias"):
            assert weight.grad is not None, name
            assert 0 < weight.grad.abs().sum() < torch.inf, name
    parts = (family_of(model.backbone.config).vision(model.backbone), model.backbone.get_decoder(), model.pixel_decoder)
    trained = [any(weight.grad is not None and weight.grad.any() for weight in part.parameters()) for part in parts]
    assert trained == [True, True, loss != "mntp_loss"]


def test_the_trainer_follows_its_settings(tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path) -> None:
    settings = warmup_settings(patch_fill="zero", mae_weight=2.0)
    arguments = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "gradient_accumulation_steps": 2}
    trainer = alone(Warmup, settings, seed=5).trainer(tiny_backbone, RowTable.of(scene_rows), StageContext(arguments))
    _, collator = trainer.data_collator.collate.collate.args
    assert (collator.seed, collator.settings, trainer.model.settings) == (5, settings, settings)
    assert len(trainer.train_dataset) == len(scene_rows)
    # Else transformers divides the loss by the micro-batches of a step; it is a mean over the step already.
    assert trainer.model_accepts_loss_kwargs is True


def test_training_on_one_batch_lowers_its_loss(model: WarmupModel, batch: Batch) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    history = []
    for _ in range(20):
        history.append(model(**batch))
        optimizer.zero_grad()
        history[-1]["loss"].backward()
        optimizer.step()
    first, last = history[0], history[-1]
    assert all(last[name] < first[name] / 1.5 for name in ("loss", "mntp_loss", "mae_loss")), (first, last)
    assert last["masked_token_accuracy"] > first["masked_token_accuracy"]


# The pixel decoder


def test_the_pixel_decoder_is_a_copy_of_the_middle_layer_with_its_own_weights(
    tiny_backbone: Backbone, model: WarmupModel
) -> None:
    layers, decoder = tiny_backbone.model.get_decoder().layers, model.pixel_decoder
    copied, middle, outer = (part.state_dict() for part in (decoder.layer, layers[len(layers) // 2], layers[0]))
    assert copied.keys() == middle.keys()
    assert all(torch.equal(copied[key], middle[key]) for key in copied)
    assert any(not torch.equal(copied[key], outer[key]) for key in copied)
    theirs = {parameter.data_ptr() for parameter in tiny_backbone.model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in decoder.parameters()}


@torch.no_grad()
def test_the_pixel_decoder_predicts_every_raw_patch_in_the_order_of_pixel_values(
    tiny_backbone: Backbone, model: WarmupModel, batch: Batch
) -> None:
    config = tiny_backbone.model.config
    width, geometry = config.get_text_config().hidden_size, family_of(config).geometry
    hidden_states = torch.randn(*batch["input_ids"].shape, width, generator=torch.Generator().manual_seed(0))
    mask = as_model_mask(bidirectional_mask(batch["attention_mask"]), attn_implementation="sdpa", dtype=torch.float32)
    positions = with_host_inputs(tiny_backbone.model, batch)["position_ids"]
    visual = (batch["mm_token_type_ids"] == 1).flatten().nonzero().flatten()
    patches = model.pixel_decoder(hidden_states, visual, mask, positions)
    patches = patches.view(len(visual), geometry.patches_per_token, geometry.patch_width)
    for token, place in enumerate(visual[:20]):
        alone = model.pixel_decoder(hidden_states, place[None], mask, positions)
        torch.testing.assert_close(alone, patches[token], atol=1e-5, rtol=0)
    assert not torch.allclose(patches[0], patches[1], atol=1e-3)


@torch.no_grad()
def test_the_pixel_decoder_attends_to_the_text_after_an_image_over_a_causal_backbone_too(
    tiny_backbone: Backbone, batch: Batch
) -> None:
    make_causal(tiny_backbone.model)
    model = warmup_model(tiny_backbone)
    other = batch["input_ids"].clone()
    other[0, batch["attention_mask"][0].sum() - 1] = 100
    before, after = (model.predict({**batch, "input_ids": ids})[1] for ids in (batch["input_ids"], other))
    counts = [int(masked.sum()) for masked in batch["masked_patches"].chunk(4)]
    changed = [not torch.equal(*parts) for parts in zip(before.split(counts), after.split(counts), strict=True)]
    assert changed == [True, False, False, False]
