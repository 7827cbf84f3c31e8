"""No pass of a stage reads a value from its device: here its tensors have none, and reading one is an error."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from stages import (
    bridge_collator,
    bridge_model,
    contrastive_model,
    moca_collator,
    moca_model,
    warmup_collator,
    warmup_model,
)
from tiny_backbones import FAMILIES, every_family, stock_inputs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model import forward_inputs
from cocoa_embed.model.backbone import Backbone, prepare_processor
from cocoa_embed.model.forward_inputs import HostInputs
from cocoa_embed.model.host_tensor import HostTensor
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.stages.contrastive.inputs import keep_on_host, preprocess_items
from cocoa_embed.train.stages.contrastive.loss import contrastive_loss
from cocoa_embed.train.stages.contrastive.mini_batches import TokenLimits
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings

READS = (DataDependentOutputException, DynamicOutputShapeException)
RECONSTRUCTION = pytest.mark.parametrize(
    ("make_model", "make_collator"),
    [(warmup_model, warmup_collator), (moca_model, moca_collator), (bridge_model, bridge_collator)],
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """A device whose tensors have no values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(forward_inputs, "_on", lambda tensor, _: without_values(tensor, mode))
    return mode


def without_values(tensor: Tensor, device: FakeTensorMode) -> Tensor:
    return device.from_tensor(tensor.on(torch.device("cpu")) if isinstance(tensor, HostTensor) else tensor)


def send(batch: Mapping[str, Any], device: FakeTensorMode) -> dict[str, Any]:
    """Send to the device what moves there."""
    return {
        name: value if isinstance(value, HostTensor | int | str) else without_values(value, device)
        for name, value in batch.items()
    }


def move(model: nn.Module, device: FakeTensorMode) -> None:
    for module in model.train().modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(without_values(weight.detach(), device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, without_values(buffer, device))


@pytest.fixture
def rows(scene_rows: list[Row]) -> list[Row]:
    """Three rows with images of one size, and a shorter one of texts."""
    return [*scene_rows[:3], Row(query=Item(text="white"), positive=Item(text="blue cross"), source="")]


@every_family
@RECONSTRUCTION
@pytest.mark.parametrize("with_images", [True, False])
def test_a_pass_of_a_reconstruction_stage_reads_nothing(
    tiny_backbone: Backbone,
    rows: list[Row],
    device: FakeTensorMode,
    make_model: Callable[[Backbone], nn.Module],
    make_collator: Callable[[Backbone], Callable[..., Batch]],
    with_images: bool,
) -> None:
    model, collate = make_model(tiny_backbone), make_collator(tiny_backbone)
    batch = collate(numbered(rows if with_images else rows[-1:] * 2))
    prepared = send(HostInputs(tiny_backbone.model.config)(batch), device)
    move(model, device)
    model(**prepared)["loss"].backward()
    assert all(weight.grad is not None for weight in model.parameters())
    if with_images:
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
        stock = stock_inputs(model.backbone, {name: batch[name] for name in names})
        with pytest.raises(READS):
            model.backbone.base_model(**{name: without_values(value, device) for name, value in stock.items()})


def test_a_pass_of_the_bridge_with_several_eos_tokens_reads_nothing(
    tiny_backbone: Backbone, rows: list[Row], device: FakeTensorMode
) -> None:
    prepare_processor(tiny_backbone.processor, vectors=3)
    model = bridge_model(tiny_backbone)
    batch = send(HostInputs(tiny_backbone.model.config)(bridge_collator(tiny_backbone)(numbered(rows))), device)
    move(model, device)
    outputs = model(**batch)
    assert "eos_similarity_loss" in outputs
    outputs["loss"].backward()


@pytest.mark.parametrize(
    ("family", "limit", "run"),
    [
        *((family, 60, {}) for family in FAMILIES if family not in ("smolvlm", "internvl")),
        ("qwen2_vl", 10_000, {}),
        ("qwen2_vl", 60, {"pooling": "mean"}),
        ("qwen2_vl", 60, {"eos_tokens": 3}),
    ],
    indirect=["family"],
    scope="session",
)
def test_a_pass_of_the_contrastive_stage_reads_nothing_though_it_cuts_batches(
    tiny_backbone: Backbone, rows: list[Row], device: FakeTensorMode, limit: int, run: dict[str, Any]
) -> None:
    settings, count = ContrastiveSettings(steps=1, batch_size=4), run.get("eos_tokens", 1)
    prepare_processor(tiny_backbone.processor, vectors=count)
    model = contrastive_model(tiny_backbone, **run)
    columns = [
        preprocess_items(model, items) for items in zip(*((row.query, row.positive) for row in rows), strict=True)
    ]
    move(model, device)
    loss = contrastive_loss(model, settings, TokenLimits(limit, limit), eos_tokens=count)
    labels = without_values(torch.arange(8).view(4, 2), device)
    loss([send(keep_on_host(column), device) for column in columns], labels).backward()
    assert all(weight.grad is not None for weight in model[0].auto_model.get_decoder().layers.parameters())
    with pytest.raises(READS):
        loss([send(column, device) for column in columns], labels).backward()
