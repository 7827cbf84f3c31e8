from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import warmup_collator
from tiny_backbones import TINY_MAX_LENGTH, LoadTiny, every_family
from torch import Tensor
from transformers import AutoModelForImageTextToText

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.attention import (
    Block,
    as_model_mask,
    assert_bidirectional,
    bidirectional_mask,
    bridge_mask,
    make_bidirectional,
    make_causal,
)
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.reconstruction import bridge_model_mask, full_model_mask, last_hidden_states
from cocoa_embed.train.stages.rendering import render_items

IMPLEMENTATIONS = ("eager", "sdpa")

SEES = {
    (Block.A, Block.A): True, (Block.A, Block.EOS): True, (Block.A, Block.B): False,
    (Block.EOS, Block.A): True, (Block.EOS, Block.EOS): True, (Block.EOS, Block.B): True,
    (Block.B, Block.A): False, (Block.B, Block.EOS): True, (Block.B, Block.B): True,
}  # fmt: skip
"""docs/method.md: (row, column) to whether the row attends to the column; B does not see an unseen <EOS>."""


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_probe_detects_a_model_that_is_causal_with_or_without_padding_only(
    load_tiny: LoadTiny, implementation: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_tiny(implementation).model
    decoder = model.get_decoder()
    forward, was_causal = decoder.forward, []

    def sometimes_causal(*, attention_mask: Tensor, **inputs: Any) -> object:
        was_causal.append(bool((attention_mask == 0).any()) == padded)
        decoder.config.is_causal = was_causal[-1]
        return forward(attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(decoder, "forward", sometimes_causal)
    with pytest.raises(CocoaError, match=f"causal {'with' if padded else 'without'} padding"):
        assert_bidirectional(model)
    assert True in was_causal
    assert (False in was_causal) == padded, "the probe tries the case without padding first"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every_family
def test_make_bidirectional_satisfies_the_probe_and_keeps_the_mode(
    tiny_backbone_path: Path, implementation: str
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_backbone_path, attn_implementation=implementation)
    for training in (True, False):
        with pytest.raises(CocoaError, match=f"'{implementation}' is causal without padding"):
            assert_bidirectional(model.train(training))
        make_bidirectional(model)
        assert all(module.training is training for module in model.modules())
        make_causal(model)
    model.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(CocoaError, match="not finite"):
        make_bidirectional(model)


@st.composite
def layouts(draw: st.DrawFn) -> Tensor:
    """Blocks of a batch, in any order, one <EOS> or more in each row."""
    length = draw(st.integers(1, 9))
    others = st.lists(st.sampled_from(list(Block)), min_size=length - 1, max_size=length - 1)
    rows = [draw(st.permutations([*draw(others), Block.EOS])) for _ in range(draw(st.integers(1, 4)))]
    return torch.tensor(rows)


@settings(max_examples=40)
@given(blocks=layouts(), eos_attends_to_b=st.booleans())
def test_the_bridge_mask_follows_the_table_in_the_method(blocks: Tensor, eos_attends_to_b: bool) -> None:
    sees = SEES | {(Block.EOS, Block.B): eos_attends_to_b}
    allowed = bridge_mask(blocks, eos_attends_to_b=eos_attends_to_b)
    assert allowed.any(dim=2).all(), "no row of the softmax is empty"
    for row, kinds in enumerate(blocks.tolist()):
        for i, attending in enumerate(kinds):
            for j, attended in enumerate(kinds):
                is_padding = Block.PAD in (attending, attended)
                pair = (Block.EOS if each == Block.UNSEEN else Block(each) for each in (attending, attended))
                expected = i == j if is_padding else sees[tuple(pair)]
                expected &= (attending, attended) != (Block.B, Block.UNSEEN)
                assert allowed[row, i, j].item() is expected, (Block(attending).name, Block(attended).name)


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every_family
def test_the_dense_mask_gives_the_models_own_result_under_padding(
    load_tiny: LoadTiny, scene_rows: list[Row], implementation: str
) -> None:
    backbone = load_tiny(implementation)
    batch = render_items(backbone.processor, [Item(text="a red ring"), Item(images=(scene_rows[0].image,))])
    assert (batch["attention_mask"] == 0).any(), "there is padding"
    dense = as_model_mask(
        bidirectional_mask(batch["attention_mask"]), attn_implementation=implementation, dtype=torch.float32
    )
    own = last_hidden_states(backbone.model, batch, batch["attention_mask"])
    ours = last_hidden_states(backbone.model, batch, dense)
    unmasked = last_hidden_states(backbone.model, batch, torch.zeros_like(dense, dtype=torch.float32))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], own[real], atol=1e-5, rtol=0)
    assert not torch.allclose(unmasked[real], own[real], atol=1e-3), "padding changes an unmasked result"


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [True, False])
def test_in_both_stages_the_last_token_changes_earlier_states_only_if_attention_is_bidirectional(
    tiny_backbone_path: Path, scene_rows: list[Row], bidirectional: bool
) -> None:
    backbone = load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, bidirectional=bidirectional)
    model, rows = backbone.model.eval(), numbered(scene_rows[:4])
    warmup = warmup_collator(backbone)(rows)
    bridge = BridgeCollator(backbone.processor, seed=0)(rows)
    for batch, mask in (
        (warmup, full_model_mask(model, warmup["attention_mask"])),
        (bridge, bridge_model_mask(model, bridge["blocks"])),
    ):
        ids, last = batch["input_ids"].clone(), batch["attention_mask"].sum(dim=1) - 1
        ids[torch.arange(len(ids)), last] = 100
        first, second = (last_hidden_states(model, each, mask) for each in (batch, {**batch, "input_ids": ids}))
        earlier = torch.arange(ids.shape[1]) < last[:, None]
        assert torch.equal(first[earlier], second[earlier]) is not bidirectional
