"""Stage 3, contrastive learning on ``normalize(hidden[<EOS>])`` (METHOD.md), by sentence-transformers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import BatchSamplers, MultiDatasetBatchSamplers
from torch.utils.data import BatchSampler

from cocoa_embed.errors import UsageError
from cocoa_embed.train.data import Item, Row, load_row_image
from cocoa_embed.train.finite import FiniteLossTrainer
from cocoa_embed.train.sections import ContrastiveSection
from cocoa_embed.train.shared_batches import SharedBatchSampler


class ItemPreprocessor:
    """Turn stored items into what the model's own ``preprocess`` takes; images are read here, batch by batch."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model

    def __call__(self, items: Sequence[dict[str, str | None]], **kwargs: Any) -> dict[str, Any]:
        """Preprocess items of the form :func:`as_record` makes."""
        return self.model.preprocess([_as_input(item) for item in items], **kwargs)


def as_record(item: Item) -> dict[str, str | None]:
    """Return an item as plain values for a :class:`datasets.Dataset`."""
    return {"text": item.text, "image": None if item.image is None else str(item.image)}


def _as_input(record: dict[str, str | None]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if record["image"] is not None:
        given["image"] = load_row_image(Path(record["image"]))
    if record["text"] is not None:
        given["text"] = record["text"]
    return given


def pair_datasets(rows: Sequence[Row], section: ContrastiveSection) -> DatasetDict:
    """Return the rows as data sets with the columns ``anchor``, ``positive``, ``negative_1``... and ``label``.

    A batch is drawn from one of them. There is one for each subset, and another for its rows with the sides exchanged
    if the section asks for both directions; or one for all, without ``one_subset_a_batch``. Columns are the same
    throughout a data set, so rows with fewer hard negatives than the others of their subset are in one of their own.

    ``label`` is the row's index in ``rows``. It is no part of the model's inputs or of the search for duplicates, and
    the losses of this stage do not look at it.

    :raises UsageError: If a subset has the name that part of another goes by.
    """
    groups: dict[tuple[str, int], list[tuple[int, Row]]] = defaultdict(list)
    for number, row in enumerate(rows):
        kept = replace(row, negatives=row.negatives[: section.hard_negatives])
        groups[_group(kept, section, is_reversed=False)].append((number, kept))
        if section.both_directions:
            turned = row.reversed()
            groups[_group(turned, section, is_reversed=True)].append((number, turned))
    most: dict[str, int] = {}
    for name, count in groups:
        most[name] = max(count, most.get(name, 0))
    datasets: dict[str, Dataset] = {}
    for (name, count), members in groups.items():
        key = name if count == most[name] else f"{name}, {count or 'no'} negative{'s' * (count != 1)}"
        if key in datasets or (key != name and key in most):
            raise UsageError(f"A subset has the name {key!r}, as has a part of {name!r}; rename one of the two.")
        datasets[key] = _columns(members, count)
    return DatasetDict(datasets)


def _group(row: Row, section: ContrastiveSection, *, is_reversed: bool) -> tuple[str, int]:
    if not section.one_subset_a_batch:
        return "mixed", len(row.negatives)
    return f"{row.subset}, reversed" if is_reversed else row.subset, len(row.negatives)


def _columns(members: Sequence[tuple[int, Row]], negatives: int) -> Dataset:
    columns: dict[str, list[Any]] = {
        "anchor": [as_record(row.query) for _, row in members],
        "positive": [as_record(row.positive) for _, row in members],
    }
    for place in range(negatives):
        columns[f"negative_{place + 1}"] = [as_record(row.negatives[place]) for _, row in members]
    return Dataset.from_dict({**columns, "label": [number for number, _ in members]})


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


class ContrastiveTrainer(FiniteLossTrainer, SentenceTransformerTrainer):
    """The trainer of sentence-transformers, stopped by a loss that is not finite; a step is of one data set."""

    def get_batch_sampler(
        self, dataset: Dataset, batch_size: int, drop_last: bool, *args: Any, **kwargs: Any
    ) -> BatchSampler | None:
        """Draw batches for all devices together; the last of a data set may be smaller."""
        return super().get_batch_sampler(dataset, batch_size * self.args.world_size, False, *args, **kwargs)

    def get_multi_dataset_batch_sampler(self, *args: Any, **kwargs: Any) -> BatchSampler:
        """Give each device its part of them."""
        sampler = super().get_multi_dataset_batch_sampler(*args, **kwargs)
        return sampler if self.args.world_size == 1 else SharedBatchSampler(sampler, self.args.world_size)


def contrastive_trainer(
    model: SentenceTransformer, rows: Sequence[Row], section: ContrastiveSection, *, arguments: dict[str, Any]
) -> ContrastiveTrainer:
    """Return the trainer of stage 3; the model's weights change in place."""
    # Without examples of its own the trainer would pick some, for a card that is not written.
    model.model_card_data.widget = [{}]
    document = model.prompts.get("document") or ""
    prompts = {"anchor": model.prompts.get("query") or "", "positive": document}
    prompts |= {f"negative_{place + 1}": document for place in range(section.hard_negatives)}
    return ContrastiveTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
            **arguments,
        ),
        train_dataset=pair_datasets(rows, section),
        loss=contrastive_loss(model, section),
        data_collator=SentenceTransformerDataCollator(
            preprocess_fn=ItemPreprocessor(model), prompts={name: text for name, text in prompts.items() if text}
        ),
    )
