"""``bidirectional: false`` leaves a backbone causal through every stage, for comparisons."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tiny_backbones import STAGE, TINY_MAX_LENGTH

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.model.attention import assert_bidirectional, before_or_itself
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.pipeline import run
from cocoa_embed.train.recipe import Recipe
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.bridge.model import BridgeModel
from cocoa_embed.train.stages.reconstruction import full_model_mask, last_hidden_states, position_ids
from cocoa_embed.train.stages.warmup.collator import WarmupCollator


@pytest.fixture
def causal(tiny_backbone_path: Path) -> Backbone:
    return load_backbone(str(tiny_backbone_path), max_length=TINY_MAX_LENGTH, bidirectional=False)


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_causal_mask_loses_exactly_the_later_positions(length: int, seed: int) -> None:
    allowed = torch.rand(2, length, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept = before_or_itself(allowed)
    for row in range(length):
        assert torch.equal(kept[:, row, : row + 1], allowed[:, row, : row + 1])
        assert not kept[:, row, row + 1 :].any()


def with_other_last_tokens(batch: Batch) -> Batch:
    """Replace the last token of every row."""
    ids, last = batch["input_ids"].clone(), batch["attention_mask"].sum(dim=1) - 1
    rows = torch.arange(len(ids))
    ids[rows, last] = torch.where(ids[rows, last] == 100, 101, 100)
    return {**batch, "input_ids": ids}


@torch.no_grad()
@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_the_last_token_changes_earlier_states_only_if_attention_is_bidirectional(
    causal: Backbone, tiny_backbone: Backbone, scene_rows: list[Row], stage: str
) -> None:
    for backbone, reaches in ((tiny_backbone, True), (causal, False)):
        model = backbone.model.eval()
        if stage == "bridge":
            batch = BridgeCollator(backbone.processor, seed=0)(numbered(scene_rows[:4]))
            shown = BridgeModel(model)
            first, second = (shown.predict(each) for each in (batch, with_other_last_tokens(batch)))
            last = batch["attention_mask"].sum(dim=1)[batch["masked_tokens"].nonzero()[:, 0]] - 1
            # A masked token is predicted from the position before it.
            earlier = batch["masked_tokens"].nonzero()[:, 1] - 1 < last
        else:
            batch = WarmupCollator(backbone.processor, backbone.geometry, seed=0)(numbered(scene_rows[:4]))
            mask, positions = full_model_mask(model, batch["attention_mask"]), position_ids(model, batch)
            first, second = (
                last_hidden_states(model, each, mask, positions) for each in (batch, with_other_last_tokens(batch))
            )
            steps = torch.arange(first.shape[1])
            earlier = steps[None, :] < batch["attention_mask"].sum(dim=1)[:, None] - 1
        assert earlier.any()
        assert torch.equal(first[earlier], second[earlier]) is not reaches


def test_every_stage_stays_causal_and_so_does_the_export(small_recipe: Recipe, tmp_path: Path) -> None:
    results = run(small_recipe.model_copy(update={"bidirectional": False}), tmp_path / "out")
    exported = export_model(results[-1].folder, tmp_path / "model")
    model = SentenceTransformer(str(exported), device="cpu")
    assert model.encode("a red ring").shape == (32,)
    with pytest.raises(CocoaError, match="is causal"):
        assert_bidirectional(model[0].auto_model)
    assert "made bidirectional" not in (exported / "README.md").read_text()


def test_flex_attention_has_no_causal_bridge() -> None:
    values = {"name": "causal", "backbone": "x", "bidirectional": False, "bridge": STAGE}
    assert Recipe.parse(values).stages["bridge"].attention() == "sdpa"
    with pytest.raises(UsageError, match="bidirectional=false needs attn_implementation sdpa or eager"):
        Recipe.parse({**values, "attn_implementation": "flex_attention"}).stages["bridge"].attention()
