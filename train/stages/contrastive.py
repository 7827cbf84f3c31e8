"""Stage 3, contrastive learning on ``normalize(hidden[<EOS>])`` (METHOD.md), by sentence-transformers."""

from collections.abc import Sequence
from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import BatchSamplers, MultiDatasetBatchSamplers
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import UsageError
from cocoa_embed.train.data.pair_datasets import (
    ItemPreprocessor,
    PairCollator,
    as_record,
    distinct_enough,
    pair_datasets,
)
from cocoa_embed.train.data.rows import arrow_images
from cocoa_embed.train.data.shared_batches import SharedBatchSampler
from cocoa_embed.train.loop.adapters import prepare_trainable
from cocoa_embed.train.loop.oom import memory_remedy
from cocoa_embed.train.loop.stage_trainer import StageContext
from cocoa_embed.train.loop.throughput import Throughput
from cocoa_embed.train.loop.trainer import CocoaTrainer
from cocoa_embed.train.settings import ContrastiveSection
from cocoa_embed.train.stages.probe import GeometryProbe, pictured_rows


def matryoshka_dims(section: ContrastiveSection, dimension: int) -> list[int]:
    """Return the lengths of an embedding to train: the section's and the whole, the longest first.

    :param dimension: Of the model's embeddings.
    :raises UsageError: If the section asks for more.
    """
    dims = sorted({dimension, *(section.matryoshka_dims or [])}, reverse=True)
    if dims[0] > dimension:
        raise UsageError(
            f"contrastive.matryoshka_dims asks for {dims[0]} values, but this backbone's embeddings have {dimension}; "
            f"give lengths up to {dimension}."
        )
    return dims


def facts(section: ContrastiveSection) -> dict[str, Any]:
    """Return what the model card says of the stage: ``description``, a text, and ``matryoshka_dims``."""
    count = section.hard_negatives
    hard = f"up to {count} hard negative{'s' * (count > 1)} of each of its rows" if count else "no hard negatives"
    sentences = [
        f"Contrastive learning: InfoNCE at temperature {section.temperature:g}, with in-batch negatives and {hard}.",
        f"A batch is drawn from {'one subset' if section.one_subset_a_batch else 'all subsets'}.",
    ]
    if section.both_directions:
        sentences.append("Each pair is trained in both directions, as two rows.")
    if section.symmetric:
        sentences.append("Each positive looks for its query too, in the same loss.")
    return {"description": " ".join(sentences), "matryoshka_dims": section.matryoshka_dims}


def contrastive_loss(
    model: SentenceTransformer, section: ContrastiveSection
) -> MultipleNegativesRankingLoss | CachedMultipleNegativesRankingLoss | MatryoshkaLoss:
    """Return InfoNCE with in-batch negatives, gathered across devices.

    A query's candidates are all positives and all hard negatives of the batch. With ``symmetric`` the loss is the mean
    of that and of each positive's search for its query among the batch's queries; hard negatives search for nothing.
    With ``matryoshka_dims`` it is the sum over the lengths, of embeddings cut and normalised again.

    Gradients are cached where a batch is larger than ``cache_chunk``. Otherwise the cache would give the same loss and
    the same gradients, and run every batch forward twice for them. On several devices they always are: without the
    cache a step runs the model forward once for each column, and DistributedDataParallel expects it once.

    :raises UsageError: If ``matryoshka_dims`` are more than the model has.
    """
    devices = PartialState().num_processes
    settings: dict[str, Any] = {
        "scale": 1 / section.temperature,
        "gather_across_devices": devices > 1,
        "directions": ("query_to_doc", "doc_to_query") if section.symmetric else ("query_to_doc",),
        "partition_mode": "per_direction" if section.symmetric else "joint",
    }
    loss: MultipleNegativesRankingLoss | CachedMultipleNegativesRankingLoss
    if devices == 1 and section.batch_size <= section.cache_chunk:
        loss = MultipleNegativesRankingLoss(model, **settings)
    else:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=section.cache_chunk, **settings)
    dims = matryoshka_dims(section, cast(int, model.get_embedding_dimension()))
    return loss if len(dims) == 1 else MatryoshkaLoss(model, loss, dims)


class ContrastiveTrainer(CocoaTrainer, SentenceTransformerTrainer):
    """The trainer of sentence-transformers, watched as those of the other stages are; a step is of one data set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(NextEpoch(self))

    def get_batch_sampler(
        self, dataset: Dataset, batch_size: int, drop_last: bool, *args: Any, **kwargs: Any
    ) -> BatchSampler | None:
        """Draw batches for all devices together; the last of a data set may be smaller."""
        return super().get_batch_sampler(dataset, batch_size * self.args.world_size, False, *args, **kwargs)

    def get_multi_dataset_batch_sampler(self, *args: Any, **kwargs: Any) -> BatchSampler:
        """Give each device its part of them."""
        sampler: Any = super().get_multi_dataset_batch_sampler(*args, **kwargs)
        self.drawn = sampler
        return sampler if self.args.world_size == 1 else SharedBatchSampler(sampler, self.args.world_size)


class NextEpoch(TrainerCallback):
    """Tell the sampler which epoch it is: what is wrapped round it does not, in a resumed run or on several devices."""

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch that the next step is of."""
        drawn = self.trainer.drawn
        drawn.set_epoch(state.global_step // len(drawn))


def embedding_probe(model: SentenceTransformer, rows: Sequence[Row], batch_size: int) -> GeometryProbe:
    """Return what measures a SentenceTransformer on two rows or more, with its own prompts.

    :param batch_size: Items to run at once.
    """
    preprocess = ItemPreprocessor(model, arrow_images(rows))

    def collate(items: Sequence[Item], is_document: bool) -> dict[str, Any]:
        prompt = model.prompts.get("document" if is_document else "query") or None
        return preprocess([as_record(item) for item in items], prompt=prompt)

    def embed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        embeddings: Tensor = model(batch)["sentence_embedding"]
        return embeddings

    return GeometryProbe(collate, embed, rows, batch_size)


def contrastive_trainer(
    model: SentenceTransformer, rows: Sequence[Row], section: ContrastiveSection, context: StageContext
) -> ContrastiveTrainer:
    """Return the trainer of stage 3; the model's weights change in place."""
    # Without examples of its own the trainer would pick some, for a card that is not written.
    model.model_card_data.widget = [{}]
    document = model.prompts.get("document") or ""
    prompts = {"anchor": model.prompts.get("query") or "", "positive": document}
    prompts |= {f"negative_{place + 1}": document for place in range(section.hard_negatives)}
    adapter = prepare_trainable(model[0].auto_model, section)
    probe_rows = pictured_rows(rows, section.probe_rows)
    return ContrastiveTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
            **context.arguments,
        ),
        train_dataset=distinct_enough(pair_datasets(rows, section), section.batch_size),
        loss=contrastive_loss(model, section),
        data_collator=PairCollator(
            preprocess_fn=ItemPreprocessor(model, arrow_images(rows)),
            prompts={name: text for name, text in prompts.items() if text},
            flops_of=context.flops_of,
            lengths=None if context.lengths_of is None else context.lengths_of(rows),
        ),
        rows=rows,
        memory_remedy=memory_remedy("contrastive", section),
        known=context.known,
        throughput=Throughput(context.peak_flops),
        adapter=adapter,
        probe=embedding_probe(model, probe_rows, section.cache_chunk) if probe_rows else None,
        probe_steps=section.probe_steps,
    )
