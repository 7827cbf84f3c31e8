"""MoCa's pre-training: what it masks, its loss in closed form, and a run that ends in a mean-pooled export."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from stages import moca_collator, moca_model, warmup_collator, warmup_model
from tiny_backbones import STAGE, MakeRecipe
from torch import Tensor, nn

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import UsageError
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.loading import load_model
from cocoa_embed.train import run
from cocoa_embed.train.data.rows import Draw, numbered
from cocoa_embed.train.diagnosis import diagnose
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.plan.checks import examine
from cocoa_embed.train.stages.rendering import joined, ordinary_tokens, render_items


@pytest.fixture
def interleaved(sized_rows: list[Row]) -> list[Row]:
    """Rows with images on one side or both, one of texts alone, and one with an instruction."""
    images = [image for row in sized_rows for image in row.query.images]
    return [
        *sized_rows[:2],
        Row(Item("a ring", (images[2],)), Item("small red ring", (images[4],)), source=""),
        Row(Item("blue cross"), Item("white"), source=""),
        Row(Item("red", (images[3],), "large red circle: "), Item("blue ring"), source=""),
    ]


def of_rows(batch: Batch, rows: list[Row], patches: Tensor) -> list[Tensor]:
    """Split something for each raw patch by the rows that the patches belong to."""
    counts = iter(batch["image_grid_thw"].prod(dim=1).tolist())
    return list(patches.split([sum(next(counts) for _ in joined(row).images) for row in rows]))


# Masking


def test_every_text_token_and_every_visual_token_is_masked_by_itself(
    tiny_backbone: Backbone, interleaved: list[Row]
) -> None:
    """Those of instructions and the first of a text, too; a row may have none masked, or all."""
    collator, processor = moca_collator(tiny_backbone), tiny_backbone.processor
    clean = render_items(processor, [joined(row) for row in interleaved])
    eligible = ordinary_tokens(clean, processor)
    assert eligible[3, 0], "a text starts with its first token"
    draws = [collator([(Draw(number, epoch), row) for number, row in enumerate(interleaved)]) for epoch in range(120)]
    for batch in draws[:20]:
        assert torch.equal(batch["input_ids"] == processor.tokenizer.mask_token_id, batch["masked_tokens"])
        assert torch.equal(batch["target_ids"], clean["input_ids"][batch["masked_tokens"]])
    tokens = torch.stack([batch["masked_tokens"] for batch in draws]).float().mean(dim=0)
    patches = torch.stack([batch["masked_patches"] for batch in draws]).float().mean(dim=0)
    assert not tokens[~eligible].any()
    assert abs(tokens[eligible] - 0.4).max() < 5 * math.sqrt(0.24 / 120)
    assert abs(patches - 0.5).max() < 5 * math.sqrt(0.25 / 120)
    of_a_text = torch.stack([batch["masked_tokens"][3].sum() for batch in draws])
    assert (of_a_text.min(), of_a_text.max()) == (0, eligible[3].sum())


def test_masked_patches_of_a_row_are_one_patch_of_noise_and_the_others_stay(
    tiny_backbone: Backbone, interleaved: list[Row]
) -> None:
    batch = moca_collator(tiny_backbone)(numbered(interleaved))
    clean = render_items(tiny_backbone.processor, [joined(row) for row in interleaved])["pixel_values"]
    masked, per_token = batch["masked_patches"], family_of(tiny_backbone.model.config).geometry.patches_per_token
    assert torch.equal(batch["pixel_values"][~masked], clean[~masked])
    assert torch.equal(batch["target_patches"], clean[masked])
    assert (masked.view(-1, per_token).sum(dim=1) % per_token == 0).all(), "visual tokens are masked whole"
    filled, places = (of_rows(batch, interleaved, each) for each in (batch["pixel_values"], masked))
    kinds = [pixels[place].unique(dim=0) for pixels, place in zip(filled, places, strict=True) if place.any()]
    assert [len(kind) for kind in kinds] == [1] * 4
    noise = torch.cat(kinds)
    assert torch.cdist(noise, noise).fill_diagonal_(torch.inf).min() > 1, "each row has its own"
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert len(warmup_collator(tiny_backbone)(numbered(interleaved))["pixel_values"].unique(dim=0)) > len(noise) + 1


# The loss


@torch.no_grad()
def test_a_head_and_a_decoder_that_know_nothing_cost_log_v_and_a_tenth_of_the_patches_mean_square(
    tiny_backbone: Backbone, interleaved: list[Row]
) -> None:
    batch, model = moca_collator(tiny_backbone)(numbered(interleaved)), moca_model(tiny_backbone)
    for weight in (model.backbone.get_output_embeddings().weight, *model.pixel_decoder.projection.parameters()):
        weight.zero_()
    outputs, expected = model(**batch), math.log(tiny_backbone.model.config.get_text_config().vocab_size)
    assert outputs["mlm_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert outputs["mae_loss"].item() == pytest.approx(batch["target_patches"].square().mean().item(), rel=1e-5)
    assert outputs["loss"].item() == pytest.approx(expected + 0.1 * outputs["mae_loss"].item(), rel=1e-5)


@torch.no_grad()
def test_the_loss_is_the_stock_models_at_the_masked_tokens_own_positions(
    tiny_backbone: Backbone, interleaved: list[Row]
) -> None:
    """Computed from the stock model's logits, one masked token after the other; the shifted loss is another."""
    batch, model = moca_collator(tiny_backbone)(numbered(interleaved)), moca_model(tiny_backbone)
    stock = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    log_probabilities = model.backbone(**{name: batch[name] for name in stock}).logits.log_softmax(dim=-1)
    places, targets = batch["masked_tokens"].nonzero().tolist(), batch["target_ids"].tolist()
    expected = {
        shift: -np.mean([log_probabilities[row, place - shift, target].item()
                         for (row, place), target in zip(places, targets, strict=True)])
        for shift in (0, 1)
    }  # fmt: skip
    found = model(**batch)["mlm_loss"].item()
    assert found == pytest.approx(expected[0], rel=1e-4)
    assert abs(found - expected[1]) > 0.01


@torch.no_grad()
def test_the_projection_follows_the_decoders_layer_directly(tiny_backbone: Backbone, interleaved: list[Row]) -> None:
    batch, model = moca_collator(tiny_backbone)(numbered(interleaved)), moca_model(tiny_backbone)
    kept: list[Any] = []
    model.pixel_decoder.layer.register_forward_hook(lambda _, inputs, output: kept.append(output))
    model.pixel_decoder.projection.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(**batch)
    decoded, projected = kept
    assert torch.equal(projected, decoded[batch["mm_token_type_ids"] == 1])
    assert isinstance(warmup_model(tiny_backbone).pixel_decoder.norm, nn.Module)


# A run


def test_a_run_pools_the_mean_from_its_first_stage_to_its_export(
    tiny_recipe: MakeRecipe, scene_folder: Path, scene_rows: list[Row], tmp_path: Path
) -> None:
    contrastive = {key: value for key, value in STAGE.items() if key != "mini_batch_size"}
    recipe = tiny_recipe(pooling="mean", moca=STAGE, contrastive=contrastive)
    moca, last = run(recipe, tmp_path / "run")
    assert {"loss", "mlm_loss", "mae_loss", "masked_token_accuracy"} <= moca.final.keys()
    exported = SentenceTransformer(str(export_model(last.folder, tmp_path / "model")), device="cpu")
    items = [item.load() for item in (Item(text="a red ring"), Item(images=scene_rows[0].query.images))]
    np.testing.assert_allclose(exported.encode(items), load_model(last.folder, "cpu").encode(items), atol=1e-6)
    assert [load_model(each.folder, "cpu")[1].pooling_mode for each in (moca, last)] == ["mean", "mean"]
    card = " ".join((tmp_path / "model" / "README.md").read_text().split())
    assert "the mean of the last hidden states of all tokens holds the content" in card
    assert "masked tokens (40%) are predicted at their own positions" in card
    found = diagnose(moca.folder, data=scene_folder, rows=6, device="cpu")
    assert found.masked_tokens is None, "its head does not predict through <EOS>"
    assert found.geometry != diagnose(last.folder, data=scene_folder, rows=6, device="cpu").geometry

    later = tiny_recipe(backbone=str(moca.folder), contrastive=contrastive)
    assert (later.pooling, examine(later, tmp_path / "out").recipe.pooling) == ("eos", "mean")
    with pytest.raises(UsageError, match=r"pooling=mean does not fit stage bridge, .*; set pooling=eos, or leave"):
        examine(tiny_recipe(backbone=str(moca.folder), bridge=STAGE), tmp_path / "out")
    kept = {**contrastive, "reconstruction_weight": 0.1}
    with pytest.raises(UsageError, match=r"teaches <EOS> to hold the content, but pooling=mean; set pooling=eos or"):
        examine(tiny_recipe(backbone=str(moca.folder), contrastive=kept), tmp_path / "out")
