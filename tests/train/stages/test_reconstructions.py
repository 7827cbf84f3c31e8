import numpy as np
import pytest
import torch
from PIL import Image

from cocoa_embed.model.attention import Block, bridge_mask, make_causal
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.rows import Item, Row, numbered
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.reconstruction import bridge_model_mask
from cocoa_embed.train.stages.reconstructions import bridge_reconstructions, patches_to_image, warmup_reconstructions
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("size", [(56, 56), (112, 56), (56, 84)])
def test_patches_put_together_are_the_image(tiny_backbone: Backbone, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    prepared = tiny_backbone.processor.image_processor(images=[Image.fromarray(noise)], return_tensors="pt")
    grid = prepared["image_grid_thw"][0]
    image = patches_to_image(prepared["pixel_values"], grid, tiny_backbone.geometry, tiny_backbone.processor)
    side = tiny_backbone.geometry.patch_size
    assert image.size == (int(grid[2]) * side, int(grid[1]) * side) == size, "the premise: nothing was resized"
    assert np.array_equal(pixels(image), noise)


def test_the_warm_ups_pictures_differ_where_patches_were_hidden_and_nowhere_else(
    tiny_backbone: Backbone, scene_rows: list[Row]
) -> None:
    rows = scene_rows[:3]
    collator = WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)
    model = WarmupModel(tiny_backbone.model, tiny_backbone.geometry)
    patches, _ = warmup_reconstructions(model, collator, rows)
    hidden_patches = collator(numbered(rows))["masked_patches"].split(16)
    side = tiny_backbone.geometry.patch_size
    for row, shown, hidden in zip(rows, patches, hidden_patches, strict=True):
        assert row.image is not None
        original = pixels(shown.original)
        assert np.array_equal(original, pixels(Image.open(row.image).convert("RGB")))
        assert shown.caption == row.positive.text
        covered = int(hidden.sum()) * side**2
        assert 0 < covered < original[..., 0].size
        for other in (shown.masked, shown.reconstructed):
            assert 0 < (pixels(other) != original).any(axis=-1).sum() <= covered
        assert not np.array_equal(pixels(shown.masked), pixels(shown.reconstructed))


def test_words_that_were_not_hidden_stand_as_they_were(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    rows = scene_rows[:4]
    warmup = WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)
    bridge = BridgeCollator(tiny_backbone.processor, mask_ratio=0.5, seed=0)
    _, from_warmup = warmup_reconstructions(WarmupModel(tiny_backbone.model, tiny_backbone.geometry), warmup, rows)
    from_bridge, _ = bridge_reconstructions(BridgeModel(tiny_backbone.model), bridge, rows)
    tokenizer = tiny_backbone.processor.tokenizer
    for shown, row in zip([*from_warmup, *from_bridge], [*rows, *rows], strict=True):
        assert tokenizer.convert_tokens_to_string(shown.tokens) == row.positive.text
        assert 0 < sum(shown.hidden) < len(shown.hidden)
        kept = [index for index, hidden in enumerate(shown.hidden) if not hidden]
        assert [shown.predicted[index] for index in kept] == [shown.tokens[index] for index in kept]
    assert [shown.stage for shown in from_bridge] == ["bridge"] * 4


def test_the_pictured_mask_is_the_one_that_was_trained_with(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    collator = BridgeCollator(tiny_backbone.processor, mask_ratio=0.5, seed=0)
    for eos_attends_to_b in (True, False):
        model = BridgeModel(tiny_backbone.model, eos_attends_to_b=eos_attends_to_b)
        _, mask = bridge_reconstructions(model, collator, scene_rows[:2])
        length = len(mask.labels)
        ids = {"A": Block.A, "EOS": Block.EOS, "B": Block.B}
        blocks = torch.tensor([[ids[name] for name in mask.blocks]])
        expected = bridge_mask(blocks, eos_attends_to_b=eos_attends_to_b)[0, :length, :length]
        assert np.array_equal(mask.allowed, expected.numpy())
        assert set(mask.blocks) == {"A", "EOS", "B"}


def test_so_is_that_of_a_model_that_was_left_causal(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    make_causal(tiny_backbone.model)
    collator = BridgeCollator(tiny_backbone.processor, mask_ratio=0.5, seed=0)
    _, mask = bridge_reconstructions(BridgeModel(tiny_backbone.model), collator, scene_rows[:2])
    used = bridge_model_mask(tiny_backbone.model, collator(numbered(scene_rows[:2]))["blocks"])
    assert isinstance(used, torch.Tensor)
    assert used.dtype == torch.bool, "the premise: sdpa's, who attends to whom"
    length = len(mask.labels)
    assert np.array_equal(mask.allowed, used[0, 0, :length, :length].numpy())
    assert not np.triu(mask.allowed, 1).any()


def test_rows_without_an_image_have_words_and_no_pictures(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    text = Row(query=Item(text="blue cross on white"), positive=Item(text="white picture; blue cross"), source="")
    warmup = WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)
    bridge = BridgeCollator(tiny_backbone.processor, mask_ratio=0.5, seed=0)
    models = WarmupModel(tiny_backbone.model, tiny_backbone.geometry), BridgeModel(tiny_backbone.model)
    for rows, pictured in (([text], [False]), ([text, scene_rows[0], text], [False, True, False])):
        patches, words = warmup_reconstructions(models[0], warmup, rows)
        through_eos, _ = bridge_reconstructions(models[1], bridge, rows)
        assert len(patches) == sum(pictured)
        for shown in (words, through_eos):
            assert [each.image is not None for each in shown] == pictured
    assert patches[0].caption == scene_rows[0].positive.text
    assert words[1].image is not None
    assert np.array_equal(pixels(words[1].image), pixels(patches[0].original))


def test_a_prediction_that_the_tokenizer_does_not_have_is_an_empty_word(
    tiny_backbone: Backbone, scene_rows: list[Row]
) -> None:
    beyond = len(tiny_backbone.processor.tokenizer)

    class Beyond(BridgeModel):
        """Has a head that is wider than the tokenizer, as those of Qwen are."""

        def predict(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            logits = super().predict(batch)
            return torch.nn.functional.one_hot(torch.full(logits.shape[:1], beyond)).float()

    collator = BridgeCollator(tiny_backbone.processor, mask_ratio=0.5, seed=0)
    (shown,), _ = bridge_reconstructions(Beyond(tiny_backbone.model), collator, scene_rows[:1])
    assert {word for word, hidden in zip(shown.predicted, shown.hidden, strict=True) if hidden} == {""}
