"""What the trainers of all stages add to transformers' ``Trainer``: checks of each step, and atomic checkpoints."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError, one_line
from cocoa_embed.train.loop.adapters import Adapter
from cocoa_embed.train.loop.batch_facts import FACTS, BatchFacts
from cocoa_embed.train.loop.checkpoints import mark_complete, write_json
from cocoa_embed.train.loop.oom import is_out_of_memory
from cocoa_embed.train.loop.throughput import Throughput

WEIGHTS = "model.safetensors"
NAMED_ROWS = 16
"""The most rows that an error names; a file holds them all."""

Measure: TypeAlias = Callable[[nn.Module], dict[str, float]]
"""Measures a model during training and changes neither its weights nor any random draw."""


@dataclass(frozen=True)
class Probe:
    """A measurement for the log: at the first line after every ``steps`` steps, and at the last.

    :param metrics: Some of its names, which no other log line has.
    """

    measure: Measure
    steps: int
    metrics: Collection[str]


@dataclass(frozen=True)
class StageContext:
    """What the trainer of a stage takes from the run, beside its model, its rows and its settings.

    :param arguments: Of transformers' ``TrainingArguments``.
    :param lengths_of: Returns the tokens of rows; without it, rows are not grouped by length.
    :param flops_of: Returns the operations of training on a batch.
    :param peak_flops: FLOP/s of a matrix product, to compare the stage's speed to.
    :param memory_remedy: What to change in the recipe if a step does not fit into memory.
    :param checkpoint_facts: What each checkpoint records of the run, as JSON takes it.
    """

    arguments: dict[str, Any]
    lengths_of: Callable[[Sequence[Row]], Sequence[int]] | None = None
    flops_of: Callable[[dict[str, Any]], float] | None = None
    peak_flops: float | None = None
    memory_remedy: str = ""
    checkpoint_facts: dict[str, Any] = field(default_factory=dict)


class LossError(CocoaError):
    """The loss of a step is NaN or infinite."""

    is_raised_by_all = True


class CocoaTrainer(Trainer):
    """The ``Trainer`` of a stage, over ``DescribedBatches``.

    - A step whose loss is not finite ends the run before the weights change, and the error names its rows.
    - A step that does not fit into memory ends the run, and the error names the settings to lower.
    - Log lines have the stage's speed (``Throughput``), without the time of probes.
    - Checkpoints hold the state of the whole model, adapters and pixel decoder included, and are marked when complete.

    :param rows: The rows that the batches' row numbers mean.
    :param adapter: What is trained beside the weights, to be merged into them at the end of the stage.
    """

    def __init__(
        self,
        *args: Any,
        rows: Sequence[Row],
        context: StageContext,
        adapter: Adapter | None = None,
        probe: Probe | None = None,
        **kwargs: Any,
    ) -> None:
        self._rows = rows
        self._context = context
        self.throughput = Throughput(context.peak_flops)
        self.adapter = adapter
        self.probe = probe
        self._clock = time.perf_counter()
        super().__init__(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """Return the batches of a step.

        :raises CocoaError: If one could not be made.
        """
        with self.throughput.waiting():
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        facts: list[BatchFacts] = [batch[FACTS] for batch in batches]
        for failure in (fact.failure for fact in facts if fact.failure is not None):
            raise CocoaError(failure)
        self.throughput.saw(facts)
        return batches, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run a step.

        :raises CocoaError: If its loss is not finite, or it does not fit into memory.
        """
        facts: BatchFacts = inputs[FACTS]
        tensors = {name: value for name, value in inputs.items() if name != FACTS}
        try:
            loss = super().training_step(model, tensors, *args, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise CocoaError(
                f"Step {self.state.global_step + 1} does not fit into memory ({facts.padded_tokens} tokens at once); "
                f"{self._context.memory_remedy}."
            ) from error
        self._refuse_infinite(loss, facts)
        return loss

    def _refuse_infinite(self, loss: Tensor, facts: BatchFacts) -> None:
        losses: Any = self.accelerator.gather(loss.reshape(1)) if self.args.world_size > 1 else loss.reshape(1)
        if torch.isfinite(losses).all():
            return
        sources = [self._rows[number].source for number in facts.rows]
        if self.args.world_size > 1:
            sources = gather_object(sources)
        sources = list(dict.fromkeys(sources))
        step, record = self.state.global_step + 1, self.folder.parent / "failed_step.json"
        if self.is_world_process_zero():
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, {"step": step, "losses": [str(value) for value in losses.tolist()], "rows": sources})
        more = f" and {len(sources) - NAMED_ROWS} more, all in {record}" if len(sources) > NAMED_ROWS else ""
        raise LossError(
            f"The loss of step {step} is {losses[~torch.isfinite(losses)][0].item()}; lower learning_rate "
            f"({self.args.learning_rate:g}), raise warmup_steps, or look at the rows of its batch: "
            f"{'; '.join(sources[:NAMED_ROWS])}{more}. No checkpoint is written after it."
        )

    @property
    def folder(self) -> Path:
        """Where the stage's checkpoints go."""
        return Path(str(self.args.output_dir))

    def resume_clock(self, seconds: float) -> None:
        """Start the clock at the time that the stage has trained before it was interrupted."""
        self._clock -= seconds

    def seconds(self) -> float:
        """Return how long the stage has trained, before interruptions too."""
        return time.perf_counter() - self._clock

    def load_finished(self, checkpoint: Path) -> None:
        """Load weights and log of a checkpoint whose stage has no step left."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def full_state(self) -> dict[str, Tensor] | None:
        """Return the gathered weights of a sharded model, complete in the first process; None without sharding."""
        if not self.is_fsdp_enabled:
            return None
        state: Any = self.accelerator.get_state_dict(self.model_wrapped)
        return state

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the stage's speed to each line of losses and, if it is due, what the probe measures."""
        if "loss" in logs:
            if self.probe is not None and self._is_due(self.probe):
                with self.throughput.paused():
                    logs |= self.probe.measure(self.accelerator.unwrap_model(self.model))
            logs |= self.throughput.metrics(self.accelerator)
            self.throughput.restart()
        super().log(logs, *args, **kwargs)

    def _is_due(self, probe: Probe) -> bool:
        step, log = self.state.global_step, self.state.log_history  # a resumed run has the log from before
        probed_at = next((line["step"] for line in reversed(log) if line.keys() & probe.metrics), 0)
        return step - probed_at >= probe.steps or step == self.state.max_steps

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.throughput.paused():
            try:
                super()._save_checkpoint(*args, **kwargs)
            except (OSError, SafetensorError) as error:
                raise CocoaError(
                    f"The checkpoint of step {self.state.global_step} cannot be written ({one_line(error)}); make room "
                    "or give another --out, then go on with --resume."
                ) from error
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                folder = self.folder / f"checkpoint-{self.state.global_step}"
                mark_complete(folder, seconds=self.seconds(), **self._context.checkpoint_facts)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)
        else:
            load_model(model or self.accelerator.unwrap_model(self.model), str(Path(resume_from_checkpoint) / WEIGHTS))
