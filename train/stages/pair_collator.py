"""Collates pairs for contrastive training, with the facts of each batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from cocoa_embed.train.loop.batch_facts import DescribedBatches


@dataclass
class PairCollator(SentenceTransformerDataCollator):
    """The collator of sentence-transformers, with the ``BatchFacts`` of each batch.

    :param flops_of: Returns the operations that training on a batch takes.
    :param lengths: Tokens of each row, by its number. Pairs are sorted by length within a batch, so that a mini-batch
        is padded little; in-batch losses ignore the order.
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
