from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported import PROMPTS, write_checkpoint
from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_backbones import TINY_MAX_LENGTH, every_family
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import SUPPORTED, Backbone, load_backbone
from cocoa_embed.model.export import build_sentence_transformer
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.adapters import Adapter, add_adapter, prepare_trainable
from cocoa_embed.train.settings import AdapterSettings, StageSettings
from cocoa_embed.train.stages.rendering import render_items
from cocoa_embed.train.stages.warmup.collator import WarmupCollator
from cocoa_embed.train.stages.warmup.model import WarmupModel

LANGUAGE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LANGUAGE += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VISION = {
    "qwen2_vl": ("attn.qkv", "mlp.fc1", "mlp.fc2"),
    "qwen2_5_vl": ("attn.qkv", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3_vl": ("attn.qkv", "mlp.linear_fc1", "mlp.linear_fc2"),
}
KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])


def expected_targets(family: str, *, vision: bool, prefix: str = "model.") -> set[str]:
    names = {f"{prefix}language_model.layers.{layer}.{name}" for layer in range(3) for name in LANGUAGE}
    if vision:
        names |= {f"{prefix}visual.blocks.{block}.{name}" for block in range(2) for name in VISION[family]}
    return names


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def batch(tiny_backbone: Backbone, scene_rows: list[Row]) -> dict[str, Tensor]:
    items = [Item(text="a red ring"), scene_rows[0].query, Item(text="what is here?", images=(scene_rows[1].image,))]
    return dict(render_items(tiny_backbone.processor, items))


@torch.no_grad()
def hidden_states(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    return model.base_model(**batch).last_hidden_state


def train(model: PreTrainedModel, batch: dict[str, Tensor], *, steps: int = 3) -> None:
    """Change the last hidden states."""
    model.train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for _ in range(steps):
        model.base_model(**batch).last_hidden_state[..., 0].square().mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


# Targets


@every_family
@pytest.mark.parametrize("vision", [True, False])
def test_the_projections_of_layers_and_blocks_are_adapted_and_nothing_else(
    family: str, tiny_backbone: Backbone, vision: bool
) -> None:
    model = tiny_backbone.model
    add_adapter(model, AdapterSettings(), vision=vision)
    assert adapted(model) == expected_targets(family, vision=vision)
    assert type(model) is SUPPORTED[family]


def test_a_model_without_projections_is_refused(tiny_backbone: Backbone) -> None:
    model = tiny_backbone.model
    for block in model.base_model.visual.blocks:
        block.attn, block.mlp = nn.Sequential(nn.Linear(2, 2)), nn.Identity()
    with pytest.raises(CocoaError, match=r"Qwen2VLForConditionalGeneration: the vision encoder's blocks .* but 0\."):
        add_adapter(model, AdapterSettings())
    assert not adapted(model)
    model.base_model.language_model.layers = nn.ModuleList()
    with pytest.raises(CocoaError, match=r"the language model's layers have no linear layer .* but none at all"):
        add_adapter(model, AdapterSettings(), vision=False)


def test_the_settings_set_rank_scale_dropout_and_kind(tiny_backbone: Backbone) -> None:
    add_adapter(tiny_backbone.model, AdapterSettings(kind="lora", r=4, alpha=12, dropout=0.25))
    for layer in (module for module in tiny_backbone.model.modules() if isinstance(module, BaseTunerLayer)):
        assert layer.lora_A["default"].out_features == layer.lora_B["default"].in_features == 4
        assert layer.scaling["default"] == 3
        assert layer.lora_dropout["default"].p == 0.25
        assert not layer.lora_magnitude_vector


# Training


@KINDS
def test_all_weights_of_the_adapter_and_no_others_are_trained_in_float32(
    family: str, tiny_backbone: Backbone, batch: dict[str, Tensor], kind: str
) -> None:
    model = tiny_backbone.model.to(torch.bfloat16)
    add_adapter(model, AdapterSettings(kind=kind, r=2))
    found = trained(model)
    parts = ("lora_A", "lora_B") + (("lora_magnitude_vector",) if kind == "dora" else ())
    assert len(found) == len(parts) * len(expected_targets(family, vision=True))
    assert all(any(f".{part}." in name for part in parts) for name in found)
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}
    assert model.dtype == torch.bfloat16
    train(model, batch, steps=1)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_adapter(
    tiny_backbone: Backbone, batch: dict[str, Tensor], kind: str, dtype: torch.dtype
) -> None:
    model = tiny_backbone.model
    add_adapter(model, AdapterSettings(kind=kind, dropout=0.0))
    model.train()
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        loss = model.base_model(**batch).last_hidden_state[..., 0].square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if "lora_B" in name:  # which starts at zero, so that no gradient passes it yet
            assert parameter.grad.abs().max() > 0, name


def test_the_pixel_decoder_is_trained_whole_beside_an_adapter(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    stage = WarmupModel(tiny_backbone.model, tiny_backbone.geometry)
    add_adapter(tiny_backbone.model, AdapterSettings())
    assert set(trained(stage.pixel_decoder)) == {name for name, _ in stage.pixel_decoder.named_parameters()}
    assert not adapted(stage.pixel_decoder)
    collator = WarmupCollator(tiny_backbone.processor, tiny_backbone.geometry, seed=0)
    stage(**collator(numbered(scene_rows[:4])))["loss"].backward()
    assert all(value.grad is not None for value in trained(stage).values())
    assert tiny_backbone.model.lm_head.weight.grad is None


# The merge


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen2_vl", "lora"), ("qwen2_vl", "dora"), ("qwen2_5_vl", "dora"), ("qwen3_vl", "dora")],
    indirect=["family"],
    scope="session",
)
def test_a_merged_model_is_the_stock_one_and_computes_the_same(
    family: str, tiny_backbone: Backbone, batch: dict[str, Tensor], tmp_path: Path, kind: str
) -> None:
    model = tiny_backbone.model
    untrained, keys, config = hidden_states(model, batch), list(model.state_dict()), model.config.to_dict()
    adapter = add_adapter(model, AdapterSettings(kind=kind))
    torch.testing.assert_close(hidden_states(model, batch), untrained, rtol=1e-5, atol=1e-5)
    train(model, batch)
    expected = hidden_states(model, batch)
    assert (expected - untrained).abs().max() > 0.1, "the adapter has learned something"
    model.train()
    assert 0 < adapter.merge(batch) < 1e-4
    assert model.training
    assert not adapted(model)
    assert not hasattr(model, "peft_config")
    assert (type(model), list(model.state_dict()), model.config.to_dict()) == (SUPPORTED[family], keys, config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(hidden_states(model, batch), expected, rtol=1e-4, atol=1e-4)
    tiny_backbone.save(tmp_path / "stage")
    again = load_backbone(str(tmp_path / "stage"), max_length=TINY_MAX_LENGTH).model
    torch.testing.assert_close(hidden_states(again, batch), expected, rtol=1e-4, atol=1e-4)
    assert_bidirectional(again)
    assert not any("adapter" in path.name for path in (tmp_path / "stage").iterdir())
    assert "peft" not in (tmp_path / "stage" / "config.json").read_text()


def test_a_model_without_its_head_is_adapted_and_merged_too(
    family: str, tiny_backbone: Backbone, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tiny_backbone, tmp_path / "bridge")
    embedder = build_sentence_transformer(checkpoint, prompts=PROMPTS).to("cpu")
    model = embedder[0].auto_model
    stock, keys = type(model), list(model.state_dict())
    adapter = add_adapter(model, AdapterSettings())
    assert adapted(model) == expected_targets(family, vision=True, prefix="")
    train(model, batch)
    expected = hidden_states(model, batch)
    adapter.merge(batch)
    assert (type(embedder[0].auto_model), list(model.state_dict())) == (stock, keys)
    embedder.save(str(tmp_path / "merged"), create_model_card=False)
    again = load_backbone(str(tmp_path / "merged")).model
    torch.testing.assert_close(hidden_states(again, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def learned(tiny_backbone: Backbone, batch: dict[str, Tensor]) -> Adapter:
    adapter = add_adapter(tiny_backbone.model, AdapterSettings())
    train(tiny_backbone.model, batch)
    return adapter


def lose_adapter(self: LoraModel, safe_merge: bool) -> None:
    self.unload()


def lose_weights(self: LoraModel, safe_merge: bool) -> None:
    self.unload().get_decoder().norm.weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (lose_adapter, r"hidden states by \d\.\d+ of .* explains 0\.001 in torch\.float32"),
        (lose_weights, "hidden states by nan"),
    ],
)
def test_a_merge_that_changes_the_hidden_states_is_refused(
    learned: Adapter,
    batch: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    merge: Callable[[LoraModel, bool], None],
    message: str,
) -> None:
    monkeypatch.setattr(LoraModel, "merge_and_unload", merge)
    with pytest.raises(CocoaError, match=message):
        learned.merge(batch)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_merged_weight_that_is_not_finite_is_refused(
    learned: Adapter, batch: dict[str, Tensor], broken: float
) -> None:
    with torch.no_grad():
        next(iter(trained(learned.model).values()))[0] = broken
    with pytest.raises(CocoaError, match=r"cannot be merged: .* Lower learning_rate"):
        learned.merge(batch)


# The settings of a stage


def prepared(model: PreTrainedModel, **values: object) -> Adapter | None:
    return prepare_trainable(model, StageSettings.model_validate({"steps": 1, "batch_size": 1, **values}))


def test_without_an_adapter_the_weights_are_trained_but_those_of_a_frozen_vision_encoder(
    tiny_backbone: Backbone,
) -> None:
    model = tiny_backbone.model
    names = {name for name, _ in model.named_parameters()}
    assert prepared(model) is None
    assert set(trained(model)) == names
    assert prepared(model, freeze_vision=True) is None
    assert set(trained(model)) == {name for name in names if "visual" not in name}
    assert any("visual.merger" in name for name in names)


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_a_frozen_vision_encoder_has_no_adapter_and_stays_frozen_after_the_merge(
    tiny_backbone: Backbone, batch: dict[str, Tensor], freeze_vision: bool
) -> None:
    model = tiny_backbone.model
    names = {name for name, _ in model.named_parameters()}
    adapter = prepared(model, adapter={}, freeze_vision=freeze_vision)
    assert adapter is not None
    assert any("visual" in name for name in trained(model)) is not freeze_vision
    assert all("lora_" in name for name in trained(model))
    adapter.merge(batch)
    assert set(trained(model)) == {name for name in names if not (freeze_vision and "visual" in name)}
