"""The trainer of the two reconstruction stages: losses over the whole step, their parts in the log."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

from cocoa_embed.data.rows import Row
from cocoa_embed.train.data.rows import Draw, Rows
from cocoa_embed.train.data.sampling import RowStream
from cocoa_embed.train.loop.adapters import prepare_trainable
from cocoa_embed.train.loop.batch_facts import FACTS, BatchFacts, DescribedBatches
from cocoa_embed.train.loop.oom import memory_remedy
from cocoa_embed.train.loop.throughput import Throughput
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.settings import ReconstructionSection
from cocoa_embed.train.stages.collators import Batch


@dataclass(frozen=True)
class StageContext:
    """What a stage's trainer takes from the run, beside its model, its rows and its section of the recipe.

    :param arguments: Of transformers' ``TrainingArguments``.
    :param seed: Of the order of the rows, and of what is hidden of them.
    :param lengths_of: Tells the tokens of rows; without it, rows are not grouped by length.
    :param flops_of: Tells what a batch takes to train on.
    :param peak_flops: FLOP/s of a matrix product, what the stage's speed is compared to.
    :param prompts: Instructions for ``query`` and ``document`` that the model is used with.
    :param known: What each checkpoint is to know of the run.
    """

    arguments: dict[str, Any]
    seed: int = 0
    lengths_of: Callable[[Sequence[Row]], Sequence[int]] | None = None
    flops_of: Callable[[dict[str, Any]], float] | None = None
    peak_flops: float | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)


def reconstruction_trainer(
    model: nn.Module,
    backbone: PreTrainedModel,
    rows: Sequence[Row],
    collator: Callable[[list[tuple[Draw, Row]]], Batch],
    section: ReconstructionSection,
    context: StageContext,
    *,
    stage: str,
    **probing: Any,
) -> "StageTrainer":
    """Return the trainer of a reconstruction stage.

    :param model: The stage's model, with all that it copies from ``backbone``, which is in it.
    :param probing: What ``CocoaTrainer`` takes of a probe.
    """
    arguments = TrainingArguments(**context.arguments)
    lengths = context.lengths_of(rows) if section.group_by_length and context.lengths_of is not None else None
    return StageTrainer(
        model=model,
        args=arguments,
        train_dataset=Rows(rows),
        data_collator=DescribedBatches(collator, draw_indices, context.flops_of),
        stream=RowStream(
            len(rows),
            arguments.max_steps * section.batch_size,
            batch_size=section.batch_size,
            seed=context.seed,
            lengths=lengths,
        ),
        rows=rows,
        memory_remedy=memory_remedy(stage, section),
        known=context.known,
        throughput=Throughput(context.peak_flops),
        adapter=prepare_trainable(backbone, section),
        **probing,
    )


def draw_indices(examples: Sequence[tuple[Draw, Row]], batch: dict[str, Any]) -> list[int]:
    """Return the numbers of the rows in a batch."""
    return [draw.row for draw, _ in examples]


class StageTrainer(CocoaTrainer):
    """The trainer of a stage whose model returns a dictionary of scalars, with ``loss`` among them.

    Each log line holds the mean of the others since the line before. Losses are means over the whole step: however many
    devices and micro-batches share it, each hidden token counts the same.

    :param stream: The order of the rows.
    """

    def __init__(self, *args: Any, stream: RowStream, **kwargs: Any) -> None:
        self._stream = stream
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._steps = 0
        self._totals: dict[str, float] = {}
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> RowStream:
        return self._stream

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """Return the micro-batches of a step, and how many tokens are hidden in it on all devices."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        facts: list[BatchFacts] = [batch[FACTS] for batch in batches]
        counts = torch.tensor(
            [sum(fact.hidden_tokens for fact in facts), sum(fact.hidden_patches for fact in facts)],
            device=self.accelerator.device,
        )
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        tokens, patches = counts.tolist()
        # Gradients are averaged over the devices, so each divides by its part of the step's total.
        devices = self.accelerator.num_processes
        self._totals = {"hidden_token_total": tokens / devices, "hidden_patch_total": patches / devices}
        self._steps += 1
        return batches, tokens

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the model's loss and keep its other parts for the log."""
        outputs = model(**inputs, **self._totals)
        for name, value in outputs.items():
            if name != "loss":
                self._parts[name].append(value.detach())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts' means to ``logs``."""
        if "loss" in logs:
            logs |= self._mean_parts()
        super().log(logs, *args, **kwargs)

    def _mean_parts(self) -> dict[str, float]:
        """Return the parts' means over steps and devices, and forget them."""
        sums = {name: torch.stack(values).sum() / self._steps for name, values in self._parts.items()}
        self._parts.clear()
        self._steps = 0
        return {name: self.accelerator.reduce(value, reduction="mean").item() for name, value in sums.items()}
