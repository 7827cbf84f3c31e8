"""Rows as the pairs that sentence-transformers trains on: plain records in data sets, read batch by batch."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer

from cocoa_embed.data.rows import ArrowImage, Item, Row
from cocoa_embed.errors import UsageError
from cocoa_embed.train.data.rows import load_row_image

logger = logging.getLogger(__name__)

Record = dict[str, str | None]
"""An item as plain values: its ``text``, and the name of its ``image``."""


class ItemPreprocessor:
    """Turns records into the inputs of the model's own ``preprocess``; images are read here, batch by batch.

    :param arrow_images: The images inside tables, by name; other names are paths.
    """

    def __init__(self, model: SentenceTransformer, arrow_images: Mapping[str, ArrowImage] | None = None) -> None:
        self.model = model
        self.arrow_images = arrow_images or {}

    def __call__(self, records: Sequence[Record], **kwargs: Any) -> dict[str, Any]:
        """Preprocess records from ``as_record``."""
        return self.model.preprocess([self._input(record) for record in records], **kwargs)

    def _input(self, record: Record) -> dict[str, Any]:
        name = record["image"]
        image = name and load_row_image(self.arrow_images.get(name) or Path(name))
        return {part: value for part, value in (("image", image), ("text", record["text"])) if value is not None}


def as_record(item: Item) -> Record:
    """Return an item as plain values for a ``datasets.Dataset``."""
    return {"text": item.text, "image": None if item.image is None else str(item.image)}


def pair_datasets(rows: Sequence[Row], *, both_directions: bool = True, hard_negatives: int = 0) -> DatasetDict:
    """Return the rows as data sets with the columns ``anchor``, ``positive``, ``negative_1``... and ``label``.

    Each batch is drawn from one of them. Each subset has one, and another for its rows with query and positive
    exchanged. Rows with fewer hard negatives than others of their subset have a data set of their own, as all rows of a
    data set have the same columns.

    ``label`` is the row's index in ``rows``. The losses ignore it, and so does the search for duplicates.

    :param both_directions: Add the exchanged rows.
    :param hard_negatives: The most negatives of a row to use.
    :raises UsageError: If a subset has the name of a part of another.
    """
    groups: dict[tuple[str, int], list[tuple[int, Row]]] = defaultdict(list)
    most: dict[str, int] = {}
    for number, row in enumerate(rows):
        kept = replace(row, negatives=row.negatives[:hard_negatives])
        exchanged = [(f"{row.subset}, reversed", row.reversed())] if both_directions else []
        for name, each in ((row.subset, kept), *exchanged):
            count = len(each.negatives)
            groups[name, count].append((number, each))
            most[name] = max(count, most.get(name, 0))
    datasets = DatasetDict()
    for (name, count), members in groups.items():
        key = name if count == most[name] else f"{name}, {count or 'no'} negative{'s' * (count != 1)}"
        if key in datasets or (key != name and key in most):
            raise UsageError(f"A subset has the name {key!r}, as has a part of {name!r}; rename one of the two.")
        datasets[key] = _dataset(members, count)
    return datasets


def _dataset(members: Sequence[tuple[int, Row]], negatives: int) -> Dataset:
    columns: dict[str, list[Any]] = {
        "anchor": [as_record(row.query) for _, row in members],
        "positive": [as_record(row.positive) for _, row in members],
    }
    for position in range(negatives):
        columns[f"negative_{position + 1}"] = [as_record(row.negatives[position]) for _, row in members]
    return Dataset.from_dict({**columns, "label": [number for number, _ in members]})


def check_distinct_values(datasets: DatasetDict, batch_size: int) -> None:
    """Warn of data sets with so few distinct values that batches, which hold no duplicates, stay small.

    :raises UsageError: If a data set cannot give every device a row.
    """
    devices = PartialState().num_processes
    for name, dataset in datasets.items():
        columns = [column for column in dataset.column_names if column != "label"]
        distinct, column = min((len({str(value) for value in dataset[column]}), column) for column in columns)
        fault = f"Subset {name!r} has {distinct} different {column} in {len(dataset)} rows"
        if distinct < devices:
            raise UsageError(
                f"{fault}; a batch holds no duplicates and needs one for each of the {devices} devices. Leave the "
                "subset out of the contrastive stage."
            )
        if distinct < min(batch_size, len(dataset)):
            logger.warning(
                "%s: a batch holds no duplicates, so its batches have at most %d rows, not %d.",
                fault, distinct, batch_size,
            )  # fmt: skip
