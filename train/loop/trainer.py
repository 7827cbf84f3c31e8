"""What the trainers of all stages do beside what transformers does: watch each step, save whole checkpoints."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from cocoa_embed.errors import CocoaError, one_line
from cocoa_embed.train.data.rows import Row
from cocoa_embed.train.loop.adapters import Adapter
from cocoa_embed.train.loop.batch_facts import FACTS, BatchFacts
from cocoa_embed.train.loop.checkpoints import mark_complete, write_json
from cocoa_embed.train.loop.oom import is_out_of_memory
from cocoa_embed.train.loop.throughput import Throughput
from cocoa_embed.train.stages.probe import PROBED, Probe

WEIGHTS = "model.safetensors"
NAMED_ROWS = 16
"""The most rows that an error names; a file holds them all."""


class LossError(CocoaError):
    """The loss of a step is NaN or infinite."""

    is_raised_by_all = True


class CocoaTrainer(Trainer):
    """The ``Trainer`` of a stage, over ``DescribedBatches``.

    - A step whose loss is not finite ends the run before the weights change, and its rows are named.
    - A device without memory for a step ends the run with the settings to lower.
    - Log lines say how fast the stage is (``Throughput``), probes left out.
    - Checkpoints hold the model's state as it is, adapters and pixel decoder included, and are marked when whole.

    :param rows: What the batches' row numbers mean.
    :param memory_remedy: What to change in the recipe where memory does not suffice.
    :param known: What each checkpoint is to know of the run, as JSON takes it.
    :param adapter: What is trained beside the weights, to be merged into them when the stage has ended.
    :param probe: Measures the model for the log: at the first line after every ``probe_steps`` steps, and at the last.
    """

    def __init__(
        self,
        *args: Any,
        rows: Sequence[Row],
        memory_remedy: str,
        known: Mapping[str, Any] | None = None,
        throughput: Throughput | None = None,
        adapter: Adapter | None = None,
        probe: Probe | None = None,
        probe_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        self._rows = rows
        self._memory_remedy = memory_remedy
        self._known = dict(known or {})
        self.throughput = throughput or Throughput()
        self.adapter = adapter
        self._probe = probe
        self._probe_steps = probe_steps
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

        :raises CocoaError: If its loss is not finite, or memory does not suffice.
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
                f"{self._memory_remedy}."
            ) from error
        self._refuse_infinite(loss, facts)
        return loss

    def _refuse_infinite(self, loss: Tensor, facts: BatchFacts) -> None:
        losses: Tensor = self.accelerator.gather(loss.reshape(1)) if self.args.world_size > 1 else loss.reshape(1)
        if torch.isfinite(losses).all():
            return
        sources = [self._rows[number].source for number in facts.rows]
        if self.args.world_size > 1:
            sources = gather_object(sources)
        sources = list(dict.fromkeys(sources))
        step, record = self.state.global_step + 1, Path(self.args.output_dir).parent / "failed_step.json"
        if self.is_world_process_zero():
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, {"step": step, "losses": [str(value) for value in losses.tolist()], "rows": sources})
        more = f" and {len(sources) - NAMED_ROWS} more, all in {record}" if len(sources) > NAMED_ROWS else ""
        raise LossError(
            f"The loss of step {step} is {losses[~torch.isfinite(losses)][0].item()}; lower learning_rate "
            f"({self.args.learning_rate:g}), raise warmup_steps, or look at the rows of its batch: "
            f"{'; '.join(sources[:NAMED_ROWS])}{more}. No checkpoint is written after it."
        )

    def resume_clock(self, seconds: float) -> None:
        """Say how long the stage has trained before its run was ended."""
        self._clock -= seconds

    def seconds(self) -> float:
        """Return how long the stage has trained, what it is resumed from included."""
        return time.perf_counter() - self._clock

    def load_finished(self, checkpoint: Path) -> None:
        """Take weights and log of a checkpoint whose stage has no step left."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def full_state(self) -> dict[str, Tensor] | None:
        """Return the gathered weights of a sharded model, whole in the first process; None where nothing is sharded."""
        if not self.is_fsdp_enabled:
            return None
        state: dict[str, Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        return state

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to each line of losses how fast the stage is and, where it is due, what the probe finds."""
        if "loss" in logs:
            if self._probe is not None and self._is_probe_due():
                with self.throughput.paused():
                    logs |= self._probe(self.accelerator.unwrap_model(self.model))
            logs |= self.throughput.figures(self.accelerator)
            self.throughput.restart()
        super().log(logs, *args, **kwargs)

    def _is_probe_due(self) -> bool:
        step = self.state.global_step
        # From the log, which a resumed run has from the one that was ended.
        probed_at = next((line["step"] for line in reversed(self.state.log_history) if PROBED & line.keys()), 0)
        return step - probed_at >= self._probe_steps or step == self.state.max_steps

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
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                mark_complete(folder, seconds=self.seconds(), **self._known)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)
        else:
            load_model(model or self.model, str(Path(resume_from_checkpoint) / WEIGHTS))
