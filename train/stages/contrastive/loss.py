"""The losses of sentence-transformers, without other right answers among the negatives."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any, cast

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import RandContext
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator
from sentence_transformers.util import all_gather, cos_sim, get_rank
from torch import Tensor
from torch.nn.functional import normalize

from cocoa_embed.train.stages.contrastive.mini_batches import MOST_ITEMS, TokenLimits, mini_batches, take
from cocoa_embed.train.stages.contrastive.settings import ContrastiveSettings
from cocoa_embed.train.stages.vision_features import FrozenVision


class CachedRankingLoss(CachedMultipleNegativesRankingLoss):
    """InfoNCE with cached gradients over mini-batches of tokens.

    On one device, a batch that is within the limits as a whole is run once, and keeps its graph instead.

    :param limits: The maximum tokens of a mini-batch; they may change between two steps.
    :param vision: The vision encoder, if it is frozen: both passes of a step share its features.
    :param term: Another loss to add (``reconstruct``); it takes the model, a column with ``blocks`` and the limits.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        limits: TokenLimits,
        vision: FrozenVision | None = None,
        term: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, mini_batch_size=MOST_ITEMS, **kwargs)
        self.limits, self._vision, self._term = limits, vision, term
        self.width = cast(int, model.get_embedding_dimension())
        self._parts: list[list[list[int]]] = []

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """Return the loss of a batch.

        :param labels: The content numbers of the rows' items, as in ``other_answers``.
        """
        columns = list(sentence_features)
        if self._vision is not None:
            self._vision.forget()
        if self._term is not None:
            masked = columns.pop() if "blocks" in columns[-1] else None
            return self._term(self.model, masked, self.limits) + self._contrast(columns, labels)
        return self._contrast(columns, labels)

    def _contrast(self, columns: list[dict[str, Any]], labels: Tensor) -> Tensor:
        fits = sum(each["attention_mask"].numel() for each in columns) <= min(self.limits.texts, self.limits.images)
        # DistributedDataParallel expects one forward pass, and here each column is one.
        if fits and torch.is_grad_enabled() and not self.gather_across_devices:
            self._parts = [[list(range(len(labels)))] for _ in columns]
            return self._with_graph(embed_columns(self.model, columns), labels)
        self._parts = [mini_batches(column, self.limits) for column in columns]
        cut = zip(columns, self._parts, strict=True)
        return self.forward_cached([take(column, items) for column, parts in cut for items in parts], labels)

    def _with_graph(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        leaves = [each.detach().requires_grad_() for each in embeddings]
        loss = self.calculate_loss([[leaf] for leaf in leaves], labels, with_backward=True).detach().requires_grad_()
        loss.register_hook(lambda grad: torch.autograd.backward(embeddings, [each.grad * grad for each in leaves]))
        return loss

    def embed_minibatch(  # type: ignore[override]
        self, sentence_feature: dict[str, Any], *, with_grad: bool, copy_random_state: bool, **replayed: Any
    ) -> tuple[Tensor, RandContext | None]:
        """Embed a mini-batch; ``forward_cached`` takes it for a whole column, so it needs no more cutting."""
        with replayed.get("random_state") or nullcontext(), torch.set_grad_enabled(with_grad):
            # The inputs stay on the CPU until the model runs; its weights name the device whose draws are replayed.
            state = RandContext(next(self.model.parameters())) if copy_random_state else None
            return self.model(dict(sentence_feature))["sentence_embedding"], state

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:  # noqa: ANN401
        """Return the loss of the embeddings of all mini-batches, with the rows in the order of ``labels``."""
        mask_other_answers(self, labels)
        remaining = iter(reps)
        embedded = [torch.cat([next(remaining)[0] for _ in parts]) for parts in self._parts]
        orders = [torch.tensor(list(chain.from_iterable(parts)), device=embedded[0].device) for parts in self._parts]
        ordered = zip(embedded, orders, strict=True)
        columns = [column.detach()[order.argsort()].requires_grad_(with_backward) for column, order in ordered]
        loss = super().calculate_loss([[column] for column in columns], labels, with_backward=with_backward)
        if with_backward:
            gradients = zip(columns, orders, strict=True)
            torch.autograd.backward(embedded, [cast(Tensor, column.grad)[order] for column, order in gradients])
        return loss


def mask_other_answers(loss: CachedRankingLoss, content: Tensor) -> None:
    """Make the loss of the next batch ignore candidates that are other right answers.

    A loss compares ``mini_batch_size`` rows of this device at a time with the candidates of all devices: queries with
    documents and, if it is symmetric, all queries with the rows' documents.

    :param content: The content numbers of this device's rows (``other_answers``), int64 ``[B, items]``.
    """
    size, first = len(content), 0
    if loss.gather_across_devices:
        content, first = all_gather(content), get_rank() * size

    def masks() -> Iterator[Tensor]:
        for begin in range(first, first + size, loss.mini_batch_size):
            masked = other_answers(content, slice(begin, min(begin + loss.mini_batch_size, first + size)))
            yield masked
            if "doc_to_query" in loss.directions:
                yield masked[:, : len(content)].T

    remaining = masks()
    own: Any = loss  # which assigns this attribute to the loss that it wraps, but declares it read-only
    own.similarity_fct = lambda these, those: mean_max_sim(these, those, loss.width).masked_fill(
        next(remaining), -torch.inf
    )


def mean_max_sim(queries: Tensor, documents: Tensor, width: int) -> Tensor:
    """Return the mean over a query's vectors of the cosine to the document's nearest vector: ``[queries, documents]``.

    :param queries: ``[queries, n * width]``, with ``n`` vectors each; ``width`` values or fewer are one vector.
    :param documents: ``[documents, n * width]``.
    """
    if queries.shape[1] <= width:
        return cos_sim(queries, documents)
    of_queries, of_documents = (normalize(each.unflatten(1, (-1, width)), dim=2) for each in (queries, documents))
    # One query vector at a time, of which only the maximum is kept: the cosines of all would be n times as many.
    nearest = [torch.einsum("qw,dnw->qdn", each, of_documents).max(dim=2).values for each in of_queries.unbind(dim=1)]
    return torch.stack(nearest).mean(dim=0)


def other_answers(content: Tensor, rows: slice) -> Tensor:
    """Return which candidates of ``rows`` are right answers other than their own, bool ``[rows, B * (items - 1)]``.

    These are candidates that equal the row's positive, and the positives of equal queries.

    :param content: For each row of the batch, the content numbers of its query, positive and negatives, int64
        ``[B, items]``; equal items have equal numbers.
    """
    queries, positives, *negatives = content.T
    query, positive = queries[rows, None], positives[rows, None]
    same = (query == queries) | (positive == positives)
    same[torch.arange(len(same)), torch.arange(len(content))[rows]] = False
    return torch.cat([same, *(positive == each for each in negatives)], dim=1)


def prefixes(count: int) -> list[int]:
    """Return how many of ``count`` vectors are compared: the first 1, 2, 4, ... and all."""
    return sorted({min(2**power, count) for power in range(count.bit_length() + 1)})


def contrastive_loss(
    model: SentenceTransformer,
    settings: ContrastiveSettings,
    limits: TokenLimits,
    vision: FrozenVision | None = None,
    term: Callable[..., Tensor] | None = None,
    eos_tokens: int = 1,
) -> CachedRankingLoss:
    """Return InfoNCE with in-batch negatives, gathered across devices.

    A query's candidates are all positives and all hard negatives of the batch, without ``other_answers``. The
    ``symmetric`` loss is the mean of that and of matching each positive to its query among the batch's queries; hard
    negatives are matched to nothing. With ``matryoshka_dims``, the loss is the sum over embeddings of the whole length
    and of these lengths, cut and normalised again; with several ``eos_tokens``, also over the first 1, 2, 4, ... and
    all vectors.
    """
    symmetric = settings.directions == "symmetric"
    loss = CachedRankingLoss(
        model,
        limits,
        vision,
        term,
        scale=1 / settings.temperature,
        gather_across_devices=PartialState().num_processes > 1,
        directions=("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",),
        partition_mode="per_direction" if symmetric else "joint",
    )
    widths: set[Any] = {*(count * loss.width for count in prefixes(eos_tokens)), *(settings.matryoshka_dims or [])}
    if len(widths) > 1:  # as in MatryoshkaLoss, which itself refuses more values than the model's embedding has
        own: Any = loss
        own.calculate_loss = CachedLossDecorator(loss.calculate_loss, sorted(widths, reverse=True), [1] * len(widths))
    return loss
