from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_backbones import every_family
from torch import Tensor, nn

from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.rows import Item, Row, numbered
from cocoa_embed.train.loop.stage_trainer import StageContext
from cocoa_embed.train.settings import WarmupSettings
from cocoa_embed.train.stages.collators import Batch, WarmupCollator
from cocoa_embed.train.stages.losses import mae_loss, mntp_loss
from cocoa_embed.train.stages.warmup import WarmupModel, warmup_trainer

pytestmark = every_family


@pytest.fixture
def collator(tiny_backbone: Backbone) -> WarmupCollator:
    return WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)


@pytest.fixture
def model(tiny_backbone: Backbone) -> WarmupModel:
    return WarmupModel(tiny_backbone.model, tiny_backbone.geometry).eval()


@pytest.fixture
def batch(collator: WarmupCollator, scene_rows: list[Row]) -> Batch:
    return collator(numbered(scene_rows[:4]))


def parts_with_weights(model: WarmupModel) -> Iterator[tuple[str, nn.Module]]:
    yield "vision encoder", model.backbone.base_model.visual
    yield "language model", model.backbone.get_decoder()
    yield "pixel decoder", model.pixel_decoder


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_loss_is_mntp_plus_the_weighted_mae(
    tiny_backbone: Backbone, batch: Batch, weight: float, normalise: bool
) -> None:
    model = WarmupModel(
        tiny_backbone.model, tiny_backbone.geometry, mae_weight=weight, normalise_targets=normalise
    ).eval()
    outputs = model(**batch)
    logits, patches = model.predict(batch)
    assert patches is not None
    assert outputs["mntp_loss"].item() == mntp_loss(logits, batch["target_ids"]).item()
    expected = mae_loss(patches, batch["target_patches"], normalise_targets=normalise)
    assert outputs["mae_loss"].item() == expected.item()
    assert expected.item() != mae_loss(patches, batch["target_patches"], normalise_targets=not normalise).item()
    torch.testing.assert_close(outputs["loss"], outputs["mntp_loss"] + weight * outputs["mae_loss"], rtol=0, atol=0)


def test_without_images_the_loss_is_mntp_alone(model: WarmupModel, collator: WarmupCollator) -> None:
    row = Row(query=Item(text="blue cross on white"), positive=Item(text="white picture; blue cross"), source="")
    outputs = model(**collator(numbered([row])))
    assert outputs["mae_loss"].item() == 0
    assert outputs["loss"].item() == outputs["mntp_loss"].item() > 0
    outputs["loss"].backward()
    assert all(weight.grad is not None for weight in model.parameters()), "processes meet at every weight"
    vision = model.backbone.base_model.visual
    assert not any(weight.grad.any() for part in (vision, model.pixel_decoder) for weight in part.parameters())


def test_gradients_reach_every_weight_of_the_three_parts(model: WarmupModel, batch: Batch) -> None:
    model(**batch)["loss"].backward()
    for part, module in parts_with_weights(model):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{part}: {name}"
            assert parameter.grad.isfinite().all(), f"{part}: {name}"
            # A key's bias moves every score of a row alike: the softmax does not see it.
            if not name.endswith("k_proj.bias"):
                assert parameter.grad.abs().sum() > 0, f"{part}: {name}"


@pytest.mark.parametrize("loss", ["mntp_loss", "mae_loss"])
def test_each_loss_alone_trains_the_language_model_and_the_vision_encoder(
    model: WarmupModel, batch: Batch, loss: str
) -> None:
    model(**batch)[loss].backward()
    gradients = {
        part: sum(weight.grad.abs().sum().item() for weight in module.parameters() if weight.grad is not None)
        for part, module in parts_with_weights(model)
    }
    assert gradients["vision encoder"] > 0
    assert gradients["language model"] > 0
    assert (gradients["pixel decoder"] > 0) == (loss == "mae_loss")


@torch.no_grad()
def test_a_hidden_tokens_pixels_never_reach_the_model(
    model: WarmupModel, collator: WarmupCollator, tmp_path: Path
) -> None:
    side = collator.geometry.patch_size * collator.geometry.merge_size
    pixels = np.random.default_rng(0).integers(0, 256, (2 * side, 2 * side, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    row = Row(query=Item(image=path), positive=Item(text="blue cross on white"), source="")

    def batch_of(image: np.ndarray) -> Batch:
        Image.fromarray(image).save(path)
        return collator(numbered([row]))

    original = batch_of(pixels)
    hidden = original["masked_patches"].view(4, -1)[:, 0]
    assert hidden.sum() == 2
    for hidden_or_seen, is_same in ((hidden, True), (~hidden, False)):
        changed_pixels = pixels.copy()
        top, left = (side * place for place in divmod(int(hidden_or_seen.nonzero()[0]), 2))
        changed_pixels[top : top + side, left : left + side] //= 2
        changed = batch_of(changed_pixels)
        assert torch.equal(changed["target_patches"], original["target_patches"]) is not is_same
        assert torch.equal(changed["pixel_values"], original["pixel_values"]) is is_same
        before, after = model.predict(original), model.predict(changed)
        assert all(torch.equal(*pair) is is_same for pair in zip(before, after, strict=True))


@torch.no_grad()
def test_a_hidden_tokens_id_never_reaches_the_model(model: WarmupModel, collator: WarmupCollator) -> None:
    def logits_and_batch(word: str) -> tuple[Tensor, Batch]:
        row = Row(query=Item(text="blue cross on"), positive=Item(text=word), source="")
        batch = WarmupCollator(collator.processor, collator.geometry, seed=0, text_mask_ratio=1.0)(numbered([row]))
        return model.predict(batch)[0], batch

    (white, white_batch), (black, black_batch) = (logits_and_batch(word) for word in ("white", "black"))
    assert not torch.equal(white_batch["target_ids"], black_batch["target_ids"])
    assert torch.equal(white, black)


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(model: WarmupModel, batch: Batch) -> None:
    padding = batch["attention_mask"] == 0
    assert padding.any()
    sentinel = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, 100)}
    assert not torch.equal(sentinel["input_ids"], batch["input_ids"])
    for before, after in zip(model.predict(batch), model.predict(sentinel), strict=True):
        assert torch.equal(before, after)


@torch.no_grad()
def test_a_row_is_predicted_alone_as_in_a_padded_batch(model: WarmupModel, batch: Batch) -> None:
    logits, patches = model.predict(batch)
    assert patches is not None
    tokens = batch["masked_tokens"].sum(dim=1).tolist()
    grids = batch["image_grid_thw"].prod(dim=1).tolist()
    hidden_patches = batch["masked_patches"].split(grids)
    of_rows = zip(logits.split(tokens), patches.split([int(hidden.sum()) for hidden in hidden_patches]), strict=True)
    pixels = batch["pixel_values"].split(grids)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert min(lengths) < max(lengths)
    for row, expected in enumerate(of_rows):
        text = ("input_ids", "attention_mask", "mm_token_type_ids", "hidden_tokens")
        alone = {name: batch[name][row : row + 1, : lengths[row]] for name in text}
        alone["image_grid_thw"] = batch["image_grid_thw"][row : row + 1]
        alone |= {"pixel_values": pixels[row], "hidden_patches": hidden_patches[row]}
        for found, wanted in zip(model.predict(alone), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_logits_are_made_for_hidden_tokens_alone(model: WarmupModel, batch: Batch) -> None:
    shapes: list[torch.Size] = []
    head = model.backbone.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    model(**batch)
    hidden = int(batch["masked_tokens"].sum())
    assert 0 < hidden < batch["attention_mask"].sum()
    assert shapes == [(hidden, model.backbone.config.get_text_config().hidden_size)]


@torch.no_grad()
def test_a_hidden_token_is_predicted_from_the_state_before_it(model: WarmupModel, batch: Batch) -> None:
    kept: list[Tensor] = []
    head = model.backbone.get_output_embeddings()
    model.backbone.get_decoder().norm.register_forward_hook(lambda _, inputs, output: kept.append(output))
    head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(**batch)
    last_hidden_states, seen_by_head = kept
    places = batch["masked_tokens"].nonzero().tolist()
    assert len(places) > len(batch["input_ids"])
    expected = torch.stack([last_hidden_states[row, position - 1] for row, position in places])
    assert torch.equal(seen_by_head, expected)


def test_it_overfits_one_batch(model: WarmupModel, batch: Batch) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        outputs = model(**batch)
        history.append({name: value.item() for name, value in outputs.items()})
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
    first, last = history[0], history[-1]
    for name in ("loss", "mntp_loss", "mae_loss"):
        assert last[name] < first[name] / 2, (name, first[name], last[name])
    assert last["masked_token_accuracy"] > first["masked_token_accuracy"]


def test_the_trainer_is_what_its_section_says(tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path) -> None:
    section = WarmupSettings(
        steps=1,
        batch_size=2,
        text_mask_ratio=0.3,
        image_mask_ratio=0.25,
        patch_fill="zero",
        mae_weight=2.0,
        normalise_targets=True,
    )
    arguments = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "gradient_accumulation_steps": 2}
    trainer = warmup_trainer(tiny_backbone, scene_rows, section, StageContext(arguments, seed=5))
    collator, model = trainer.data_collator.collate, trainer.model
    assert (collator.seed, collator.text_mask_ratio, collator.image_mask_ratio) == (5, 0.3, 0.25)
    assert collator.patch_fill == "zero"
    assert (model.mae_weight, model.normalise_targets) == (2.0, True)
    assert len(trainer.train_dataset) == len(scene_rows)
    # Else transformers divides the loss by the micro-batches of a step; it is a mean over the step already.
    assert trainer.model_accepts_loss_kwargs is True
