from pathlib import Path

import pytest
import torch
from tiny_backbones import TINY_MAX_LENGTH, every_qwen
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cocoa_embed.model import vision_attention
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.vision_attention import REGISTERED, pack_vision_attention, packed_attention

GRIDS = torch.tensor([[1, 8, 8], [1, 6, 10], [1, 8, 8], [1, 2, 2]])
"""Images of three sizes; windows of 4 x 4 patches cut them into sequences of three lengths, too."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that sdpa is called with."""
    shapes: list[tuple[int, ...]] = []

    def counted(module: torch.nn.Module, query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        shapes.append(tuple(query.shape))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setattr(vision_attention, "sdpa_attention_forward", counted)
    return shapes


def features_and_gradients(backbone: Backbone) -> tuple[Tensor, list[Tensor]]:
    visual = backbone.model.base_model.visual
    geometry = family_of(backbone.model.config).geometry
    pixels = torch.randn(int(GRIDS.prod(1).sum()), geometry.patch_width, generator=torch.Generator().manual_seed(0))
    family = family_of(backbone.model.config)
    outputs = family.run_vision(backbone.model, {**family.image_inputs(GRIDS), "pixel_values": pixels}).features
    (outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).sum().backward()
    return outputs.detach(), [weight.grad for weight in visual.parameters() if weight.grad is not None]


@every_qwen
def test_sequences_of_one_length_run_together_and_give_what_the_stock_class_gives(
    tiny_backbone_path: Path, calls: list[tuple[int, ...]], family: str
) -> None:
    stock = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, attn_implementation="eager")
    stock.model.base_model.visual.config._attn_implementation = "sdpa"
    expected, expected_gradients = features_and_gradients(stock)
    assert not calls, "the stock class calls its own function"
    packed = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH)
    found, gradients = features_and_gradients(packed)
    assert torch.equal(found, expected)
    assert len(gradients) == len(expected_gradients) > 0
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    by_length = [(2, 64), (1, 60), (1, 4)]  # sequences, patches in each
    in_first_layer = [(10, 16), (3, 8), (2, 4)] if family == "qwen2_5_vl" else by_length
    assert [(shape[0], shape[2]) for shape in calls] == in_first_layer + by_length


@every_qwen
def test_a_saved_model_and_copies_of_its_config_have_stock_attention(tiny_backbone: Backbone, tmp_path: Path) -> None:
    pack_vision_attention(tiny_backbone.model)
    model = tiny_backbone.model
    assert {block.attn.config._attn_implementation for block in model.base_model.visual.blocks} == {REGISTERED}
    model.save_pretrained(tmp_path)
    assert REGISTERED not in (tmp_path / "config.json").read_text()
    again = type(model)(model.config)
    assert {block.attn.config._attn_implementation for block in again.base_model.visual.blocks} == {"sdpa"}


def test_attention_without_packed_sequences_is_sdpa(calls: list[tuple[int, ...]]) -> None:
    query, key, value = torch.randn(3, 2, 4, 10, 8)
    mask = torch.rand(2, 1, 10, 10) > 0.2
    found, _ = packed_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3, cu_seqlens=None)
    assert calls == [(2, 4, 10, 8)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.gpu
def test_the_kernel_agrees_with_sdpa() -> None:
    lengths = [64, 60, 64, 4]
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    query, key, value = torch.randn(3, 1, 4, sum(lengths), 16, device="cuda", dtype=torch.bfloat16)
    given = {"cu_seq_lens_q": boundaries.cuda(), "max_length_q": 64, "scaling": 16**-0.5}
    assert vision_attention._kernel(query) is not None
    found, _ = packed_attention(torch.nn.Module(), query, key, value, None, **given)
    full, _ = packed_attention(torch.nn.Module(), query.float(), key.float(), value.float(), None, **given)
    torch.testing.assert_close(found.float(), full, atol=2e-2, rtol=2e-2)
