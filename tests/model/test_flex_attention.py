from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import warmup_collator, warmup_model
from tiny_backbones import STAGE, LoadTiny, every_family
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers.integrations import flex_attention as transformers_flex

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.attention import Block, assert_bidirectional, bidirectional_mask, bridge_mask
from cocoa_embed.model.backbone import load_backbone
from cocoa_embed.model.flex_attention import (
    FLEX,
    REGISTERED,
    TILE,
    bidirectional_block_mask,
    bridge_block_mask,
    refuse_flex_attention,
    use_flex_attention,
)
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.reconstruction import bridge_model_mask


@pytest.fixture
def flex_calls(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """Run FlexAttention uncompiled, which has gradients on the CPU too; return the masks of its calls.

    Compiled, it has no backward pass without a GPU, and raises an error before it checks whether it is compiled.
    """
    calls: list[BlockMask] = []

    def uncompiled(
        query: Tensor, key: Tensor, value: Tensor, *, training: bool, block_mask: BlockMask, **kwargs: object
    ) -> Tensor:
        calls.append(block_mask)
        return torch_flex.flex_attention(query, key, value, block_mask=block_mask, **kwargs)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    return calls


@st.composite
def long_layouts(draw: st.DrawFn) -> Tensor:
    """Draw two rows of a bridge batch, of up to four tiles, padded on either side."""
    lengths = [(draw(st.integers(0, 200)), draw(st.integers(1, 200))) for _ in range(2)]
    unseen = draw(st.sampled_from([0, 1, 7]))
    eos, width = [Block.UNSEEN] * unseen + [Block.EOS], max(map(sum, lengths)) + 1 + unseen + draw(st.integers(0, 150))
    rows = [[Block.A] * a + eos + [Block.B] * b + [Block.PAD] * (width - a - len(eos) - b) for a, b in lengths]
    return torch.tensor(rows).flip(1) if draw(st.booleans()) else torch.tensor(rows)


@settings(max_examples=15)
@given(blocks=long_layouts(), eos_attends_to_b=st.booleans())
def test_the_tiles_are_those_of_the_dense_mask(blocks: Tensor, eos_attends_to_b: bool) -> None:
    rows, length = len(blocks), -(-blocks.shape[1] // TILE) * TILE
    ours = bridge_block_mask(blocks, eos_attends_to_b=eos_attends_to_b)
    blocks = torch.nn.functional.pad(blocks, (0, length - blocks.shape[1]), value=Block.PAD)
    dense = bridge_mask(blocks, eos_attends_to_b=eos_attends_to_b)
    made = create_mask(ours.mask_mod, rows, None, length, length, device="cpu")
    assert torch.equal(made[:, 0], dense)
    theirs = create_block_mask(ours.mask_mod, rows, None, length, length, device="cpu", BLOCK_SIZE=TILE)
    assert ours.shape == theirs.shape == (rows, 1, length, length)
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_the_tiles_of_block_a_under_block_b_are_left_out() -> None:
    blocks = torch.tensor([[Block.A] * (2 * TILE - 1) + [Block.EOS] + [Block.B] * 2 * TILE])
    mask = bridge_block_mask(blocks)
    assert mask.to_dense()[0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert mask.sparsity() == pytest.approx(25.0)


def test_full_attention_in_tiles_is_the_dense_mask() -> None:
    keep = torch.tensor([[1] * 300, [1] * 129 + [0] * 171])
    mask = bidirectional_block_mask(keep)
    made = create_mask(mask.mask_mod, 2, None, 300, 300, device="cpu")
    assert torch.equal(made[:, 0], bidirectional_mask(keep))
    assert mask.full_kv_num_blocks[0].sum() == 4, "the tiles without padding need no mask"
    assert mask.to_dense()[1, 0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("eos_attends_to_b", [True, False])
@every_family
def test_every_implementation_agrees_in_logits_and_gradients(
    load_tiny: LoadTiny, scene_rows: list[Row], flex_calls: list[BlockMask], eos_attends_to_b: bool
) -> None:
    results = []
    for implementation in ("sdpa", "eager", FLEX):
        assert not flex_calls
        backbone = load_tiny(implementation)
        batch = BridgeCollator(backbone.processor, seed=0)(numbered(scene_rows[:3]))
        model = BridgeModel(backbone.model, eos_attends_to_b=eos_attends_to_b)
        logits = model.predict(batch)
        torch.nn.functional.cross_entropy(logits, batch["target_ids"]).backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((logits.detach(), gradients))
    assert len(flex_calls) == backbone.model.config.get_text_config().num_hidden_layers, "the vision encoder has sdpa"
    (logits, gradients), *others = results
    assert logits.std() > 0.1
    assert any("vis" in name for name in gradients), "the gradient reaches the pixels' side"
    for other_logits, other_gradients in others:
        torch.testing.assert_close(other_logits, logits, atol=1e-4, rtol=0)
        assert gradients.keys() == other_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_flex_runs_in_the_warmup_stage_with_its_pixel_decoder_and_under_autocast(
    load_tiny: LoadTiny, scene_rows: list[Row], flex_calls: list[BlockMask]
) -> None:
    losses = []
    for implementation in ("sdpa", FLEX):
        backbone = load_tiny(implementation)
        torch.manual_seed(0)
        model = warmup_model(backbone)
        batch = warmup_collator(backbone)(numbered(scene_rows[:3]))
        losses.append(model(**batch)["loss"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(**batch)["loss"])
    layers = backbone.model.config.get_text_config().num_hidden_layers
    assert len(flex_calls) == 2 * (layers + 1), "the pixel decoder's layer too"
    torch.testing.assert_close(losses[0], losses[2], atol=1e-4, rtol=0)
    torch.testing.assert_close(losses[1], losses[3], atol=0.05, rtol=0)


def test_batches_of_different_lengths_are_one_shape(
    load_tiny: LoadTiny, scene_rows: list[Row], flex_calls: list[BlockMask]
) -> None:
    backbone = load_tiny(FLEX)
    model, collator = BridgeModel(backbone.model), BridgeCollator(backbone.processor, seed=0)
    longer = replace(scene_rows[0], positive=Item(text="a small red ring at the top left " * 4))
    batches = [collator(numbered(rows)) for rows in (scene_rows[:2], [longer, scene_rows[1]])]
    assert len({batch["input_ids"].shape[1] for batch in batches}) == 2
    for batch in batches:
        assert len(model.predict(batch)) == len(batch["target_ids"])
    assert {mask.seq_lengths for mask in flex_calls} == {(TILE, TILE)}


def test_more_shapes_than_torch_compiles_for_end_the_run(
    load_tiny: LoadTiny, scene_rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else FlexAttention would go on unfused."""

    def refused(*args: object, **kwargs: object) -> None:
        raise torch._dynamo.exc.FailOnRecompileLimitHit

    backbone = load_tiny(FLEX)
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", refused)
    batch = BridgeCollator(backbone.processor, seed=0)(numbered(scene_rows[:2]))
    with pytest.raises(CocoaError, match=r"more shapes than torch compiles for, the last being 2 sequences .*=sdpa"):
        BridgeModel(backbone.model).predict(batch)


def test_any_other_mask_uses_sdpa(load_tiny: LoadTiny, flex_calls: list[BlockMask]) -> None:
    backbone = load_tiny(FLEX)
    assert_bidirectional(backbone.model)
    assert not flex_calls


def test_a_saved_model_is_not_switched_to_flex(load_tiny: LoadTiny, tmp_path: Path) -> None:
    model = load_tiny("sdpa").model
    blocks = torch.tensor([[Block.A, Block.EOS, Block.B]])
    assert isinstance(bridge_model_mask(model, blocks), Tensor)
    use_flex_attention(model)
    assert isinstance(bridge_model_mask(model, blocks), BlockMask)
    model.save_pretrained(tmp_path)
    assert REGISTERED not in (tmp_path / "config.json").read_text()


def test_flex_attention_is_trained_with_cuda_and_torch_2_7_only(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_flex_attention("cuda")
    with pytest.raises(UsageError, match="on 'cpu'; use sdpa"):
        refuse_flex_attention("cpu")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0"))
    with pytest.raises(UsageError, match=r"not with 2\.6\.0"):
        refuse_flex_attention("cuda")


def test_flex_attention_has_no_causal_bridge() -> None:
    values = {"name": "causal", "backbone": "x", "bidirectional": False, "bridge": STAGE}
    assert Recipe.parse(values).stages["bridge"].attention() == "sdpa"
    with pytest.raises(UsageError, match="bidirectional=false needs attn_implementation sdpa or eager"):
        Recipe.parse({**values, "attn_implementation": FLEX}).stages["bridge"].attention()


@pytest.mark.gpu
def test_flex_and_sdpa_agree_on_the_gpu(scene_rows: list[Row]) -> None:
    """Its kernel takes no heads narrower than 16."""
    results = []
    for implementation in ("sdpa", FLEX):
        backbone = load_backbone("scene-captioner", attn_implementation=implementation, max_length=256)
        model, collator = BridgeModel(backbone.model.cuda()).train(), BridgeCollator(backbone.processor, seed=0)
        for rows in (scene_rows[:3], scene_rows[3:8]):
            batch = {name: value.cuda() for name, value in collator(numbered(rows)).items()}
            model.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            gradient = model.backbone.get_decoder().layers[0].self_attn.v_proj.weight.grad.clone()
            results.append((loss.detach(), gradient))
    torch.testing.assert_close(results[:2], results[2:], atol=2e-3, rtol=1e-2)
