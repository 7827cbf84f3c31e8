"""Compiled layers: the same losses, and the layers as they are where they cannot be compiled."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import MakeRecipe
from torch._dynamo.utils import counters

from cocoa_embed.model import compiling
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.training_record import read_run
from cocoa_embed.train import run

STAGE = {"steps": 3, "batch_size": 4, "warmup_steps": 0, "logging_steps": 1}
IN_PARTS = {**STAGE, "mini_batch_size": 2}


def losses(make: MakeRecipe, folder: Path, *, compiled: bool) -> dict[str, list[float]]:
    stages: dict[str, Any] = {"warmup": IN_PARTS, "bridge": IN_PARTS, "contrastive": STAGE}
    run(make(compile=compiled, **stages), folder)
    records = read_run(folder)["stages"]
    return {name: [line["loss"] for line in record["log"] if "loss" in line] for name, record in records.items()}


def test_the_layers_of_both_parts_are_compiled_and_run_as_they_are_again(tiny_backbone: Backbone) -> None:
    model: Any = tiny_backbone.model
    layers = compiling.compile_layers(model)
    assert set(layers) == {*model.get_decoder().layers, *model.base_model.visual.blocks}
    compiled = {module for module in model.modules() if module._compiled_call_impl is not None}
    assert compiled == set(layers)
    compiling.run_uncompiled(layers)
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.slow
def test_layers_that_cannot_be_compiled_are_run_as_they_are_with_a_warning_a_stage(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise compiling.CompileError("no C++ compiler\nand more")

    expected = losses(tiny_recipe, tmp_path / "as-they-are", compiled=False)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **_: setattr(layer, "_compiled_call_impl", fail))
    with caplog.at_level(logging.WARNING):
        assert losses(tiny_recipe, tmp_path / "failed", compiled=True) == expected
    warnings = [message for message in caplog.messages if "compile" in message]
    assert warnings == ["compile has no effect: the layers cannot be compiled here (no C++ compiler)."] * 3


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses_in_every_stage(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    expected = losses(tiny_recipe, tmp_path / "as-they-are", compiled=False)
    counters.clear()
    found = losses(tiny_recipe, tmp_path / "compiled", compiled=True)
    assert counters["stats"]["unique_graphs"] >= 3
    breaks = dict(counters["graph_break"])
    assert breaks, "the attention of the vision encoder runs between compiled parts"
    assert all("packed_attention" in reason for reason in breaks), breaks
    for stage, values in expected.items():
        assert found[stage] == pytest.approx(values, rel=1e-4), stage
