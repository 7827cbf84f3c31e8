from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from stages import warmup_collator, warmup_model, warmup_settings
from tiny_backbones import TINY_MAX_LENGTH, every_family
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import Backbone, load_backbone
from cocoa_embed.model.families.registry import FAMILIES
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.adapters import add_adapter, prepare_trainable
from cocoa_embed.train.settings import AdapterSettings, StageSettings
from cocoa_embed.train.stages.rendering import render_items

LANGUAGE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LANGUAGE += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VISION = {
    "qwen2_vl": ("attn.qkv", "mlp.fc1", "mlp.fc2"),
    "qwen2_5_vl": ("attn.qkv", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3_vl": ("attn.qkv", "mlp.linear_fc1", "mlp.linear_fc2"),
    "idefics3": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1", "mlp.fc2"),
    "internvl": ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.fc1", "mlp.fc2"),
}
VISION["smolvlm"] = VISION["idefics3"]
PARTS = {
    "idefics3": ("text_model", "vision_model.encoder.layers"),
    "smolvlm": ("text_model", "vision_model.encoder.layers"),
    "internvl": ("language_model", "vision_tower.encoder.layer"),
}


def expected_targets(family: str, *, vision: bool = True, prefix: str = "model.") -> set[str]:
    language_model, blocks = PARTS.get(family, ("language_model", "visual.blocks"))
    names = {f"{prefix}{language_model}.layers.{layer}.{name}" for layer in range(3) for name in LANGUAGE}
    return names | {f"{prefix}{blocks}.{n}.{name}" for n in range(2) for name in VISION[family] if vision}


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


def backward(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    model.train()
    model.base_model(**batch).last_hidden_state[..., 0].square().mean().neg().backward()


def train(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Change the last hidden states."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for _ in range(3):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()


@every_family
@pytest.mark.parametrize("vision", [True, False])
def test_the_projections_of_layers_and_blocks_are_adapted_and_nothing_else(
    family: str, tiny_backbone: Backbone, vision: bool
) -> None:
    model = tiny_backbone.model
    add_adapter(model, AdapterSettings(), vision=vision)
    assert adapted(model) == expected_targets(family, vision=vision)
    assert type(model) is FAMILIES[family].model_class


@every_family
def test_a_stage_trains_an_adapter_of_all_parts_and_merges_it(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    model = warmup_model(tiny_backbone)
    settings = StageSettings.model_validate({"steps": 1, "batch_size": 2, "adapter": {"kind": "dora", "dropout": 0}})
    adapter = prepare_trainable(tiny_backbone.model, settings)
    assert adapter is not None
    batch = warmup_collator(tiny_backbone)(numbered(scene_rows[:2]))
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for _ in range(2):  # B is zero before the first step, and A has no gradient
        optimizer.zero_grad()
        model.train()(**batch)["loss"].backward()
        optimizer.step()
    assert all(weight.grad is not None and weight.grad.any() for weight in trained(model).values())
    assert adapter.merge(render_items(tiny_backbone.processor, [scene_rows[0].query])) < 1e-3


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


@pytest.mark.parametrize(
    ("kind", "weights", "autocast"),
    [("lora", torch.bfloat16, False), ("dora", torch.float32, True), ("dora", torch.float32, False)],
)
def test_gradients_reach_all_weights_of_the_adapter_in_float32_and_no_others(
    family: str, tiny_backbone: Backbone, batch: dict[str, Tensor], kind: str, weights: torch.dtype, autocast: bool
) -> None:
    model = tiny_backbone.model.to(weights)
    add_adapter(model, AdapterSettings(kind=kind, r=2, alpha=6, dropout=0.25))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert {(layer.scaling["default"], layer.lora_dropout["default"].p) for layer in layers} == {(3, 0.25)}
    parts = ("lora_A", "lora_B") + (("lora_magnitude_vector",) if kind == "dora" else ())
    assert len(trained(model)) == len(parts) * len(expected_targets(family))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        backward(model, batch)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == any(f".{part}." in name for part in parts)
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else weights)
        if "lora_B" in name:  # which starts at zero, so that no gradient passes it yet
            assert parameter.grad.abs().max() > 0, name


def test_the_pixel_decoder_is_trained_whole_beside_an_adapter(tiny_backbone: Backbone, scene_rows: list[Row]) -> None:
    stage = warmup_model(tiny_backbone)
    add_adapter(tiny_backbone.model, AdapterSettings())
    assert set(trained(stage.pixel_decoder)) == {name for name, _ in stage.pixel_decoder.named_parameters()}
    assert not adapted(stage.pixel_decoder)
    stage(**warmup_collator(tiny_backbone)(numbered(scene_rows[:4])))["loss"].backward()
    assert all(value.grad is not None for value in trained(stage).values())
    assert tiny_backbone.model.lm_head.weight.grad is None


@pytest.mark.parametrize(
    ("family", "kind", "has_head"),
    [
        ("qwen2_vl", "lora", True),
        ("qwen2_vl", "dora", False),
        ("qwen2_5_vl", "dora", True),
        ("qwen3_vl", "dora", True),
    ],
    indirect=["family"],
    scope="session",
)
def test_a_merged_model_is_the_stock_one_and_computes_the_same(
    family: str, tiny_backbone: Backbone, batch: dict[str, Tensor], tmp_path: Path, kind: str, has_head: bool
) -> None:
    """Of the whole model, and of the one without its head that embeds."""
    model = tiny_backbone.model if has_head else tiny_backbone.model.base_model
    untrained, stock = hidden_states(model, batch), (type(model), list(model.state_dict()), model.config.to_dict())
    adapter = add_adapter(model, AdapterSettings(kind=kind))
    assert adapted(model) == expected_targets(family, prefix="model." if has_head else "")
    torch.testing.assert_close(hidden_states(model, batch), untrained, rtol=1e-5, atol=1e-5)
    train(model, batch)
    expected = hidden_states(model, batch)
    assert (expected - untrained).abs().max() > 0.1, "the adapter has learned something"
    model.train()
    assert 0 < adapter.merge(batch) < 1e-4
    assert model.training
    assert not adapted(model)
    assert not hasattr(model, "peft_config")
    assert (type(model), list(model.state_dict()), model.config.to_dict()) == stock
    model.save_pretrained(tmp_path)
    tiny_backbone.processor.save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path), max_length=TINY_MAX_LENGTH).model
    torch.testing.assert_close(hidden_states(again, batch), expected, rtol=1e-4, atol=1e-4)
    assert_bidirectional(again)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert not any("adapter" in path.name for path in tmp_path.iterdir())
    assert "peft" not in (tmp_path / "config.json").read_text()


def lose_adapter(self: LoraModel, safe_merge: bool) -> None:
    self.unload()


def lose_weights(self: LoraModel, safe_merge: bool) -> None:
    self.unload().get_decoder().norm.weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("merge", "weight", "message"),
    [
        (lose_adapter, None, r"hidden states differ by \d\S* of .* rounding in torch\.float32 explains at most 0\.001"),
        (lose_weights, None, "hidden states differ by nan"),
        (None, float("nan"), r"cannot be merged: .* Lower learning_rate"),
        (None, float("inf"), r"cannot be merged: .* Lower learning_rate"),
    ],
)
def test_a_merge_that_changes_the_hidden_states_or_is_not_finite_is_refused(
    tiny_backbone: Backbone,
    batch: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    merge: Callable[[LoraModel, bool], None] | None,
    weight: float | None,
    message: str,
) -> None:
    learned = add_adapter(tiny_backbone.model, AdapterSettings())
    train(learned.model, batch)
    if merge is not None:
        monkeypatch.setattr(LoraModel, "merge_and_unload", merge)
    if weight is not None:
        next(iter(trained(learned.model).values())).data[0] = weight
    with pytest.raises(CocoaError, match=message):
        learned.merge(batch)


@pytest.mark.parametrize("freeze_vision", [False, True])
@pytest.mark.parametrize("values", [{}, {"adapter": {}}])
def test_a_frozen_vision_encoder_is_not_trained_and_has_no_adapter(
    tiny_backbone: Backbone, batch: dict[str, Tensor], freeze_vision: bool, values: dict[str, Any]
) -> None:
    """Without an adapter all other weights are trained; with one they are trainable again after the merge."""
    model, names = tiny_backbone.model, {name for name, _ in tiny_backbone.model.named_parameters()}
    settings = StageSettings.model_validate({"steps": 1, "batch_size": 1, "freeze_vision": freeze_vision, **values})
    adapter = prepare_trainable(model, settings)
    assert (adapter is not None) == bool(values)
    if adapter is not None:
        assert any("visual" in name for name in trained(model)) is not freeze_vision
        assert all("lora_" in name for name in trained(model))
        adapter.merge(batch)
    assert any("visual.merger" in name for name in names)
    assert set(trained(model)) == {name for name in names if not (freeze_vision and "visual" in name)}


def test_first_layers_are_frozen_and_the_others_trained(tiny_backbone: Backbone) -> None:
    model = tiny_backbone.model
    assert prepare_trainable(model, warmup_settings(freeze_layers=1)) is None
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    layers: Any = model.get_decoder().layers
    assert len(layers) > 1, "the premise"
    assert frozen == {name for name, _ in model.named_parameters() if ".language_model.layers.0." in name}
    assert prepare_trainable(tiny_backbone.model.base_model, warmup_settings(freeze_layers=0)) is None


def test_first_layers_cannot_be_frozen_with_an_adapter() -> None:
    with pytest.raises(ValueError, match="freeze_layers and adapter exclude each other"):
        warmup_settings(freeze_layers=1, adapter=AdapterSettings())
