"""Rows as the pairs that sentence-transformers trains on: records in data sets, whose images are read per batch."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from cocoa_embed.data.rows import ArrowImage, Item, Row
from cocoa_embed.errors import UsageError
from cocoa_embed.train.data.rows import load_row_image
from cocoa_embed.train.loop.batch_facts import DescribedBatches
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings

logger = logging.getLogger(__name__)


def as_record(item: Item) -> dict[str, str | None]:
    """Return an item as plain values for a ``datasets.Dataset``."""
    return {"text": item.full_text, "image": None if item.image is None else str(item.image)}


def preprocess_records(
    model: SentenceTransformer,
    images: Mapping[str, ArrowImage],
    records: Sequence[dict[str, str | None]],
    **kwargs: Any,
) -> dict[str, Any]:
    """Return records of ``as_record`` as inputs of the model's own ``preprocess``, with their images read.

    :param images: The images inside tables, by their names; any other name is a path.
    """
    inputs: list[dict[str, Any]] = []
    for record in records:
        text, image = record["text"], record["image"]
        given = {} if image is None else {"image": load_row_image(images.get(image) or Path(image))}
        inputs.append(given if text is None else {**given, "text": text})
    return model.preprocess(inputs, **kwargs)


@dataclass
class PairCollator(SentenceTransformerDataCollator):
    """The collator of sentence-transformers, with ``BatchFacts`` in each batch.

    :param flops_of: Returns the operations of training on a batch.
    :param lengths: Tokens of each row, by its number. A batch is sorted by them, so that what runs at once is of
        similar length; the order does not matter to in-batch losses.
    """

    flops_of: Callable[[dict[str, Any]], float] | None = None
    lengths: Sequence[int] | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate pairs."""
        lengths = self.lengths
        if lengths is not None:
            features = sorted(features, key=lambda feature: lengths[feature["label"]])
        numbers = [feature["label"] for feature in features]
        return DescribedBatches(super().__call__, lambda _: numbers, self.flops_of)(features)


def pair_datasets(rows: Sequence[Row], settings: ContrastiveSettings) -> DatasetDict:
    """Return the rows as data sets with the columns ``anchor``, ``positive``, ``negative_1``... and ``label``.

    A batch is drawn from one data set, which has the same columns throughout: there is one for each subset, number of
    hard negatives and, if ``directions`` is ``both``, direction.

    ``label`` is the row's index in ``rows``; neither the model nor the losses nor the search for duplicates use it.
    """
    groups: dict[tuple[str, str], list[tuple[int, Row]]] = defaultdict(list)
    for number, row in enumerate(rows):
        kept = replace(row, negatives=row.negatives[: settings.hard_negatives])
        groups[row.subset, f"hard negatives: {len(kept.negatives)}"].append((number, kept))
        if settings.directions == "both":
            groups[row.subset, "reversed"].append((number, row.reversed()))
    return DatasetDict({f"{subset} ({kind})": _columns(members) for (subset, kind), members in groups.items()})


def distinct_enough(datasets: DatasetDict, batch_size: int) -> DatasetDict:
    """Return the data sets; warn of columns with few different values: a batch holds nothing twice, so it is small.

    :raises UsageError: If a data set cannot give every device a row.
    """
    devices = PartialState().num_processes
    for name, dataset in datasets.items():
        columns = [column for column in dataset.column_names if column != "label"]
        distinct = {column: len({str(value) for value in dataset[column]}) for column in columns}
        rarest = min(distinct, key=lambda column: distinct[column])
        if distinct[rarest] < devices:
            raise UsageError(
                f"Subset {name!r} has {distinct[rarest]} different {rarest} in {len(dataset)} rows; a batch holds none "
                f"twice and needs one for each of the {devices} devices. Leave the subset out of the contrastive stage."
            )
        if distinct[rarest] < min(batch_size, len(dataset)):
            logger.warning(
                f"Subset {name!r} has {distinct[rarest]} different {rarest} in {len(dataset)} rows; a batch holds none "
                f"twice, so its batches have at most {distinct[rarest]} rows, not {batch_size}."
            )
    return datasets


def _columns(members: Sequence[tuple[int, Row]]) -> Dataset:
    columns = {
        "anchor": [as_record(row.query) for _, row in members],
        "positive": [as_record(row.positive) for _, row in members],
    }
    for place, negatives in enumerate(zip(*(row.negatives for _, row in members), strict=True), start=1):
        columns[f"negative_{place}"] = [as_record(item) for item in negatives]
    return Dataset.from_dict({**columns, "label": [number for number, _ in members]})
