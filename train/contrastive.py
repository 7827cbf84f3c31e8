"""Stage 3, contrastive learning on ``normalize(hidden[<EOS>])`` (METHOD.md), by sentence-transformers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import BatchSamplers, MultiDatasetBatchSamplers

from cocoa_embed.train.arguments import memory_remedy
from cocoa_embed.train.batches import DescribedBatches
from cocoa_embed.train.data import Item, Row, load_row_image, stored_images
from cocoa_embed.train.reconstruction import StageContext
from cocoa_embed.train.sections import ContrastiveSection
from cocoa_embed.train.stored import StoredImage
from cocoa_embed.train.throughput import Throughput
from cocoa_embed.train.trainer import CocoaTrainer


class ItemPreprocessor:
    """Turn stored items into what the model's own ``preprocess`` takes; images are read here, batch by batch.

    :param stored: Those images that are kept inside tables, by their names; any other name is a path.
    """

    def __init__(self, model: SentenceTransformer, stored: Mapping[str, StoredImage] | None = None) -> None:
        self.model = model
        self.stored = stored or {}

    def __call__(self, items: Sequence[dict[str, str | None]], **kwargs: Any) -> dict[str, Any]:
        """Preprocess items of the form :func:`as_record` makes."""
        return self.model.preprocess([_as_input(item, self.stored) for item in items], **kwargs)


def as_record(item: Item) -> dict[str, str | None]:
    """Return an item as plain values for a :class:`datasets.Dataset`."""
    return {"text": item.text, "image": None if item.image is None else str(item.image)}


def _as_input(record: dict[str, str | None], stored: Mapping[str, StoredImage]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if record["image"] is not None:
        given["image"] = load_row_image(stored.get(record["image"]) or Path(record["image"]))
    if record["text"] is not None:
        given["text"] = record["text"]
    return given


def pair_datasets(rows: Sequence[Row], *, both_directions: bool) -> DatasetDict:
    """Return the rows as pairs ``anchor``, ``positive``: a subset, and another with the sides exchanged if asked for.

    A batch is drawn from one subset, so that all its candidates are of one kind.
    """
    subsets = {"forward": rows}
    if both_directions:
        subsets["backward"] = [row.reversed() for row in rows]
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {
                    "anchor": [as_record(row.query) for row in subset],
                    "positive": [as_record(row.positive) for row in subset],
                    "label": list(range(len(subset))),
                }
            )
            for name, subset in subsets.items()
        }
    )


def contrastive_loss(
    model: SentenceTransformer, section: ContrastiveSection
) -> MultipleNegativesRankingLoss | CachedMultipleNegativesRankingLoss:
    """Return InfoNCE with in-batch negatives, gathered across devices.

    Gradients are cached where a batch is larger than ``cache_chunk``. Otherwise the cache would give the same loss and
    the same gradients, and run every batch forward twice for them.
    """
    settings: dict[str, Any] = {
        "scale": 1 / section.temperature,
        "gather_across_devices": PartialState().num_processes > 1,
        "directions": ("query_to_doc", "doc_to_query") if section.symmetric else ("query_to_doc",),
        "partition_mode": "per_direction" if section.symmetric else "joint",
    }
    if section.batch_size <= section.cache_chunk:
        return MultipleNegativesRankingLoss(model, **settings)
    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=section.cache_chunk, **settings)


class ContrastiveTrainer(CocoaTrainer, SentenceTransformerTrainer):
    """The trainer of sentence-transformers, watched as those of the other stages are."""


@dataclass
class PairCollator(SentenceTransformerDataCollator):
    """The collator of sentence-transformers, whose batches say what they hold."""

    flops_of: Callable[[dict[str, Any]], float] | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate pairs."""
        return DescribedBatches(super().__call__, _row_numbers, self.flops_of)(features)


def _row_numbers(features: list[dict[str, Any]], batch: dict[str, Any]) -> list[int]:
    return [feature["label"] for feature in features]


def contrastive_trainer(
    model: SentenceTransformer, rows: Sequence[Row], section: ContrastiveSection, context: StageContext
) -> ContrastiveTrainer:
    """Return the trainer of stage 3; the model's weights change in place."""
    # Without examples of its own the trainer would pick some, for a card that is not written.
    model.model_card_data.widget = [{}]
    prompts = {"anchor": model.prompts.get("query") or "", "positive": model.prompts.get("document") or ""}
    return ContrastiveTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
            **context.arguments,
        ),
        train_dataset=pair_datasets(rows, both_directions=section.both_directions),
        loss=contrastive_loss(model, section),
        data_collator=PairCollator(
            preprocess_fn=ItemPreprocessor(model, stored_images(rows)),
            prompts={name: text for name, text in prompts.items() if text},
            flops_of=context.flops_of,
        ),
        rows=rows,
        memory_remedy=memory_remedy("contrastive", section),
        known=context.known,
        throughput=Throughput(context.peak_flops),
    )
