from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stages import alone
from tiny_backbones import every_family

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.trainer import StageContext
from cocoa_embed.train.stages.losses import mae_loss, mntp_loss
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel
from cocoa_embed.train.stages.warmup.settings import WarmupSettings
from cocoa_embed.train.stages.warmup.stage import Warmup

STAGE = {"steps": 1, "batch_size": 2}


@pytest.fixture
def collator(tiny_backbone: Backbone) -> WarmupCollator:
    return WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)


@pytest.fixture
def model(tiny_backbone: Backbone) -> WarmupModel:
    return WarmupModel(tiny_backbone.model, tiny_backbone.geometry).eval()


@pytest.fixture
def batch(collator: WarmupCollator, scene_rows: list[Row]) -> Batch:
    return collator(numbered(scene_rows[:4]))


@pytest.mark.parametrize(("weight", "normalise"), [(0.0, False), (0.5, True), (3.0, False)])
def test_the_loss_is_mntp_plus_the_weighted_mae(
    tiny_backbone: Backbone, batch: Batch, weight: float, normalise: bool
) -> None:
    settings = WarmupSettings(**STAGE, mae_weight=weight, normalise_targets=normalise)
    model = WarmupModel(tiny_backbone.model, tiny_backbone.geometry, settings).eval()
    outputs = model(**batch)
    logits, patches = model.predict(batch)
    assert outputs["mntp_loss"].item() == mntp_loss(logits, batch["target_ids"]).item()
    expected = mae_loss(patches, batch["target_patches"], normalise_targets=normalise)
    assert outputs["mae_loss"].item() == expected.item()
    assert expected.item() != mae_loss(patches, batch["target_patches"], normalise_targets=not normalise).item()
    torch.testing.assert_close(outputs["loss"], outputs["mntp_loss"] + weight * outputs["mae_loss"], rtol=0, atol=0)


def test_a_batch_of_images_without_text_trains_on_pixels_alone(model: WarmupModel, collator: WarmupCollator,
                                                               scene_rows: list[Row]) -> None:  # fmt: skip
    image = Item(image=scene_rows[0].image)
    batch = collator(numbered([Row(query=image, positive=image, source="")]))
    assert not batch["masked_tokens"].any()
    outputs = model(**batch)
    torch.testing.assert_close(outputs["loss"], 0.5 * outputs["mae_loss"])


@every_family
def test_gradients_reach_every_weight_of_the_three_parts(model: WarmupModel, batch: Batch) -> None:
    model(**batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A key's bias moves every score of a row alike: the softmax does not see it.
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().sum() > 0, name


@every_family
@pytest.mark.parametrize("loss", ["mntp_loss", "mae_loss"])
def test_each_loss_alone_trains_the_language_model_and_the_vision_encoder(
    model: WarmupModel, batch: Batch, loss: str
) -> None:
    model(**batch)[loss].backward()
    parts = (model.backbone.base_model.visual, model.backbone.get_decoder(), model.pixel_decoder)
    vision, language, decoder = (
        sum(weight.grad.abs().sum().item() for weight in part.parameters() if weight.grad is not None) for part in parts
    )
    assert (vision > 0, language > 0, decoder > 0) == (True, True, loss == "mae_loss")


@every_family
@torch.no_grad()
def test_pixels_behind_a_masked_token_never_reach_the_model(
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
    masked = original["masked_patches"].view(4, -1)[:, 0]
    assert masked.sum() == 2
    for changed_tokens, is_same in ((masked, True), (~masked, False)):
        changed_pixels = pixels.copy()
        top, left = (side * place for place in divmod(int(changed_tokens.nonzero()[0]), 2))
        changed_pixels[top : top + side, left : left + side] //= 2
        changed = batch_of(changed_pixels)
        assert torch.equal(changed["target_patches"], original["target_patches"]) is not is_same
        assert torch.equal(changed["pixel_values"], original["pixel_values"]) is is_same
        before, after = model.predict(original), model.predict(changed)
        assert all(torch.equal(*pair) is is_same for pair in zip(before, after, strict=True))


@torch.no_grad()
def test_a_masked_tokens_id_never_reaches_the_model(tiny_backbone: Backbone, model: WarmupModel) -> None:
    settings = WarmupSettings(**STAGE, text_mask_ratio=1.0)
    collator = WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, 0, settings)
    rows = [Row(query=Item(text="blue cross on"), positive=Item(text=word), source="") for word in ("white", "black")]
    white, black = (collator(numbered([row])) for row in rows)
    assert not torch.equal(white["target_ids"], black["target_ids"])
    assert torch.equal(model.predict(white)[0], model.predict(black)[0])


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
    assert all(last[name] < first[name] / 2 for name in ("loss", "mntp_loss", "mae_loss")), (first, last)
    assert last["masked_token_accuracy"] > first["masked_token_accuracy"]


def test_the_trainer_is_what_its_settings_say(tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path) -> None:
    settings = WarmupSettings(**STAGE, patch_fill="zero", mae_weight=2.0)
    arguments = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "gradient_accumulation_steps": 2}
    trainer = alone(Warmup, settings, seed=5).trainer(tiny_backbone, scene_rows, StageContext(arguments))
    collator = trainer.data_collator.collate
    assert (collator.seed, collator.settings, trainer.model.settings) == (5, settings, settings)
    assert len(trainer.train_dataset) == len(scene_rows)
    # Else transformers divides the loss by the micro-batches of a step; it is a mean over the step already.
    assert trainer.model_accepts_loss_kwargs is True
