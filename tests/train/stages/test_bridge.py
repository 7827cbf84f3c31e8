from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import PROMPTS, write_checkpoint
from stages import alone, bridge_collator, bridge_model
from tiny_backbones import every_family
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations import flex_attention as transformers_flex

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.attention import Block
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.model.flex_attention import FLEX, uses_flex_attention
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.trainer import StageContext
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.bridge.probe import bridge_probe, without_images
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge
from cocoa_embed.train.stages.losses import masked_token_loss

Change = Callable[[Batch], Batch]

UNUSUAL_TOKEN = 100
"""An ordinary token's id, neither padding nor special."""


@pytest.fixture
def batch(tiny_backbone: Backbone, scene_rows: list[Row]) -> Batch:
    """Rows with an image and an instruction in block A, one with texts alone; of different lengths."""
    pictured = [
        Row(query=Item(text="find it: ", images=(row.image,)), positive=row.positive, source="")
        for row in scene_rows[:3]
    ]
    text = Row(query=Item(text="white picture; blue cross"), positive=Item(text="blue cross on white"), source="")
    batch = bridge_collator(tiny_backbone)(numbered([*pictured, text]))
    assert (batch["blocks"] == Block.PAD).any()
    return batch


@pytest.fixture
def model(tiny_backbone: Backbone) -> BridgeModel:
    return bridge_model(tiny_backbone)


def another_image(batch: Batch) -> Batch:
    """Give each image the place of the next; all are of one size."""
    assert len(batch["image_grid_thw"].unique(dim=0)) == 1
    images = batch["pixel_values"].unflatten(0, (len(batch["image_grid_thw"]), -1))
    return {**batch, "pixel_values": images.roll(1, dims=0).flatten(0, 1)}


def another_text(batch: Batch) -> Batch:
    """Exchange the ordinary tokens of block A for others; block B and every position stay."""
    input_ids = batch["input_ids"]
    is_text = (batch["blocks"] == Block.A) & (batch["mm_token_type_ids"] == 0) & (input_ids > 20)
    changed = torch.where(is_text, UNUSUAL_TOKEN + (input_ids * 7) % 200, input_ids)
    return {**batch, "input_ids": changed}


CHANGES = [another_image, another_text]


@contextmanager
def eos_states(model: BridgeModel, batch: Batch, held: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Record what the ``<EOS>`` positions hold before each layer and before the last norm; or hold them at ``held``."""
    eos = batch["blocks"] == Block.EOS
    recorded: list[Tensor] = []

    def before(depth: int, _: nn.Module, inputs: tuple[Tensor, ...], others: dict[str, Any]) -> tuple[Any, Any]:
        hidden_states, *rest = inputs
        if held is not None:
            hidden_states = hidden_states.clone()
            hidden_states[eos] = held[depth]
        recorded.append(hidden_states[eos].clone())
        return (hidden_states, *rest), others

    decoder = model.backbone.get_decoder()
    handles = [
        module.register_forward_pre_hook(partial(before, depth), with_kwargs=True)
        for depth, module in enumerate([*decoder.layers, decoder.norm])
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def block_b_logits(model: BridgeModel, batch: Batch) -> Tensor:
    """Return the logits that predict each token of block B, masked or not."""
    return model.predict(predicting(batch, batch["blocks"] == Block.B))


def predicting(batch: Batch, tokens: Tensor) -> Batch:
    """Let a batch, without targets, predict these tokens, bool ``[B, L]``."""
    return {**{name: value for name, value in batch.items() if name != "target_ids"}, "masked_tokens": tokens}


@every_family
@torch.no_grad()
@pytest.mark.parametrize("eos_attends_to_b", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("change", CHANGES)
def test_block_a_reaches_block_b_only_through_eos(
    load_tiny: Callable[[str], Backbone], batch: Batch, change: Change, implementation: str, eos_attends_to_b: bool
) -> None:
    model = bridge_model(load_tiny(implementation), eos_attends_to_b=eos_attends_to_b)
    changed = change(batch)
    in_b = batch["blocks"] == Block.B
    assert torch.equal(changed["input_ids"][in_b], batch["input_ids"][in_b])
    assert not all(torch.equal(changed[key], batch[key]) for key in ("input_ids", "pixel_values"))

    with eos_states(model, batch) as reference:
        original_logits = block_b_logits(model, batch)
    with eos_states(model, batch) as free:
        changed_logits = block_b_logits(model, changed)
    with eos_states(model, batch, held=reference) as fixed:
        held_logits = block_b_logits(model, changed)

    assert len(reference) == len(model.backbone.get_decoder().layers) + 1
    assert not torch.allclose(free[-1], reference[-1], atol=1e-3)
    assert all(torch.equal(*pair) for pair in zip(fixed, reference, strict=True))
    assert not torch.allclose(changed_logits, original_logits, atol=1e-3), "through <EOS>, block A does reach B"
    assert torch.equal(held_logits, original_logits)


@every_family
@torch.no_grad()
@pytest.mark.parametrize("eos_attends_to_b", [True, False])
def test_block_b_reaches_block_a_only_through_eos_and_only_if_eos_attends_to_it(
    tiny_backbone: Backbone, batch: Batch, eos_attends_to_b: bool
) -> None:
    model, blocks = bridge_model(tiny_backbone, eos_attends_to_b=eos_attends_to_b), batch["blocks"]
    original = predicting(batch, (blocks == Block.A).index_fill(1, torch.tensor([0]), False))
    changed = {**original, "input_ids": batch["input_ids"].masked_fill(blocks == Block.B, UNUSUAL_TOKEN)}
    with eos_states(model, batch) as reference:
        original_logits = model.predict(original)
    with eos_states(model, batch) as free:
        assert torch.equal(model.predict(changed), original_logits) is not eos_attends_to_b
    assert torch.equal(free[-1], reference[-1]) is not eos_attends_to_b
    with eos_states(model, batch, held=reference):
        assert torch.equal(model.predict(changed), original_logits)


def uncompiled_flex(
    query: Tensor, key: Tensor, value: Tensor, *, training: bool, block_mask: BlockMask, **kwargs: object
) -> Tensor:
    """Run FlexAttention without its compiler, which takes a minute: it reads the same mask."""
    found: Tensor = torch_flex.flex_attention(query, key, value, block_mask=block_mask, **kwargs)
    return found


@every_family
@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", FLEX])
def test_without_the_image_no_pixel_reaches_block_b_and_everything_else_does(
    load_tiny: Callable[[str], Backbone], batch: Batch, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", uncompiled_flex)
    model = bridge_model(load_tiny(implementation))
    assert uses_flex_attention(model.backbone) is (implementation == FLEX)
    has_image = (batch["mm_token_type_ids"] == 1).any(dim=1)
    assert set(has_image.tolist()) == {True, False}
    pictured = has_image.repeat_interleave((batch["blocks"] == Block.B).sum(dim=1))
    cut = without_images(batch)
    original_logits, cut_logits = block_b_logits(model, batch), block_b_logits(model, cut)
    changed_logits = block_b_logits(model, another_image(batch))

    assert not torch.allclose(changed_logits[pictured], original_logits[pictured], atol=1e-3)
    assert not torch.allclose(cut_logits[pictured], original_logits[pictured], atol=1e-3)
    assert torch.equal(block_b_logits(model, another_image(cut)), cut_logits)
    assert torch.equal(cut_logits[~pictured], original_logits[~pictured]), "a row of texts stays as it is"
    instructed = block_b_logits(model, another_text(cut))
    assert not torch.allclose(instructed[pictured], cut_logits[pictured], atol=1e-3), "the text of A is still seen"


@every_family
def test_the_loss_is_mntp_over_block_bs_masked_tokens(model: BridgeModel, batch: Batch) -> None:
    outputs = model(**batch)
    logits = model.predict(batch)
    assert logits.shape[0] == len(batch["target_ids"]) == batch["masked_tokens"].sum()
    assert not batch["masked_tokens"][batch["blocks"] != Block.B].any()
    assert outputs["loss"].item() == masked_token_loss(logits, batch["target_ids"]).item()
    right = logits.argmax(dim=1) == batch["target_ids"]
    assert outputs["masked_token_accuracy"].item() == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize(("probe_rows", "held_out"), [(0, 0), (4, 4), (12, 12), (13, 0)])
def test_the_trainer_follows_its_settings(
    tiny_backbone: Backbone,
    scene_rows: list[Row],
    tmp_path: Path,
    probe_rows: int,
    held_out: int,
) -> None:
    settings = BridgeSettings(steps=1, batch_size=2, mask_ratio=0.4, eos_attends_to_b=False, probe_rows=probe_rows)
    arguments = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "gradient_accumulation_steps": 2}
    stage, rows = alone(Bridge, settings, seed=5), RowTable.of(scene_rows)
    trainer = stage.trainer(tiny_backbone, rows, StageContext(arguments))
    _, collator = trainer.data_collator.collate.collate.args
    assert (collator.seed, collator.mask_ratio, trainer.model.eos_attends_to_b) == (5, 0.4, False)
    assert list(trainer.train_dataset.rows) == scene_rows[held_out:]
    assert (trainer.probe is not None) is (held_out > 0)
    assert any("lower bridge.probe_rows" in warning for warning in stage.row_warnings(rows)) is (probe_rows > held_out)
    # Else transformers divides the loss by the micro-batches of a step; it is a mean over the step already.
    assert trainer.model_accepts_loss_kwargs is True


@pytest.mark.parametrize("prompts", [PROMPTS, {}])
def test_items_are_embedded_as_by_the_exported_model(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path, prompts: dict[str, str]
) -> None:
    """Under the bridge's weights, but not under its mask."""
    queries = [Item(images=(scene_rows[0].image,)), Item(text="find it: ", images=(scene_rows[1].image,))]
    rows = [Row(query=item, positive=row.positive, source="") for item, row in zip(queries, scene_rows, strict=False)]
    model, found = bridge_model(tiny_backbone).train(), []
    model.register_forward_hook(lambda _, inputs, outputs: found.append(outputs.get("embeddings")))
    bridge_probe(bridge_collator(tiny_backbone), rows, prompts=prompts, batch_size=2)(model)

    exported = build_sentence_transformer(write_checkpoint(tiny_backbone, tmp_path / "bridge"), prompts=prompts)
    expected = [
        exported.encode_query([item.load() for item in queries]),
        exported.encode_document([{"text": row.positive.text} for row in rows]),
    ]
    for ours, theirs in zip(found[-2:], expected, strict=True):
        assert abs(theirs[0] - theirs[1]).max() > 1e-2
        torch.testing.assert_close(ours.cpu(), torch.from_numpy(theirs), atol=1e-4, rtol=0)
