"""Collate the batches of stage 3 for sentence-transformers, from rows that the data loader's workers read."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.errors import CocoaError
from cocoa_embed.train.data.broken_rows import ReplaceBroken
from cocoa_embed.train.data.row_table import RowTable, digest
from cocoa_embed.train.data.rows import Draw, Example
from cocoa_embed.train.loop.batch_facts import DescribedBatches
from cocoa_embed.train.stages.bridge.collator import BridgeCollator
from cocoa_embed.train.stages.contrastive.inputs import keep_on_host
from cocoa_embed.train.stages.contrastive.reconstruction_term import masked_column


@dataclass(kw_only=True)
class PairCollator(SentenceTransformerDataCollator):
    """The collator of sentence-transformers, with ``BatchFacts`` in each batch.

    It takes numbers of pairs. A number is ``row + side * rows + turn * 2 * rows``: side is 1 for a row seen from its
    positive, and each turn masks the row differently. The epoch of the pair's draw is ``side + 2 * turn``. Columns are
    ``anchor``, ``positive``, ``negative_1``..., and ``label`` identifies the content of each item of a row (its full
    text and the patches of its images), int64 ``[B, items]``.

    :param hard_negatives: The most of a row's negatives to use.
    :param flops_of: Returns the FLOPs of training on a batch.
    :param lengths_of: Returns the number of tokens of each row. A batch is sorted by them, so that rows that run at
        once have similar lengths; the order does not matter to in-batch losses.
    :param on_bad_row: What happens at a row whose image proves broken.
    :param masking: The collator of masked rows, if their reconstruction is a term of the loss.
    """

    rows: RowTable
    hard_negatives: int = 0
    flops_of: Callable[[dict[str, Any]], float] | None = None
    lengths_of: Callable[[Sequence[Row]], Sequence[int]] | None = None
    on_bad_row: str = "stop"
    masking: BridgeCollator | None = None

    def __call__(self, features: list[dict[str, int]]) -> dict[str, Any]:
        """Collate pairs."""
        pairs = [self._pair(*divmod(feature["row"], len(self.rows))) for feature in features]
        lengths = None if self.lengths_of is None else self.lengths_of([row for _, row in pairs])
        order = range(len(pairs)) if lengths is None else np.argsort(lengths, kind="stable").tolist()
        usable = ReplaceBroken(self._collate, self._after, self.on_bad_row, len(self.rows))
        described = DescribedBatches(usable, self.flops_of)
        return described([pairs[place] for place in order])

    def _pair(self, epoch: int, place: int) -> Example:
        row = self.rows[place]
        return Draw(place, epoch), row.reversed() if epoch % 2 else row

    def _after(self, pair: Example) -> Example:
        """Return the next pair that may share the batch: of the same side and subset, with equally many negatives.

        :raises CocoaError: If there is none.
        """
        (place, epoch), row = pair
        for step in range(1, len(self.rows)):
            draw, other = self._pair(epoch, (place + step) % len(self.rows))
            if self._kind(other) == self._kind(row):
                return draw, other
        raise CocoaError(f"{row.source}: no other row can replace this one.")

    def _kind(self, row: Row) -> tuple[str, int]:
        return row.subset, min(len(row.negatives), self.hard_negatives)

    def _collate(self, pairs: list[Example]) -> dict[str, Any]:
        sides = [(row.query, row.positive, *row.negatives[: self.hard_negatives]) for _, row in pairs]
        names = ["anchor", "positive", *(f"negative_{place}" for place in range(1, len(sides[0]) - 1))]
        batch = super().__call__([dict(zip(names, items, strict=True)) for items in sides])
        columns = zip(names, zip(*sides, strict=True), strict=True)
        contents = [pixel_content_ids(items, batch, name) for name, items in columns]
        if self.masking is not None:
            batch |= masked_column(self.masking, pairs)
        return {**keep_on_host(batch), "label": torch.tensor(contents).T.contiguous()}


def pixel_content_ids(items: Sequence[Item], batch: dict[str, Any], column: str) -> list[int]:
    """Return numbers that are equal for equal items of a column: of the same text, and images of equal pixels."""
    images: Iterator[list[int]] = iter(())
    if f"{column}_pixel_values" in batch:
        images = iter(batch[f"{column}_image_digests"].tolist())
    return [digest(json.dumps([item.full_text, *islice(images, len(item.images))])) for item in items]
