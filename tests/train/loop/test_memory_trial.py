"""What a device runs at once is the largest size that fits on all of them, and trying has no effect."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stages import alone, trainer_arguments
from tiny_backbones import LoadTiny
from torch import nn
from transformers import PreTrainedModel

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.train import pipeline
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.loop.memory_trial import fit_to_memory
from cocoa_embed.train.loop.trainer import CocoaTrainer, StageContext
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge
from cocoa_embed.train.stages.contrastive import stage as contrastive_stage
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.contrastive.stage import Contrastive
from cocoa_embed.train.stages.stage import Stage

Fit = Callable[..., tuple[CocoaTrainer, bool]]


class Limit:
    """A language model that runs out of memory above so many tokens, with ``more`` if it recomputes activations."""

    def __init__(self, model: PreTrainedModel, tokens: int, more: int = 0) -> None:
        self.refused: list[int] = []
        self.tokens = tokens
        layers = model.get_decoder().layers

        def check(module: nn.Module, args: tuple[Any, ...]) -> None:
            found, limit = args[0].shape[:2].numel(), self.tokens + more * layers[0].gradient_checkpointing
            if found > limit:
                self.refused.append(found)
                raise torch.OutOfMemoryError(f"{found} tokens")

        layers[0].register_forward_pre_hook(check)


def trainer_of(stage: Stage[Any], backbone: Backbone, rows: list[Row], folder: Path) -> CocoaTrainer:
    size = stage.micro_batches(1)[0]
    arguments = trainer_arguments(
        folder, max_steps=2, seed=0, per_device_train_batch_size=size,
        gradient_accumulation_steps=stage.settings.batch_size // size if stage.accumulates else 1,
    )  # fmt: skip
    return stage.trainer(backbone, RowTable.of(rows), StageContext(arguments))


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_stage, "TRIED_TOKENS", (800, 600, 400, 200))
    monkeypatch.setattr(contrastive_stage.Contrastive, "enough_at_once", 300)


def contrastive(**settings: Any) -> Contrastive:
    return alone(
        Contrastive, ContrastiveSettings(**{"steps": 2, "batch_size": 8, "probe_rows": 0, **settings}), max_length=50
    )


def is_recomputing(model: PreTrainedModel) -> bool:
    return bool(model.is_gradient_checkpointing)


@pytest.mark.parametrize(
    ("tokens", "more", "recompute", "expected", "is_on"),
    [
        (500, 0, "auto", 400, False),
        (10**6, 0, "auto", 800, False),
        (290, 400, "auto", 600, True),
        (290, 400, False, 200, False),
        (290, 400, True, 600, True),
        (50, 0, "auto", 200, True),  # nothing fits: the first step says so
    ],
)
def test_the_largest_mini_batches_that_fit_are_chosen_without_recomputation_if_they_fill_the_device(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path,
    caplog: pytest.LogCaptureFixture, tokens: int, more: int, recompute: bool | str, expected: int, is_on: bool,
) -> None:  # fmt: skip
    stage, model = contrastive(), tiny_backbone.model
    if recompute is True:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer: Any = trainer_of(stage, tiny_backbone, scene_rows, tmp_path)
    limit = Limit(model, tokens, more)
    with caplog.at_level(logging.WARNING):
        fit_to_memory(trainer, stage.trials(trainer, RowTable.of(scene_rows)), recompute)
    assert bool(limit.refused) is (tokens < 10**6)
    assert (trainer.limits.texts, trainer.limits.images) == (expected, expected)
    assert is_recomputing(model) is is_on
    assert f"{expected} tokens of texts and {expected} tokens of images at once" in caplog.text
    assert f"gradient checkpointing {'on' if is_on else 'off'}" in caplog.text


def test_trying_has_no_effect_on_what_is_learned(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path
) -> None:
    stage = contrastive(adapter={"kind": "lora", "dropout": 0.5}, learning_rate=1e-2)
    trainer: Any = trainer_of(stage, tiny_backbone, scene_rows, tmp_path)
    limit = Limit(tiny_backbone.model, 450)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state, was_training = torch.get_rng_state(), trainer.model.training
    fit_to_memory(trainer, stage.trials(trainer, RowTable.of(scene_rows)), "auto")
    assert limit.refused
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training is was_training
    assert trainer.optimizer is None
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())


def test_the_smallest_of_all_devices_decides(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = contrastive()
    trainer: Any = trainer_of(stage, tiny_backbone, scene_rows, tmp_path)
    others = iter([False, False, True] * 2)  # another device refuses the two largest sizes
    monkeypatch.setattr(trainer.accelerator, "gather", lambda seen: torch.cat([seen, torch.tensor([next(others)])]))
    fit_to_memory(trainer, stage.trials(trainer, RowTable.of(scene_rows)), "auto")
    assert (trainer.limits.texts, trainer.limits.images) == (400, 400)
    assert next(others, None) is None


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    tiny_backbone: Backbone, scene_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("wrong shapes")

    stage = contrastive()
    trainer: Any = trainer_of(stage, tiny_backbone, scene_rows, tmp_path)
    tiny_backbone.model.get_decoder().layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="wrong shapes"):
        fit_to_memory(trainer, stage.trials(trainer, RowTable.of(scene_rows)), "auto")


@pytest.mark.parametrize("tokens", [300, 100])
def test_micro_batches_are_the_largest_part_of_the_batch_that_fits_and_make_the_same_step(
    load_tiny: LoadTiny, scene_rows: list[Row], tmp_path: Path, tokens: int
) -> None:
    """The longest text and the row with an image are tried."""
    long = Row(query=Item(text="what is here?"), positive=Item(text="a red ring " * 8), source="long")
    rows, weights, chosen = [*scene_rows[:15], long], [], list[int]()
    for size in (None, "auto"):
        backbone = load_tiny("sdpa")
        settings = BridgeSettings(steps=2, batch_size=12, mini_batch_size=size, probe_rows=0, warmup_steps=0)
        stage = alone(Bridge, settings)
        trainer = trainer_of(stage, backbone, rows, tmp_path)
        if size == "auto":
            limit = Limit(backbone.model, tokens)
            fit_to_memory(trainer, stage.trials(trainer, RowTable.of(rows)), False)
            assert limit.refused
            limit.tokens = 10**6
            chosen = [trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps]
            length = limit.refused[0] // 12
            assert chosen[0] * chosen[1] == 12
            assert chosen[0] * length <= tokens
            assert 2 * chosen[0] * length > tokens / 2
        trainer.train()
        assert trainer.state.global_step == 2
        weights.append(torch.cat([value.flatten() for value in backbone.model.state_dict().values()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-4
    assert chosen[1] > 1


@pytest.mark.parametrize(("is_sharded", "is_on"), [(False, False), (True, True)])
def test_nothing_is_tried_on_a_cpu_nor_with_sharded_weights(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, is_sharded: bool, is_on: bool
) -> None:
    trainer: Any = SimpleNamespace(
        is_fsdp_enabled=is_sharded, model=tiny_backbone.model, accelerator=SimpleNamespace(device=torch.device("cpu"))
    )
    stage: Any = SimpleNamespace(run=SimpleNamespace(gradient_checkpointing="auto"), trials=pytest.fail)
    pipeline.choose_sizes(stage, trainer, RowTable.of([]))
    assert is_recomputing(tiny_backbone.model) is is_on
