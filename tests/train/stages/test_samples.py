from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stages import alone, bridge_collator, bridge_model, warmup_collator, warmup_model, warmup_settings

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.images.load import load_image
from cocoa_embed.model.attention import Block, make_causal
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.training_record import read_run
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import DescribedBatches
from cocoa_embed.train.stages import samples
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge
from cocoa_embed.train.stages.reconstruction import bridge_model_mask
from cocoa_embed.train.stages.samples import SAMPLE_ROWS, sample_batches, stage_samples, token_texts
from cocoa_embed.train.stages.warmup.stage import Warmup

TEXT = Row(query=Item(text="blue cross on white"), positive=Item(text="white picture; blue cross"), source="")
BRIDGE = alone(Bridge, BridgeSettings(steps=1, batch_size=4))


def pixels(image: Image.Image | str) -> np.ndarray:
    """Return the pixels of an image or of a data URI of one."""
    return np.asarray(load_image(image)).astype(int)


@torch.no_grad()
def warmup_of(backbone: Backbone, rows: list[Row]) -> dict[str, Any]:
    batch = warmup_collator(backbone)(numbered(rows))
    return alone(Warmup, warmup_settings()).samples(warmup_model(backbone), backbone.processor, batch, rows)


@torch.no_grad()
def bridge_of(backbone: Backbone, rows: list[Row], model: BridgeModel | None = None) -> dict[str, Any]:
    batch = bridge_collator(backbone, mask_ratio=0.5)(numbered(rows))
    return BRIDGE.samples(model or bridge_model(backbone), backbone.processor, batch, rows)


def test_the_warm_ups_images_differ_only_in_masked_patches(tiny_backbone: Backbone, sized_rows: list[Row]) -> None:
    rows = sized_rows[:4]
    batch = warmup_collator(tiny_backbone)(numbered(rows))
    masked_patches = batch["masked_patches"].split(batch["image_grid_thw"].prod(dim=1).tolist())
    for row, shown, masked in zip(rows, warmup_of(tiny_backbone, rows)["patches"], masked_patches, strict=True):
        assert isinstance(row.image, Path)
        original = pixels(shown["original"])
        assert np.array_equal(original, np.asarray(load_image(row.image))), "nothing was resized"
        assert shown["caption"] == row.positive.text
        covered = int(masked.sum()) * family_of(tiny_backbone.model.config).geometry.patch_size ** 2
        assert 0 < covered < original[..., 0].size
        for other in ("masked", "reconstructed"):
            assert 0 < (pixels(shown[other]) != original).any(axis=-1).sum() <= covered
        assert shown["masked"] != shown["reconstructed"]


@pytest.mark.parametrize("pictured", [[False], [False, True, False]])
def test_tokens_that_are_not_masked_are_shown_as_they_are_with_the_image_if_any(
    tiny_backbone: Backbone, scene_rows: list[Row], pictured: list[bool]
) -> None:
    rows = [scene_rows[0] if has_image else TEXT for has_image in pictured]
    warmup, bridge = warmup_of(tiny_backbone, rows), bridge_of(tiny_backbone, rows)
    assert [each["caption"] for each in warmup["patches"]] == [scene_rows[0].positive.text] * sum(pictured)
    for found in (warmup["tokens"], bridge["tokens"]):
        assert [each["image"] is not None for each in found] == pictured
        for shown, row in zip(found, rows, strict=True):
            text = tiny_backbone.processor.tokenizer.convert_tokens_to_string(shown["tokens"])
            assert text.endswith(str(row.positive.text))
            assert 0 < sum(shown["masked"]) < len(shown["masked"])
            kept = [index for index, masked in enumerate(shown["masked"]) if not masked]
            assert [shown["predicted"][index] for index in kept] == [shown["tokens"][index] for index in kept]


@pytest.mark.parametrize(("causal", "eos_attends_to_b"), [(False, True), (False, False), (True, True)])
def test_the_shown_mask_is_the_one_that_is_trained_with(
    tiny_backbone: Backbone, scene_rows: list[Row], causal: bool, eos_attends_to_b: bool
) -> None:
    if causal:
        make_causal(tiny_backbone.model)
    batch = bridge_collator(tiny_backbone, mask_ratio=0.5)(numbered(scene_rows[:2]))
    used = bridge_model_mask(tiny_backbone.model, batch["blocks"], eos_attends_to_b=eos_attends_to_b)
    assert isinstance(used, torch.Tensor)
    assert used.dtype == torch.bool, "the premise: sdpa's mask says who attends to whom"
    model = bridge_model(tiny_backbone, eos_attends_to_b=eos_attends_to_b)
    mask = bridge_of(tiny_backbone, scene_rows[:2], model)["mask"]
    length = len(mask["labels"])
    assert [[int(cell) for cell in row] for row in mask["allowed"]] == used[0, 0, :length, :length].int().tolist()
    assert [Block[name] for name in mask["blocks"]] == batch["blocks"][0, :length].tolist()


def test_a_predicted_id_that_the_tokenizer_lacks_is_an_empty_token(
    tiny_backbone: Backbone, scene_rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen's heads are wider than its tokenizer."""
    model, beyond = bridge_model(tiny_backbone), len(tiny_backbone.processor.tokenizer)
    monkeypatch.setattr(model, "predict", lambda batch: torch.eye(beyond + 1)[[beyond] * len(batch["target_ids"])])
    (shown,) = bridge_of(tiny_backbone, scene_rows[:1], model)["tokens"]
    assert {word for word, masked in zip(shown["predicted"], shown["masked"], strict=True) if masked} == {""}


# In a run


def test_both_reconstruction_stages_leave_samples_of_held_out_rows_if_any(finished: Path) -> None:
    stages = read_run(finished)["stages"]
    warmup, bridge = stages["warmup"]["samples"], stages["bridge"]["samples"]
    assert (warmup["held_out"], bridge["held_out"]) == (False, True)
    assert len(warmup["patches"]) == len(warmup["tokens"]) == SAMPLE_ROWS
    assert len(bridge["tokens"]) == 4
    assert bridge["mask"]["blocks"][0] == "A"
    assert stages["contrastive"]["samples"] is None


def trainer_of(backbone: Backbone, devices: int = 1) -> Any:  # noqa: ANN401
    """Return what samples need of a bridge's trainer on so many devices."""
    return SimpleNamespace(
        model=bridge_model(backbone),
        data_collator=DescribedBatches(bridge_collator(backbone)),
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
    settings = BridgeSettings(steps=1, batch_size=4, mini_batch_size=mini_batch_size)
    parts = sample_batches(trainer_of(tiny_backbone, devices), settings, scene_rows[:6])
    assert [len(batch["input_ids"]) for batch, _ in parts] == [len(rows) for _, rows in parts] == expected


def test_tokens_are_shown_as_text_and_partial_characters_as_spelt(tiny_backbone: Backbone) -> None:
    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=["Ġred", "red", "Ċ", "Ã¤", "Ã", "<|image_pad|>", None].__getitem__,
        convert_tokens_to_string=tiny_backbone.processor.tokenizer.convert_tokens_to_string,
    )
    found = token_texts(slice(None), SimpleNamespace(tokenizer=tokenizer))
    assert found == [" red", "red", "\n", "ä", "Ã", "<|image_pad|>", ""]


def test_samples_that_cannot_be_made_say_why_and_raise_nothing(
    tiny_backbone: Backbone, scene_rows: list[Row], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(batch: object) -> None:
        raise RuntimeError("no memory\nis left")

    trainer = trainer_of(tiny_backbone)
    monkeypatch.setattr(trainer.model, "predict", fail)
    found = stage_samples(trainer, BRIDGE, tiny_backbone.processor, RowTable.of(scene_rows[:2]), np.arange(0))
    assert found == {"failure": "RuntimeError: no memory is left"}
    assert "no memory is left" in caplog.text


def test_held_out_rows_are_shown_or_else_the_first_of_each_image(
    tiny_backbone: Backbone, scene_rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_run", lambda *given: {"rows": [row for _, rows in given[-1] for row in rows]})

    def shown(rows: list[Row], *held_out: int) -> Any:  # noqa: ANN401
        table, places = RowTable.of(rows), np.array(held_out, dtype=np.int64)
        return stage_samples(trainer_of(tiny_backbone), BRIDGE, tiny_backbone.processor, table, places)

    assert shown([TEXT] * 20) == {"held_out": False, "rows": [TEXT] * SAMPLE_ROWS}
    twice = [TEXT, *(row for row in scene_rows for _ in range(2))]
    assert shown(twice)["rows"] == scene_rows[:SAMPLE_ROWS]
    assert shown(twice, 9, 1) == {"held_out": True, "rows": [twice[9], twice[1]]}
