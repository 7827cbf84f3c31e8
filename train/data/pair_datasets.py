"""Rows as the pairs that sentence-transformers trains on: plain records in data sets, read batch by batch."""

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
from cocoa_embed.train.settings import ContrastiveSection

logger = logging.getLogger(__name__)


class ItemPreprocessor:
    """Turn stored items into what the model's own ``preprocess`` takes; images are read here, batch by batch.

    :param stored: Those images that are kept inside tables, by their names; any other name is a path.
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
    """The collator of sentence-transformers, whose batches say what they hold.

    :param flops_of: Tells what a batch takes to train on.
    :param lengths: Tokens of each row, by its number. Pairs are put in their order within a batch, so that what runs at
        once is of similar length; in-batch losses do not know an order.
    """

    flops_of: Callable[[dict[str, Any]], float] | None = None
    lengths: Sequence[int] | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate pairs."""
        lengths = self.lengths
        if lengths is not None:
            features = sorted(features, key=lambda feature: lengths[feature["label"]])
        return DescribedBatches(super().__call__, _row_numbers, self.flops_of)(features)


def _row_numbers(features: list[dict[str, Any]], batch: dict[str, Any]) -> list[int]:
    return [feature["label"] for feature in features]


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


def distinct_enough(datasets: DatasetDict, batch_size: int) -> DatasetDict:
    """Return the data sets; a batch holds nothing twice, so few different values make small batches, and that is told.

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
