"""The base of all stages' trainers: transformers' ``Trainer`` with checks of each step and atomic checkpoints."""

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.folders import write_atomically
from cocoa_embed.model.compiling import CompileError, compile_layers, run_uncompiled
from cocoa_embed.model.fingerprint import weights_digest
from cocoa_embed.train.loop.adapters import Adapter
from cocoa_embed.train.loop.batch_facts import FACTS, BatchFacts, LateReading
from cocoa_embed.train.loop.checkpoints import explain_full_disk, mark_complete
from cocoa_embed.train.loop.oom import is_out_of_memory
from cocoa_embed.train.loop.throughput import Throughput
from cocoa_embed.train.loop.workers import end_workers

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
FROZEN = "frozen"
"""The key of the digest of the frozen weights in the metadata of ``WEIGHTS``."""

NAMED_ROWS = 16
"""The most rows that an error names; a file lists all."""

Result = TypeVar("Result")

Measure: TypeAlias = Callable[[nn.Module], dict[str, float]]
"""Measures a model during training, without effect on its weights or on random draws."""


@dataclass(frozen=True)
class Probe:
    """A measurement for the log: it is in the next line after every ``steps`` steps, and in the last line.

    :param metrics: Names of metrics that only log lines with this measurement have.
    """

    measure: Measure
    steps: int
    metrics: Collection[str]


@dataclass(frozen=True)
class StageContext:
    """The arguments of a stage's trainer that come from the run.

    :param arguments: The keyword arguments of transformers' ``TrainingArguments``.
    :param lengths_of: Returns the number of tokens of each row; without it, rows are not grouped by length.
    :param on_bad_row: What happens at a row whose image proves broken: ``stop`` or ``skip``, as in ``DataSettings``.
    :param flops_of: Returns the FLOPs of training on a batch.
    :param peak_flops: FLOP/s of a matrix product, the peak of the utilisation.
    :param memory_remedy: The change in the recipe to suggest if a step does not fit into memory.
    :param checkpoint_facts: JSON values that each checkpoint records.
    :param compile: Compile the layers of the model.
    """

    arguments: dict[str, Any]
    lengths_of: Callable[[Sequence[Row]], Sequence[int]] | None = None
    on_bad_row: str = "stop"
    flops_of: Callable[[dict[str, Any]], float] | None = None
    peak_flops: float | None = None
    memory_remedy: str = ""
    checkpoint_facts: dict[str, Any] = field(default_factory=dict)
    compile: bool = False


class LossError(CocoaError):
    """The loss of a step is NaN or infinite."""

    is_raised_by_all = True


class CocoaTrainer(Trainer):
    """The ``Trainer`` of a stage, over ``DescribedBatches``.

    - A step whose loss is not finite changes no weights and ends the run, and the error names its rows. With
      ``checks_late``, as on CUDA, the run ends one step later, so that no step has to wait for its loss.
    - A step that does not fit into memory ends the run, and the error names the settings to lower.
    - Log lines have the stage's speed (``Throughput``), without the time of probes.
    - Checkpoints hold the trained weights, those of adapters and the pixel decoder included, and a digest of the
      frozen weights, which a resumed run loads from where the stage started. They are marked when complete.

    :param rows: The stage's rows, which batches refer to by number.
    :param adapter: The adapter, which is merged into the weights at the end of the stage.
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
        self._is_started = False
        self._losses: list[Tensor] = []
        self._rows_at_once: list[int] = []
        self._unread: tuple[int, tuple[int, ...], LateReading] | None = None
        super().__init__(*args, **kwargs)
        whole: Any = self.model
        self._compiled = compile_layers(whole) if context.compile else []
        self.checks_late = self.args.device.type == "cuda" and not self.is_fsdp_enabled

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Train, and end the data loader's workers whatever happens."""
        try:
            result = super().train(*args, **kwargs)
            self._refuse_infinite()
            return result
        finally:
            run_uncompiled(self._compiled)
            end_workers()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        for handler in arguments["kwargs_handlers"]:
            handler.gradient_as_bucket_view = True  # gradients are not copied before they are averaged
        return arguments

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """Return the batches of a step.

        :raises CocoaError: If the collator failed.
        """
        with self.throughput.waiting():
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        facts: list[BatchFacts] = [batch[FACTS] for batch in batches]
        for failure in (fact.failure for fact in facts if fact.failure is not None):
            raise CocoaError(failure)
        self.throughput.count(facts)
        return batches, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run a step.

        :raises CocoaError: If its loss is not finite, or it does not fit into memory.
        """
        facts: BatchFacts = inputs[FACTS]
        tensors = {name: value for name, value in inputs.items() if name != FACTS}
        try:
            loss = self.compiled_if_possible(partial(super().training_step, model, tensors, *args, **kwargs))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise CocoaError(
                f"Step {self.state.global_step + 1} does not fit into memory ({facts.padded_tokens} tokens at once); "
                f"{self._context.memory_remedy}."
            ) from error
        self._is_started = True
        self._losses.append(loss.reshape(1))
        self._rows_at_once.extend(facts.rows)
        if not self.checks_late or self.accelerator.sync_gradients:
            self._check_losses()
        return loss

    def compiled_if_possible(self, run: Callable[[], Result]) -> Result:
        """Run a pass; if its layers cannot be compiled, warn and run it with uncompiled ones.

        :raises CompileError: If the layers cannot be compiled, but have run compiled before.
        """
        try:
            return run()
        except CompileError as error:
            if self._is_started:
                raise
            reason = str(error).strip().partition("\n")[0]
            logger.warning("compile has no effect: the layers cannot be compiled here (%s).", reason)
            run_uncompiled(self._compiled)
            cast(nn.Module, self.model).zero_grad()
            return run()

    def _check_losses(self) -> None:
        """Check the losses since the last check, at once or one step later.

        :raises LossError: If one is not finite, of this step or of the one before.
        """
        self._refuse_infinite()  # of the step before, which the device has finished meanwhile
        losses: Any = self.accelerator.gather(torch.cat(self._losses))
        self._unread = self.state.global_step + 1, tuple(self._rows_at_once), LateReading(losses)
        self._losses.clear()
        self._rows_at_once.clear()
        if self.checks_late:
            optimizer: Any = self.optimizer
            # The optimizer then skips its step on the device, as it does for a gradient scaler of float16.
            optimizer.optimizer.found_inf = (~torch.isfinite(losses)).any().float()
        else:
            self._refuse_infinite()

    def _refuse_infinite(self) -> None:
        """Wait for the losses that were not read yet, and check them.

        :raises LossError: If one is not finite.
        """
        if self._unread is None:
            return
        (step, rows, late), self._unread = self._unread, None
        losses = late.read()
        if torch.isfinite(losses).all():
            return
        sources = list(dict.fromkeys(gather_object([self._rows[number].source for number in rows])))
        record = self.folder.parent / "failed_step.json"
        if self.is_world_process_zero():
            record.parent.mkdir(parents=True, exist_ok=True)
            failed = {"step": step, "losses": [str(value) for value in losses.tolist()], "rows": sources}
            write_atomically(record, json.dumps(failed, indent=2) + "\n")
        more = f" and {len(sources) - NAMED_ROWS} more, all in {record}" if len(sources) > NAMED_ROWS else ""
        raise LossError(
            f"The loss of step {step} is {losses[~torch.isfinite(losses)][0].item()}; lower learning_rate "
            f"({self.args.learning_rate:g}), raise warmup_steps, or look at the rows of its batch: "
            f"{'; '.join(sources[:NAMED_ROWS])}{more}. No checkpoint is written after it."
        )

    @property
    def folder(self) -> Path:
        """The folder of the stage's checkpoints."""
        return Path(str(self.args.output_dir))

    def resume_clock(self, seconds: float) -> None:
        """Add the seconds that the stage was trained before an interruption."""
        self._clock -= seconds

    def seconds(self) -> float:
        """Return the seconds that the stage was trained, those before an interruption included."""
        return time.perf_counter() - self._clock

    def full_state(self) -> dict[str, Tensor] | None:
        """Return the gathered weights of a sharded model, complete in the first process; None without sharding."""
        if not self.is_fsdp_enabled:
            return None
        state: Any = self.accelerator.get_state_dict(self.model_wrapped)
        return state

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the stage's speed and, if due, the probe's metrics to each line of losses."""
        if "loss" in logs:
            self._refuse_infinite()
            if self.probe is not None and self._is_due(self.probe):
                with self.throughput.paused(), self.accelerator.autocast():
                    logs |= self.probe.measure(self.accelerator.unwrap_model(self.model))
            logs |= self.throughput.metrics(self.accelerator)
            self.throughput.restart()
        super().log(logs, *args, **kwargs)

    def _is_due(self, probe: Probe) -> bool:
        step, log = self.state.global_step, self.state.log_history  # a resumed run restores both
        probed_at = next((line["step"] for line in reversed(log) if line.keys() & probe.metrics), 0)
        return step - probed_at >= probe.steps or step == self.state.max_steps

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_infinite()
        with self.throughput.paused():
            with explain_full_disk(f"The checkpoint of step {self.state.global_step}"):
                super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                folder = self.folder / f"checkpoint-{self.state.global_step}"
                mark_complete(folder, seconds=self.seconds(), **self._context.checkpoint_facts)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            trained = {name: value.contiguous() for name, value in self._trained().items()}
            save_file(trained, str(folder / WEIGHTS), metadata={FROZEN: self._frozen_digest})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)
            return
        path = Path(resume_from_checkpoint) / WEIGHTS
        with safe_open(path, "pt") as file:
            frozen, names = file.metadata()[FROZEN], set(file.keys())
        if frozen != self._frozen_digest or names != self._trained().keys():
            raise CocoaError(
                f"The weights in {path} do not belong to the model that the stage starts from, which has changed "
                "since they were saved; restore that model, or run again without --resume."
            )
        self.accelerator.unwrap_model(self.model).load_state_dict(load_file(path), strict=False)

    def _trained(self) -> dict[str, Tensor]:
        """Return the trained parameters, and the buffers that a model is saved with."""
        model = self.accelerator.unwrap_model(self.model)
        state = model.state_dict()
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return {name: state[name] for name in [*names, *(name for name, _ in model.named_buffers() if name in state)]}

    @cached_property
    def _frozen_digest(self) -> str:
        model = self.accelerator.unwrap_model(self.model)
        return weights_digest({name: each for name, each in model.named_parameters() if not each.requires_grad})
