import pytest
import torch
from torch import Tensor

from cocoa_embed.data.rows import Row
from cocoa_embed.model.attention import as_model_mask, bidirectional_mask
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.stages.pixel_decoder import PixelDecoder
from cocoa_embed.train.stages.reconstruction import position_ids
from cocoa_embed.train.stages.warmup.collator import WarmupCollator

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def decoder(tiny_backbone: Backbone) -> PixelDecoder:
    return PixelDecoder(tiny_backbone.model, tiny_backbone.geometry).eval()


@pytest.fixture
def inputs(tiny_backbone: Backbone, scene_rows: list[Row]) -> Inputs:
    """Hidden states of two rows, their visual positions, the full mask and the positions."""
    collator = WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)
    batch = collator(numbered(scene_rows[:2]))
    width = tiny_backbone.model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(*batch["input_ids"].shape, width, generator=generator),
        batch["mm_token_type_ids"] == 1,
        as_model_mask(bidirectional_mask(batch["attention_mask"]), attn_implementation="sdpa", dtype=torch.float32),
        position_ids(tiny_backbone.model, batch),
    )


def test_it_starts_as_a_copy_of_the_middle_layer(tiny_backbone: Backbone, decoder: PixelDecoder) -> None:
    layers = tiny_backbone.model.get_decoder().layers
    middle = layers[len(layers) // 2].state_dict()
    copied = decoder.layer.state_dict()
    assert copied.keys() == middle.keys()
    assert all(torch.equal(copied[key], middle[key]) for key in copied)
    outer = layers[0].state_dict()
    assert any(not torch.equal(copied[key], outer[key]) for key in copied)


def test_it_shares_no_weight_with_the_language_model(tiny_backbone: Backbone, decoder: PixelDecoder) -> None:
    theirs = {parameter.data_ptr() for parameter in tiny_backbone.model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in decoder.parameters()}


def test_it_predicts_every_raw_patch_of_every_visual_token(
    tiny_backbone: Backbone, decoder: PixelDecoder, inputs: Inputs
) -> None:
    geometry = tiny_backbone.geometry
    visual_tokens = int(inputs[1].sum())
    assert decoder(*inputs).shape == (visual_tokens * geometry.patches_per_token, geometry.patch_width)


@torch.no_grad()
def test_patches_come_in_the_order_of_pixel_values(
    tiny_backbone: Backbone, decoder: PixelDecoder, inputs: Inputs
) -> None:
    hidden_states, visual, mask, positions = inputs
    per_token = tiny_backbone.geometry.patches_per_token
    patches = decoder(*inputs).view(2, -1, per_token, tiny_backbone.geometry.patch_width)
    assert not torch.allclose(patches[0], patches[1], atol=1e-3)

    exchanged = decoder(hidden_states.flip(0), visual.flip(0), mask.flip(0), positions.flip(1))
    torch.testing.assert_close(exchanged.view_as(patches), patches.flip(0), atol=1e-5, rtol=0)

    tokens = patches.shape[1]
    for token, position in enumerate(visual[0].nonzero().flatten().tolist()):
        one = torch.zeros_like(visual)
        one[0, position] = True
        alone = decoder(hidden_states, one, mask, positions)
        assert token < tokens
        torch.testing.assert_close(alone, patches[0, token], atol=1e-5, rtol=0)


@torch.no_grad()
def test_it_attends_to_what_comes_after(decoder: PixelDecoder, inputs: Inputs) -> None:
    hidden_states, visual, mask, positions = inputs
    last = int(visual[0].nonzero().max())
    real = int(mask[0, 0, 0].sum())
    assert last < real - 1, "a text token follows the image"
    changed = hidden_states.clone()
    changed[0, real - 1] += 5
    before, after = (decoder(states, visual, mask, positions).view(2, -1) for states in (hidden_states, changed))
    assert not torch.allclose(before[0], after[0], atol=1e-4)
    assert torch.equal(before[1], after[1])


@torch.no_grad()
def test_padding_does_not_leak_into_it(decoder: PixelDecoder, inputs: Inputs) -> None:
    hidden_states, visual, mask, positions = inputs
    padding = ~mask[:, 0, 0]
    assert padding.any()
    sentinel = hidden_states.masked_fill(padding[..., None], 1e3)
    assert torch.equal(decoder(sentinel, visual, mask, positions), decoder(*inputs))
