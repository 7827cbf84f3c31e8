"""DoRA of a tiny model computes what PEFT's does, and its norms follow the weights."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from tiny_backbones import every_family_slowly, stock_inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import AdamW
from transformers import PreTrainedModel

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train.loop.adapters import Adapter, add_adapter
from cocoa_embed.train.loop.dora import CachedDora
from cocoa_embed.train.settings import AdapterSettings
from cocoa_embed.train.stages.rendering import render_items

SETTINGS = AdapterSettings(r=2, alpha=16, dropout=0)


@pytest.fixture
def batches(tiny_backbone: Backbone, scene_rows: list[Row]) -> list[dict[str, Tensor]]:
    """Two micro-batches, one of them without an image."""
    items = [[Item(text="a red ring"), scene_rows[0].query], [Item(text="two blue squares")]]
    return [dict(render_items(tiny_backbone.processor, each)) for each in items]


def layers_of(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def stock(model: PreTrainedModel, ours: nn.Module) -> PreTrainedModel:
    """Return a copy of ``model`` with PEFT's own DoRA, which starts from the weights of our adapter."""
    model, names = copy.deepcopy(model), [name for name, part in ours.named_modules() if isinstance(part, Linear)]
    peft.LoraModel(model, peft.LoraConfig(r=2, lora_alpha=16, use_dora=True, target_modules=names), "default")
    model.load_state_dict(ours.state_dict())
    assert {type(layer.lora_variant["default"]) for layer in layers_of(model)} == {DoraLinearVariant}
    return model


def learned(model: nn.Module) -> None:
    """Give the adapter weights as if it had learned much."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=generator)


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return model.base_model(**stock_inputs(model, batch), use_cache=False).last_hidden_state[..., 0].square().mean()


@every_family_slowly
@pytest.mark.parametrize(
    ("checkpointing", "optimizer"),
    [(False, {"foreach": True}), (True, {"foreach": False}), (True, {"fused": True})],
)
def test_loss_and_gradients_are_those_of_peft_through_optimizer_steps(
    tiny_backbone: Backbone, batches: list[dict[str, Tensor]], checkpointing: bool, optimizer: dict[str, bool]
) -> None:
    """Of each of two accumulated micro-batches, in steps that change the norms."""
    ours = copy.deepcopy(tiny_backbone.model)
    add_adapter(ours, SETTINGS)
    assert {type(layer.lora_variant["default"]) for layer in layers_of(ours)} == {CachedDora}
    learned(ours)
    theirs = stock(tiny_backbone.model, ours)
    sides = [(model, AdamW(trained(model).values(), lr=1e-2, **optimizer)) for model in (ours, theirs)]
    loss_of(ours, batches[0])
    started = norms_of(ours)
    for _ in range(3):
        losses: list[list[float]] = []
        for model, _ in sides:
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            micro = [loss_of(model, batch) for batch in batches]
            sum(micro).backward()
            losses.append([loss.item() for loss in micro])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert all(each.grad.abs().max() > 0 for each in trained(ours).values())
        grads, expected = (torch.cat([each.grad.flatten() for each in trained(model).values()]) for model, _ in sides)
        assert (grads - expected).norm() < 1e-5 * expected.norm()
        for model, each in sides:
            each.step()
            model.zero_grad()
        theirs.load_state_dict(trained(ours), strict=False)  # Adam amplifies differences of gradients that are nearly 0
    ours.eval()
    loss_of(ours, batches[0])
    assert all((after / before - 1).abs().max() > 0.01 for before, after in zip(started, norms_of(ours), strict=True))


def norms_of(model: nn.Module) -> list[Tensor]:
    return [layer.lora_magnitude_vector["default"].factors.norm for layer in layers_of(model)]


def exact_norms(model: nn.Module) -> list[Tensor]:
    return [
        torch.linalg.norm(layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double(), dim=1)
        for layer in layers_of(model)
    ]


def fused_step(model: nn.Module) -> None:
    for parameter in trained(model).values():
        parameter.grad = torch.ones_like(parameter)
    versions = [parameter._version for parameter in trained(model).values()]
    AdamW(trained(model).values(), lr=1e-2, fused=True).step()
    assert versions == [parameter._version for parameter in trained(model).values()], "versions do not show this step"


def load(model: nn.Module) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in trained(model).items()}, strict=False)


@pytest.mark.parametrize("change", [fused_step, load])
def test_norms_are_computed_once_after_each_change_of_the_weights(
    tiny_backbone: Backbone, batches: list[dict[str, Tensor]], change: Callable[[nn.Module], None]
) -> None:
    """Whoever sees the new weights first: here it is a measurement in inference mode."""
    model = tiny_backbone.model
    add_adapter(model, SETTINGS)
    learned(model)
    loss_of(model, batches[0])
    before = norms_of(model)
    loss_of(model, batches[1]).backward()
    assert all(one is other for one, other in zip(before, norms_of(model), strict=True))
    change(model)
    with torch.inference_mode():
        loss_of(model, batches[0])
    for norm, old, expected in zip(norms_of(model), before, exact_norms(model), strict=True):
        assert (norm / old - 1).abs().max() > 1e-3
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    loss_of(model, batches[0]).backward()


class FixedDropout(nn.Dropout):
    """Drops every third input, in training and out of it."""

    def forward(self, input: Tensor) -> Tensor:
        return input * (torch.arange(input.shape[-1]) % 3 > 0) * 1.5


@pytest.mark.parametrize("bias", [False, True])
def test_dropout_reaches_the_low_rank_path_alone(tiny_backbone: Backbone, bias: bool) -> None:
    model = tiny_backbone.model
    add_adapter(model, SETTINGS)
    learned(model)
    attention = model.base_model.language_model.layers[0].self_attn
    layer = attention.q_proj if bias else attention.o_proj
    weight, bias_of = layer.get_base_layer().weight, layer.get_base_layer().bias
    assert (bias_of is not None) == bias
    layer.lora_dropout["default"] = FixedDropout()
    nn.init.constant_(layer.lora_magnitude_vector["default"].weight, 1.1)
    model(torch.tensor([[1]]))
    x = torch.randn(3, 5, weight.shape[1])
    dropped = FixedDropout()(x) @ layer.get_delta_weight("default").T
    factor = layer.lora_magnitude_vector["default"].weight / torch.linalg.norm(
        weight + layer.get_delta_weight("default"), dim=1
    )
    expected = factor * (x @ weight.T + dropped) + (bias_of if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    assert (dropped - x @ layer.get_delta_weight("default").T).abs().max() > 0.1


def with_both(backbone: Backbone, kind: str) -> tuple[Adapter, Adapter]:
    """Return equal adapters of a model in bfloat16 and of one in float32."""
    torch.manual_seed(1)  # from some weights, the rounding of bfloat16 alone turns the gradient
    half, whole = (
        add_adapter(copy.deepcopy(backbone.model), SETTINGS.model_copy(update={"kind": kind}), bf16=bf16)
        for bf16 in (True, False)
    )
    learned(half.model)
    whole.model.load_state_dict(trained(half.model), strict=False)
    return half, whole


@pytest.fixture(params=["lora", "dora"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


def test_a_frozen_base_in_bfloat16_trains_as_one_in_float32_under_autocast(
    tiny_backbone: Backbone, batches: list[dict[str, Tensor]], kind: str
) -> None:
    half, whole = with_both(tiny_backbone, kind)
    grads = []
    for adapter in (half, whole):
        adapter.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(adapter.model, batches[0]).backward()
        grads.append(torch.cat([each.grad.flatten() for each in trained(adapter.model).values()]))
        assert {each.dtype for each in trained(adapter.model).values()} == {torch.float32}
    frozen = {each.dtype for each in half.model.parameters() if not each.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {each.dtype for each in half.model.buffers()} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.98


def test_a_merge_adds_to_the_float32_weights_that_the_first_process_keeps(
    tiny_backbone: Backbone, batches: list[dict[str, Tensor]], kind: str
) -> None:
    half, whole = with_both(tiny_backbone, kind)
    assert not whole.exact, "a float32 model needs no second copy"
    assert half.merge(batches[0]) < 1e-4
    whole.merge(batches[0])
    merged, expected = half.model.state_dict(), whole.model.state_dict()
    assert merged.keys() == expected.keys() == tiny_backbone.model.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())
    changed = [name for name, value in tiny_backbone.model.state_dict().items() if not torch.equal(value, merged[name])]
    assert len(changed) == len(whole.layers.targeted_module_names)


@pytest.mark.slow
def test_compiled_layers_follow_the_norms_without_being_compiled_again(tiny_backbone: Backbone) -> None:
    model, tokens = tiny_backbone.model, torch.arange(8)[None] + 5
    add_adapter(model, SETTINGS)
    learned(model)
    eager = copy.deepcopy(model.base_model.language_model.layers)
    compiled = CompileCounterWithBackend("aot_eager")
    for layer in model.base_model.language_model.layers:
        layer.compile(backend=compiled, dynamic=True, fullgraph=True)
    for _ in range(2):
        loss_of(model, {"input_ids": tokens}).backward()
        graphs = compiled.frame_count
        AdamW(trained(model).values(), lr=1e-2, fused=True).step()
    found = loss_of(model, {"input_ids": tokens})
    assert compiled.frame_count == graphs > 0
    eager.load_state_dict(model.base_model.language_model.layers.state_dict())
    for new, old in zip(layers_of(eager), layers_of(model.base_model.language_model), strict=True):
        new.lora_magnitude_vector["default"].factors = old.lora_magnitude_vector["default"].factors
    model.base_model.language_model.layers = eager
    torch.testing.assert_close(loss_of(model, {"input_ids": tokens}), found)
