"""The interface of a stage: everything that distinguishes it from the other stages."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, ProcessorMixin

from cocoa_embed.data.rows import Row
from cocoa_embed.errors import UsageError
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.flex_attention import FLEX, refuse_flex_attention
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import Example, numbered
from cocoa_embed.train.loop.arguments import training_arguments
from cocoa_embed.train.loop.batch_facts import Batch
from cocoa_embed.train.loop.memory_trial import Trial
from cocoa_embed.train.loop.trainer import CocoaTrainer, StageContext
from cocoa_embed.train.settings import RunSettings, StageSettings

Own = TypeVar("Own", bound=StageSettings, covariant=True)


class Stage(ABC, Generic[Own]):
    """A stage of a run.

    A stage is one file or folder, and one line in ``Recipe``.

    :param name: The stage's key in the recipe.
    :param settings: The stage's own settings.
    :param run: The settings of the whole run.
    """

    can_shard: ClassVar[bool] = True
    """Whether its weights may be sharded over devices."""

    has_samples: ClassVar[bool] = False
    """Whether the report shows what the stage predicts for a few rows (``samples``)."""

    fewest_steps: ClassVar[int] = 1
    """A stage of fewer steps learns nothing that the next one can use."""

    predicts_next: ClassVar[bool] = True
    """Whether the language-model head predicts a masked token from the state before it, not from its own."""

    sends_uint8: ClassVar[bool] = False
    """Whether images come to the device as uint8 patches of one frame, not as float32 ones of all."""

    needs: ClassVar[str] = ""
    """What the rows that the stage cannot use lack, and what to do."""

    accumulates: ClassVar[bool] = True
    """Whether mini-batches are steps of the trainer, which adds up their gradients."""

    enough_at_once: ClassVar[int] = 8
    """Fewer rows at once leave a device idle between its kernels."""

    def __init__(self, name: str, settings: Own, run: RunSettings) -> None:
        self.name = name
        self.settings = settings
        self.run = run

    # Checks before the run

    def check_backbone(self, config: PreTrainedConfig) -> None:
        """Check the settings against the backbone.

        :raises UsageError: If they do not fit.
        """

    def usable(self, rows: RowTable) -> np.ndarray:
        """Return which rows the stage can use, bool ``[rows]``; the others are left out and counted."""
        return np.ones(len(rows), dtype=bool)

    def check_rows(self, rows: RowTable) -> None:
        """Check that the stage can train on these rows.

        :raises UsageError: If it cannot.
        """

    def joined_rows(self, rows: RowTable) -> np.ndarray:
        """Return which rows have all images of query and positive in one sequence, bool ``[rows]``."""
        return np.ones(len(rows), dtype=bool)

    def row_warnings(self, rows: RowTable) -> list[str]:
        """Return a sentence about everything that is unusual about these rows, each with what to change."""
        return []

    # How rows make steps

    @property
    def passes_per_epoch(self) -> int:
        """How many times an epoch draws each row."""
        return 1

    def mean_batch_size(self, rows: RowTable) -> float:
        """Return how many of these rows a step holds on average."""
        return self.settings.batch_size

    def step_count(self, rows: RowTable) -> int:
        """Return the optimisation steps over these rows."""
        if self.settings.steps is not None:
            return self.settings.steps
        assert self.settings.epochs is not None  # validated with the settings
        draws = self.settings.epochs * len(rows) * self.passes_per_epoch
        steps = math.ceil(draws / self.mean_batch_size(rows) - 1e-9)
        return max(steps, self.settings.min_steps or 1)

    def step_contents(self, rows: RowTable) -> list[dict[str, Any]]:
        """Return what a step holds for each ``subset``, with ``rows_a_step``, if a step has rows of one subset only."""
        return []

    def micro_batches(self, devices: int) -> tuple[int, int]:
        """Return how many rows all devices take at once, and how many of these mini-batches make a step.

        :raises UsageError: If the batch cannot be divided like this.
        """
        total = self.settings.batch_size
        if total % devices:
            raise UsageError(f"{self.name}.batch_size {total} is not a multiple of the {devices} devices.")
        mini = self.settings.rows_at_once(total // devices)
        at_once = mini * devices
        if total % at_once:
            raise UsageError(
                f"{self.name}.batch_size {total} is not a multiple of {at_once}, the mini_batch_size {mini} on "
                f"{devices} device{'s' * (devices > 1)}."
            )
        return at_once, total // at_once

    def sizes_at_once(self, devices: int) -> Sequence[int]:
        """Return the sizes that a device may run at once, in rows, largest first; memory decides between them."""
        return self.settings.sizes_at_once(self.settings.batch_size // devices)

    def sequences_at_once(self, devices: int, longest: int = 1, size: int | None = None) -> int:
        """Return how many sequences, of which the longest has ``longest`` tokens, a device runs in one forward pass.

        :param size: One of ``sizes_at_once``; by default the one that is used where memory does not decide.
        """
        return size or self.micro_batches(devices)[0] // devices

    def kind_at_once(self, *, with_image: bool) -> str:
        """Return the unit in which sequences are counted; those with the same unit run together, at the same size."""
        return "rows"

    def held_out(self, rows: RowTable) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the rows held out of training, to measure on, and of those to train on, int64."""
        return np.arange(0), np.arange(len(rows))

    # Costs

    @abstractmethod
    def sequences(self, example: Example, processor: ProcessorMixin) -> list[Batch]:
        """Return the sequences that a step makes of one row, each as its own batch."""

    def alike(self, row: Row) -> list[Row]:
        """Return, for each sequence of a row, a row all of whose sequences are like it."""
        return [row]

    # Training

    def attention(self) -> str:
        """Return the attention implementation on this machine.

        :raises UsageError: If the recipe's implementation cannot be trained here.
        """
        asked = self.run.attn_implementation
        if not self.run.bidirectional and asked == FLEX:
            raise UsageError(f"bidirectional=false needs attn_implementation sdpa or eager, not {FLEX}.")
        if asked == FLEX:
            refuse_flex_attention(str(PartialState().device).split(":")[0])
        return asked

    def arguments(self, *, steps: int, folder: Path, layers: Sequence[str] = ()) -> dict[str, Any]:
        """Return the keyword arguments of the stage's ``TrainingArguments``.

        :param folder: Where checkpoints go.
        :param layers: The class names of the layers that sharding does not split.
        """
        at_once, accumulated = self.micro_batches(PartialState().num_processes)
        return training_arguments(
            self.run,
            self.settings,
            name=f"{self.run.name}-{self.name}",
            steps=steps,
            folder=folder,
            at_once=at_once,
            accumulated=accumulated,
            layers=layers,
        )

    @property
    def shown_metrics(self) -> Mapping[str, str]:
        """The logged metrics to show next to the progress bar, and their labels."""
        return {"loss": "loss"}

    @abstractmethod
    def trainer(self, backbone: Backbone, rows: RowTable, context: StageContext) -> CocoaTrainer:
        """Return the trainer of the stage, which changes the weights of ``backbone`` in place.

        :param rows: All rows of the stage, those held out included.
        """

    def save(self, trainer: CocoaTrainer, processor: ProcessorMixin, folder: Path) -> None:
        """Write the trained backbone, gathered if it is sharded, with its processor.

        Every process calls this, and the first one writes.
        """
        model, state = trainer.accelerator.unwrap_model(trainer.model).backbone, trainer.full_state()
        if not trainer.is_world_process_zero():
            return
        if state is not None:
            # Tied weights are saved under their first name only, as in a model that is not sharded.
            own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
            gathered = {name.removeprefix("backbone."): value for name, value in state.items()}
            state = {name: value for name, value in gathered.items() if name in own}
        model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)

    def memory_remedy(self) -> str:
        """Return what to change in the recipe when a step does not fit into memory."""
        sizes = self.sizes_at_once(PartialState().num_processes)
        size = "auto" if len(sizes) > 1 else sizes[0]
        return f"lower {self.name}.mini_batch_size ({size}) or max_pixels, or set gradient_checkpointing=true"

    def weights_remedies(self) -> list[str]:
        """Return what to change in the recipe when weights, gradients and optimiser states leave no memory."""
        remedies = []
        if self.settings.adapter is None:  # adapters cannot be sharded
            remedies.append(f"train adapters ({self.name}.adapter.kind=dora)")
            if self.can_shard and self.run.sharding == "none":
                remedies.append("shard them over several devices (sharding=fsdp2)")
        return [*remedies, self.memory_remedy()]

    def trials(self, trainer: CocoaTrainer, rows: RowTable) -> list[Trial]:
        """Return the sizes to try on a device's memory: here, the rows of a mini-batch.

        :param rows: The rows of the stage; the longest, and those with the most images, need the most memory.
        """
        texts, images = rows.column("query_text") + rows.column("positive_text"), rows.column("images")
        worst = [rows[int(place)] for place in {texts.argmax(), np.lexsort((texts, images))[-1]}]
        described, model = cast(Any, trainer.data_collator), cast(nn.Module, trainer.model)
        of_device = self.settings.batch_size // trainer.accelerator.num_processes

        def run(size: int) -> Iterator[Tensor]:
            for row in worst:
                batch = send_to_device(described.collate(numbered([row] * size)), trainer.accelerator.device)
                totals = {name: len(value) for name, value in batch.items() if name.startswith("target_")}
                with trainer.accelerator.autocast():
                    yield model(**batch, totals=totals)["loss"]

        def use(size: int) -> None:
            at_once = size * trainer.accelerator.num_processes
            trainer.args.per_device_train_batch_size = trainer._train_batch_size = at_once
            trainer.args.gradient_accumulation_steps = of_device // size

        sizes = self.sizes_at_once(trainer.accelerator.num_processes)
        return [Trial(self.kind_at_once(with_image=True), sizes, run, use, self.enough_at_once)]

    def run_whole(self, trainer: CocoaTrainer, tokens: int) -> None:
        """Make the trainer run a batch whole, whose columns have ``tokens`` tokens each, padding included."""

    def samples(self, model: Any, processor: ProcessorMixin, batch: Batch, rows: Sequence[Row]) -> dict[str, Any]:  # noqa: ANN401
        """Return what the report shows of the stage, as JSON values: what ``model`` predicts in a batch of ``rows``.

        Only a stage that ``has_samples`` implements this.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return what the model card says about the stage: ``description``, a text, and ``matryoshka_dims``."""
        return {}
