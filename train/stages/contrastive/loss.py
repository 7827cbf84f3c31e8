"""The losses of sentence-transformers, where another right answer is no negative."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import all_gather, cos_sim, get_rank
from torch import Tensor

from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings


class RankingLoss(MultipleNegativesRankingLoss):
    """InfoNCE; ``labels`` are the contents of the rows' items, as ``other_answers`` takes them."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        mask_other_answers(self, labels, rows_at_once=len(labels))
        return super().compute_loss_from_embeddings(embeddings, labels)


class CachedRankingLoss(CachedMultipleNegativesRankingLoss):
    """``RankingLoss`` with cached gradients."""

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:  # noqa: ANN401
        """Return the loss of a batch."""
        mask_other_answers(self, labels, rows_at_once=self.mini_batch_size)
        return super().calculate_loss(reps, labels, with_backward=with_backward)


def mask_other_answers(loss: RankingLoss | CachedRankingLoss, content: Tensor, rows_at_once: int) -> None:
    """Let the loss of the next batch ignore candidates that are other right answers.

    A loss compares ``rows_at_once`` rows of this device at a time with the candidates of all devices: queries with
    documents and, if it is symmetric, all queries with the rows' documents.

    :param content: Of this device's rows, int64 ``[B, items]``.
    """
    size, first = len(content), 0
    if loss.gather_across_devices:
        content, first = all_gather(content), get_rank() * size

    def masks() -> Iterator[Tensor]:
        for begin in range(first, first + size, rows_at_once):
            masked = other_answers(content, slice(begin, min(begin + rows_at_once, first + size)))
            yield masked
            if "doc_to_query" in loss.directions:
                yield masked[:, : len(content)].T

    remaining = masks()
    own: Any = loss  # to which the cached loss passes this attribute on
    own.similarity_fct = lambda these, those: cos_sim(these, those).masked_fill(next(remaining), -torch.inf)


def other_answers(content: Tensor, rows: slice) -> Tensor:
    """Return which candidates of ``rows`` are right answers beside their own, bool ``[rows, B * (items - 1)]``.

    These are candidates that equal the row's positive, and the positives of equal queries.

    :param content: Of each row of the batch the numbers of its query, positive and negatives, int64 ``[B, items]``;
        equal items have equal numbers.
    """
    queries, positives, *negatives = content.T
    query, positive = queries[rows, None], positives[rows, None]
    same = (query == queries) | (positive == positives)
    same[torch.arange(len(same)), torch.arange(len(content))[rows]] = False
    return torch.cat([same, *(positive == each for each in negatives)], dim=1)


def contrastive_loss(
    model: SentenceTransformer, settings: ContrastiveSettings
) -> RankingLoss | CachedRankingLoss | MatryoshkaLoss:
    """Return InfoNCE with in-batch negatives, gathered across devices.

    A query's candidates are all positives and all hard negatives of the batch, without ``other_answers``. The
    ``symmetric`` loss is the mean of that and of matching each positive to its query among the batch's queries; hard
    negatives are matched to nothing. With ``matryoshka_dims`` it is the sum over the whole length and these, cut and
    normalised again.

    Gradients are cached if a batch is larger than ``mini_batch_size``; otherwise the cache gives the same loss and
    gradients, and runs every batch forward twice. On several devices they always are: without the cache a step runs the
    model forward once per column, and DistributedDataParallel expects one forward pass.
    """
    devices, symmetric = PartialState().num_processes, settings.directions == "symmetric"
    how: dict[str, Any] = {
        "scale": 1 / settings.temperature,
        "gather_across_devices": devices > 1,
        "directions": ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",),
        "partition_mode": "per_direction" if symmetric else "joint",
    }
    loss: RankingLoss | CachedRankingLoss
    mini_batch_size = settings.mini_batch_size or settings.batch_size
    if devices == 1 and settings.batch_size <= mini_batch_size:
        loss = RankingLoss(model, **how)
    else:
        loss = CachedRankingLoss(model, mini_batch_size=mini_batch_size, **how)
    dims: set[Any] = {model.get_embedding_dimension(), *(settings.matryoshka_dims or [])}
    return loss if len(dims) < 2 else MatryoshkaLoss(model, loss, sorted(dims, reverse=True))
