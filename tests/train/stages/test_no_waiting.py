"""No forward or backward pass reads a value from its device: on tensors without values, to read one is an error."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from stages import alone, bridge_collator, bridge_model, warmup_collator, warmup_model
from tiny_backbones import every_family
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model import forward_inputs
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.forward_inputs import HostInputs, HostTensor
from cocoa_embed.train.data.rows import numbered
from cocoa_embed.train.stages.contrastive.loss import contrastive_loss
from cocoa_embed.train.stages.contrastive.model import as_sentence_transformer
from cocoa_embed.train.stages.contrastive.patches import preprocess_items
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.sentence_inputs import keep_on_host

READS = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """A device whose tensors have no values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(forward_inputs, "_on", lambda tensor, _: valueless(tensor, mode))
    return mode


def valueless(tensor: Tensor, device: FakeTensorMode) -> Tensor:
    plain = tensor.as_subclass(Tensor) if not isinstance(tensor, HostTensor) else tensor.on(torch.device("cpu"))
    return device.from_tensor(plain)


def to_device(batch: Mapping[str, Any], device: FakeTensorMode) -> dict[str, Any]:
    return {
        name: valueless(value, device) if isinstance(value, Tensor) and not isinstance(value, HostTensor) else value
        for name, value in batch.items()
    }


def move(model: nn.Module, device: FakeTensorMode) -> None:
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(device.from_tensor(weight.detach())))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, device.from_tensor(buffer))


def rows_of(scene_rows: list[Row]) -> list[Row]:
    return [*scene_rows[:3], Row(query=Item(text="white picture"), positive=Item(text="blue cross"), source="")]

@every_family
@pytest.mark.parametrize("stage", ["warmup", "bridge"])
def test_x(stage, tiny_backbone, scene_rows, device, family):
    make = (warmup_model, warmup_collator) if stage == "warmup" else (bridge_model, bridge_collator)
    model, collator = (each(tiny_backbone) for each in make)
    batch = HostInputs(tiny_backbone.model.config)(collator(numbered(rows_of(scene_rows))))
    move(model, device)
    model.train()
    loss = model(**to_device(batch, device))["loss"]
    loss.backward()

@every_family
def test_c(tiny_backbone, scene_rows, device, family):
    from cocoa_embed.train.settings import RunSettings
    settings = ContrastiveSettings(steps=1, batch_size=4, mini_batch_size=3)
    model = as_sentence_transformer(tiny_backbone, RunSettings(name="a", backbone="b"))
    loss = contrastive_loss(model, settings)
    rows = rows_of(scene_rows)
    cols = [keep_on_host(preprocess_items(model, [getattr(r, c) for r in rows])) for c in ("query", "positive")]
    move(model, device)
    model.train()
    loss([to_device(c, device) for c in cols], valueless(torch.arange(8).view(4, 2), device)).backward()
