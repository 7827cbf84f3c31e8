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


class ItemPreprocessor:
    """Turns records into the inputs of the model's own ``preprocess``, which reads their images.

    :param stored: The images inside tables, by their names; any other name is a path.
    """

    def __init__(self, model: SentenceTransformer, stored: Mapping[str, ArrowImage] | None = None) -> None:
        self.model = model
        self.stored = stored or {}

    def __call__(self, items: Sequence[dict[str, str | None]], **kwargs: Any) -> dict[str, Any]:
        """Preprocess items of the form ``as_record`` makes."""
        return self.model.preprocess([_as_input(item, self.stored) for item in items], **kwargs)


def as_record(item: Item) -> dict[str, str | None]:
    """Return an item as plain values for a ``datasets.Dataset``."""
    return {"text": item.text, "image": None if item.image is None else str(item.image)}


def _as_input(record: dict[str, str | None], stored: Mapping[str, ArrowImage]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if record["image"] is not None:
        given["image"] = load_row_image(stored.get(record["image"]) or Path(record["image"]))
    if record["text"] is not None:
        given["text"] = record["text"]
    return given


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
        return DescribedBatches(super().__call__, _row_numbers, self.flops_of)(features)


def _row_numbers(features: list[dict[str, Any]]) -> list[int]:
    return [feature["label"] for feature in features]


def pair_datasets(rows: Sequence[Row], settings: ContrastiveSettings) -> DatasetDict:
    """Return the rows as data sets with the columns ``anchor``, ``positive``, ``negative_1``... and ``label``.

    A batch is drawn from one data set. Each subset is one, and another with the sides exchanged if ``directions`` is
    ``both``. A data set has the same columns throughout, so rows with fewer hard negatives than others of their subset
    make a data set of their own.

    ``label`` is the row's index in ``rows``; neither the model nor the losses nor the search for duplicates use it.

    :raises UsageError: If a subset has the name of a part of another.
    """
    groups: dict[tuple[str, int], list[tuple[int, Row]]] = defaultdict(list)
    for number, row in enumerate(rows):
        kept = replace(row, negatives=row.negatives[: settings.hard_negatives])
        groups[row.subset, len(kept.negatives)].append((number, kept))
        if settings.directions == "both":
            groups[f"{row.subset}, reversed", 0].append((number, row.reversed()))
    most: dict[str, int] = {}
    for name, count in groups:
        most[name] = max(count, most.get(name, 0))
    datasets: dict[Any, Dataset] = {}
    for (name, count), members in groups.items():
        key = name if count == most[name] else f"{name}, {count or 'no'} negative{'s' * (count != 1)}"
        if key in datasets or (key != name and key in most):
            raise UsageError(f"A subset has the name {key!r}, as has a part of {name!r}; rename one of the two.")
        datasets[key] = _columns(members, count)
    return DatasetDict(datasets)


def distinct_enough(datasets: DatasetDict, batch_size: int) -> DatasetDict:
    """Return the data sets; warn of few different values, which make small batches, as a batch holds nothing twice.

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
                "Subset %r has %d different %s in %d rows: its batches hold none twice, and so are of %d rows at most, "
                "not of %d.",
                name,
                distinct[rarest],
                rarest,
                len(dataset),
                distinct[rarest],
                batch_size,
            )
    return datasets


def _columns(members: Sequence[tuple[int, Row]], negatives: int) -> Dataset:
    columns: dict[str, list[Any]] = {
        "anchor": [as_record(row.query) for _, row in members],
        "positive": [as_record(row.positive) for _, row in members],
    }
    for place in range(negatives):
        columns[f"negative_{place + 1}"] = [as_record(row.negatives[place]) for _, row in members]
    return Dataset.from_dict({**columns, "label": [number for number, _ in members]})
