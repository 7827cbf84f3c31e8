"""The trainer of stages that reconstruct masked parts: losses are means over a whole step."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput

from cocoa_embed.data.rows import Row
from cocoa_embed.train.data.broken_rows import ReplaceBroken
from cocoa_embed.train.data.rows import Example, Rows
from cocoa_embed.train.data.sampling import RowStream
from cocoa_embed.train.loop.adapters import prepare_trainable
from cocoa_embed.train.loop.batch_facts import FACTS, Batch, BatchFacts, DescribedBatches
from cocoa_embed.train.loop.checkpoints import step_of
from cocoa_embed.train.loop.trainer import CocoaTrainer, Probe, StageContext
from cocoa_embed.train.settings import ReconstructionSettings


def stage_trainer(
    model: nn.Module,
    backbone: PreTrainedModel,
    rows: Sequence[Row],
    collator: Callable[[list[Example]], Batch],
    settings: ReconstructionSettings,
    context: StageContext,
    probe: Probe | None = None,
) -> "StageTrainer":
    """Return the trainer of a model whose batches have ``target_*`` tensors to predict.

    :param model: Holds ``backbone`` and all copies of its parts. It takes a batch and ``totals``, the number of each
        target in the step, and returns scalars, ``loss`` among them, that are means over these totals.
    """
    arguments = TrainingArguments(**context.arguments)
    lengths_of = context.lengths_of if settings.group_by_length else None
    draws = arguments.max_steps * settings.batch_size
    dataset = Rows(rows)
    usable = ReplaceBroken(collator, dataset.after, context.on_bad_row, len(rows))
    return StageTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=DescribedBatches(usable, context.flops_of),
        stream=RowStream(
            len(rows),
            draws,
            batch_size=settings.batch_size,
            seed=arguments.seed,
            lengths_of=lengths_of and (lambda numbers: lengths_of([rows[number] for number in numbers])),
        ),
        rows=rows,
        context=context,
        adapter=prepare_trainable(backbone, settings, bf16=arguments.bf16),
        probe=probe,
    )


class StageTrainer(CocoaTrainer):
    """The trainer of a model that returns a dictionary of scalars, with ``loss`` among them.

    Each log line holds the means of the other scalars since the line before. Losses are means over the whole step: each
    target has the same weight, with any number of devices and micro-batches.

    :param stream: The order of the rows.
    """

    def __init__(self, *args: Any, stream: RowStream, **kwargs: Any) -> None:
        self._stream = stream
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._steps = 0
        self._totals: dict[str, float | Tensor] = {}
        super().__init__(*args, **kwargs)
        # The loss is already a mean over the step, so transformers must not divide it by the micro-batches.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> RowStream:
        return self._stream

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from a checkpoint if there is one."""
        if isinstance(resume_from_checkpoint, str):
            self._stream.skipped = step_of(Path(resume_from_checkpoint)) * self._stream.batch_size
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """Return the micro-batches of a step, and the number of their targets."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        facts: list[BatchFacts] = [batch[FACTS] for batch in batches]
        names = sorted({name for fact in facts for name in fact.targets})
        counts = [sum(fact.targets[name] for fact in facts) for name in names]
        self._totals = dict(zip(names, map(float, counts), strict=True))
        if self.accelerator.num_processes > 1:
            # Gradients are averaged over the devices, so each divides by its part of the step's total.
            own = torch.tensor(counts, dtype=torch.float32).to(self.accelerator.device, non_blocking=True)
            self._totals = dict(zip(names, self.accelerator.reduce(own, "mean"), strict=True))
        self._steps += 1
        return batches, sum(counts)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the model's loss and keep its other scalars for the log."""
        totals = self._totals or {name: len(each) for name, each in inputs.items() if name.startswith("target_")}
        outputs = model(**inputs, totals=totals)
        for name, value in outputs.items():
            if name != "loss":
                self._parts[name].append(value.detach())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the other scalars over steps and devices to ``logs``."""
        if "loss" in logs:
            sums = {name: torch.stack(values).sum() / self._steps for name, values in self._parts.items()}
            self._parts.clear()
            self._steps = 0
            means: Any = self.accelerator.reduce(sums, "mean")
            logs |= {name: value.item() for name, value in means.items()}
        super().log(logs, *args, **kwargs)
