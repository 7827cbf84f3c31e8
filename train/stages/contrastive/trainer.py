"""The loss and the trainer of stage 3, from sentence-transformers."""

from collections.abc import Iterator
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch.utils.data import BatchSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings


def contrastive_loss(
    model: SentenceTransformer, settings: ContrastiveSettings
) -> MultipleNegativesRankingLoss | CachedMultipleNegativesRankingLoss | MatryoshkaLoss:
    """Return InfoNCE with in-batch negatives, gathered across devices.

    A query's candidates are all positives and all hard negatives of the batch. The ``symmetric`` loss is the mean of
    that and of matching each positive to its query among the batch's queries; hard negatives are matched to nothing.
    With ``matryoshka_dims`` it is the sum over the whole length and these, cut and normalised again.

    Gradients are cached if a batch is larger than ``mini_batch_size``; otherwise the cache gives the same loss and
    gradients, and runs every batch forward twice. On several devices they always are: without the cache a step runs the
    model forward once per column, and DistributedDataParallel expects one forward pass.
    """
    devices, symmetric = PartialState().num_processes, settings.directions == "symmetric"
    how: dict[str, Any] = {
        "scale": 1 / settings.temperature,
        "gather_across_devices": devices > 1,
        "directions": ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",),
        "partition_mode": "per_direction" if symmetric else "joint",
    }
    loss: MultipleNegativesRankingLoss | CachedMultipleNegativesRankingLoss
    mini_batch_size = settings.mini_batch_size or settings.batch_size
    if devices == 1 and settings.batch_size <= mini_batch_size:
        loss = MultipleNegativesRankingLoss(model, **how)
    else:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size, **how)
    dims: set[Any] = {model.get_embedding_dimension(), *(settings.matryoshka_dims or [])}
    return loss if len(dims) < 2 else MatryoshkaLoss(model, loss, sorted(dims, reverse=True))


class ContrastiveTrainer(CocoaTrainer, SentenceTransformerTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The trainer of sentence-transformers with the checks of ``CocoaTrainer``; a step is drawn from one data set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(NextEpoch(self))

    def get_batch_sampler(
        self, dataset: Dataset, batch_size: int, drop_last: bool, *args: Any, **kwargs: Any
    ) -> BatchSampler | None:
        """Draw batches for all devices together; the last of a data set may be smaller."""
        return super().get_batch_sampler(dataset, batch_size * self.args.world_size, False, *args, **kwargs)

    def get_multi_dataset_batch_sampler(self, *args: Any, **kwargs: Any) -> BatchSampler:
        """Give each device its part of every batch."""
        sampler: Any = super().get_multi_dataset_batch_sampler(*args, **kwargs)
        self.drawn = sampler
        return sampler if self.args.world_size == 1 else SharedBatchSampler(sampler, self.args.world_size)


class NextEpoch(TrainerCallback):
    """Sets the sampler's epoch, which its wrappers do not do in a resumed run or on several devices."""

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch of the next step."""
        drawn = self.trainer.drawn
        drawn.set_epoch(state.global_step // len(drawn))


class SharedBatchSampler(BatchSampler):
    """Cuts each batch of all devices into equal parts, one per device, in their order.

    Devices take turns at the batches of a sampler. Parts of one batch come from one subset, with the same columns, as
    many rows each and no duplicate, as gathering candidates across devices needs.

    :param sampler: Draws the batches; up to ``devices - 1`` rows of a batch are left out, for parts of one size.
    """

    def __init__(self, sampler: BatchSampler, devices: int) -> None:
        self.batches = sampler
        self.devices = devices
        # So accelerate expects batches of different sizes, and uses each.
        self.batch_size = None  # type: ignore[assignment]
        self.drop_last = False

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            size = len(batch) // self.devices
            if size:
                yield from (batch[part * size : (part + 1) * size] for part in range(self.devices))

    def __len__(self) -> int:
        return len(self.batches) * self.devices
