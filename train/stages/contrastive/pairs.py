"""The batches of stage 3 as sentence-transformers takes them, read from the rows in the data loader's workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from cocoa_embed.data.rows import Row
from cocoa_embed.train.data.row_table import RowTable, content_id
from cocoa_embed.train.loop.batch_facts import DescribedBatches


@dataclass(kw_only=True)
class PairCollator(SentenceTransformerDataCollator):
    """The collator of sentence-transformers, with ``BatchFacts`` in each batch.

    It takes row numbers; the number of all rows is added to those seen from the other side. Columns are ``anchor``,
    ``positive``, ``negative_1``..., and ``label`` has the content of each row's items, int64 ``[B, items]``.

    :param hard_negatives: The most of a row's negatives to use.
    :param flops_of: Returns the operations of training on a batch.
    :param lengths_of: Returns the number of tokens of each row. A batch is sorted by them, so that what runs at once is
        of similar length; the order does not matter to in-batch losses.
    """

    rows: RowTable
    hard_negatives: int = 0
    flops_of: Callable[[dict[str, Any]], float] | None = None
    lengths_of: Callable[[Sequence[Row]], Sequence[int]] | None = None

    def __call__(self, features: list[dict[str, int]]) -> dict[str, Any]:
        """Collate pairs."""
        count = len(self.rows)
        numbers = np.array([feature["row"] for feature in features])
        rows = [self.rows[int(number)] for number in numbers % count]
        order = np.arange(len(rows)) if self.lengths_of is None else np.argsort(self.lengths_of(rows), kind="stable")
        pairs = [rows[place].reversed() if numbers[place] >= count else rows[place] for place in order]
        described = DescribedBatches(self._collate, lambda _: (numbers[order] % count).tolist(), self.flops_of)
        return described(pairs)

    def _collate(self, pairs: list[Row]) -> dict[str, Any]:
        return super().__call__([self._record(pair) for pair in pairs])

    def _record(self, row: Row) -> dict[str, Any]:
        items = (row.query, row.positive, *row.negatives[: self.hard_negatives])
        names = ("anchor", "positive", *(f"negative_{place}" for place in range(1, len(items) - 1)))
        return {**dict(zip(names, items, strict=True)), "label": torch.tensor([content_id(item) for item in items])}
