"""The base trainer: losses over micro-batches, speed, and errors that name rows and settings."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stages import alone, trainer_arguments
from torch import nn

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.train.data.rows import Draw, Rows
from cocoa_embed.train.loop.batch_facts import FACTS, BatchFacts, DescribedBatches, LateReading
from cocoa_embed.train.loop.stage_trainer import StageTrainer, stage_trainer
from cocoa_embed.train.loop.trainer import StageContext
from cocoa_embed.train.stages.bridge.settings import BridgeSettings
from cocoa_embed.train.stages.bridge.stage import Bridge

ROWS = [Row(query=Item(text="a"), positive=Item(text="b"), source=f"pairs.csv, row {number}") for number in range(40)]


class Line(nn.Module):
    """One weight; like a stage's, its loss is a mean over the step's masked tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def get_decoder(self) -> Any:  # noqa: ANN401
        return SimpleNamespace(layers=nn.ModuleList())

    def forward(
        self, target_ids: torch.Tensor, attention_mask: torch.Tensor, totals: dict[str, float]
    ) -> dict[str, torch.Tensor]:
        error = (self.weight - target_ids.float()).square().sum() / totals["target_ids"]
        return {"loss": error, "distance": (self.weight - target_ids.float()).abs().sum() / totals["target_ids"]}


def collate(examples: list[tuple[Draw, Row]]) -> dict[str, torch.Tensor]:
    """Row n has n % 3 + 1 masked tokens, each of value n."""
    numbers = [draw.row for draw, _ in examples]
    targets = torch.tensor([number for number in numbers for _ in range(number % 3 + 1)]).float()
    return {"target_ids": targets, "attention_mask": torch.ones(len(numbers), 2)}


def trainer(folder: Path, **values: Any) -> StageTrainer:
    section = BridgeSettings(**{"steps": 4, "batch_size": 4, "mini_batch_size": 2, **values})
    size = section.mini_batch_size or section.batch_size
    arguments = trainer_arguments(
        folder / "checkpoints",
        max_steps=4,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=section.batch_size // size,
        learning_rate=0.5,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=2,
    )
    model = Line()
    context = StageContext(arguments, memory_remedy=alone(Bridge, section).memory_remedy())
    return stage_trainer(model, model, ROWS, collate, section, context)


@pytest.mark.parametrize("mini_batch_size", [1, 2, 4])
def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path: Path, mini_batch_size: int) -> None:
    """Each masked token has the same weight, in micro-batches with few or many of them."""
    stage = trainer(tmp_path, mini_batch_size=mini_batch_size)
    weight, losses = 0.0, []
    draws = list(stage._stream)
    for start in range(0, 16, 4):
        targets = torch.tensor([draw.row for draw in draws[start : start + 4] for _ in range(draw.row % 3 + 1)]).float()
        losses.append((weight - targets).square().mean().item())
        weight -= 0.5 * (2 * (weight - targets)).mean().item()
    stage.train()
    assert stage.model.weight.item() == pytest.approx(weight, rel=1e-5)
    logged = [line["loss"] for line in stage.state.log_history if "loss" in line]
    assert logged == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-4)


def test_a_log_line_has_losses_speed_and_utilisation(tmp_path: Path) -> None:
    stage = trainer(tmp_path)
    stage.throughput.peak_flops = 1e9
    stage.data_collator = DescribedBatches(collate, lambda batch: 5e5)
    stage.train()
    line = next(line for line in stage.state.log_history if "loss" in line)
    assert {"loss", "distance", "grad_norm", "learning_rate", "tokens_per_second", "data_wait_ratio"} <= line.keys()
    assert 0 <= line["data_wait_ratio"] <= 1
    batches = 2 * 2
    tokens = batches * 2 * 2
    seconds = tokens / line["tokens_per_second"]
    assert line["mfu"] == pytest.approx(batches * 5e5 / seconds / 1e9)


@pytest.mark.parametrize(("value", "size", "place"), [("nan", 2, 9), ("inf", 20, 0)])
def test_a_loss_that_is_not_finite_names_the_rows_of_its_batch(
    tmp_path: Path, value: str, size: int, place: int
) -> None:
    """All in a file, and up to 16 in the error; the step does not change the weights."""
    stage = trainer(tmp_path, batch_size=2 * size, mini_batch_size=size)
    draws = list(stage._stream)
    start = place // size * size
    in_batch = [f"pairs.csv, row {draw.row}" for draw in draws[start : start + size]]

    def broken(examples: list[tuple[Draw, Row]]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        if draws[place] in [draw for draw, _ in examples]:
            batch["target_ids"][:] = float(value)
        return batch

    stage.data_collator = DescribedBatches(broken)
    with pytest.raises(CocoaError, match=f"The loss of step {place // (2 * size) + 1} is {value}") as raised:
        stage.train()
    named = [row for row in in_batch if f"{row};" in f"{raised.value};".replace(" and", ";").replace(". No", ";")]
    assert len(named) == min(size, 16)
    assert (f"and {size - 16} more, all in " in str(raised.value)) == (size > 16)
    assert sorted(json.loads((tmp_path / "failed_step.json").read_text())["rows"]) == sorted(in_batch)
    assert stage.state.global_step == place // (2 * size)


TOO_LARGE = r"Step 1 does not fit .* lower bridge\.mini_batch_size \(2\)"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), TOO_LARGE),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), TOO_LARGE),
        (RuntimeError("wrong shapes"), "^wrong shapes$"),
    ],
)
def test_out_of_memory_names_the_setting_to_lower_and_other_errors_are_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    stage = trainer(tmp_path)
    monkeypatch.setattr(Line, "forward", fail)
    with pytest.raises((CocoaError, RuntimeError), match=message):
        stage.train()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_read_raises_its_own_error_from_any_worker(tmp_path: Path, workers: int) -> None:
    def unreadable(examples: list[tuple[Draw, Row]]) -> dict[str, torch.Tensor]:
        raise CocoaError("photo.jpg: is truncated")

    stage = trainer(tmp_path)
    stage.data_collator = DescribedBatches(unreadable)
    stage.args.dataloader_num_workers = workers
    with pytest.raises(CocoaError, match=r"^photo\.jpg: is truncated$"):
        stage.train()


def test_facts_are_counted_from_the_batch() -> None:
    batch = DescribedBatches(collate)([Rows(ROWS)[Draw(4)], Rows(ROWS)[Draw(2)]])
    assert batch[FACTS] == BatchFacts(rows=(4, 2), tokens=4, padded_tokens=4, targets={"target_ids": 5})


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_loss_that_is_read_one_step_late_changes_no_weights_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_steps: int
) -> None:
    """The optimiser skips the step; the next one ends the run before its own update, or a log line before that."""
    stage = trainer(tmp_path)
    draws = list(stage._stream)
    weights: list[float] = []

    def broken(examples: list[tuple[Draw, Row]]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        if draws[6] in [draw for draw, _ in examples]:  # the second micro-batch of the second step
            batch["target_ids"][:] = float("nan")
        return batch

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        weights.append(stage.model.weight.item())
        return step(*args, **kwargs)

    step = stage.training_step
    monkeypatch.setattr(stage, "training_step", noted)
    stage.data_collator = DescribedBatches(broken)
    stage.args.optim, stage.args.logging_steps, stage.checks_late = "adamw_torch_fused", logging_steps, True
    with pytest.raises(CocoaError, match="The loss of step 2 is nan") as raised:
        stage.train()
    assert {f"row {draw.row}" in str(raised.value) for draw in draws[4:8]} == {True}
    assert weights == [0, 0, *[stage.model.weight.item()] * (2 if logging_steps == 1 else 4)]
    assert stage.model.weight.item() != 0
    assert stage.state.global_step == 2


@pytest.mark.parametrize("checks_late", [False, True])
def test_losses_that_are_checked_late_are_read_while_the_device_runs_a_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks_late: bool
) -> None:
    stage = trainer(tmp_path)
    stage.args.optim, stage.args.logging_steps, stage.checks_late = "adamw_torch_fused", 4, checks_late
    steps: list[tuple[int, int]] = []

    class Noted(LateReading):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__(value)
            self.made_at = stage.state.global_step

        def read(self) -> torch.Tensor:
            steps.append((self.made_at, stage.state.global_step))
            return super().read()

    monkeypatch.setattr("cocoa_embed.train.loop.trainer.LateReading", Noted)
    stage.train()
    late, at_once = [(step, step + 1) for step in range(4)], [(step, step) for step in range(4) for _ in range(2)]
    assert steps == (late if checks_late else at_once)
