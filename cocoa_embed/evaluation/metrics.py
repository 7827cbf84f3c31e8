"""Retrieval metrics: pure functions of similarities and ranks. Ranks begin at 1."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cocoa_embed.encode.vectors import unit

METRICS = ("recall@1", "recall@5", "recall@10", "hit@1", "hit@5", "hit@10", "mrr", "ndcg@10")
"""The metrics of pairs, in the order of their columns."""

CUT_OFFS = (1, 5, 10)

DECIMALS = 9
"""Cosines are rounded to these: the order of BLAS's sums changes further digits, even for equal embeddings."""


def cosine_similarities(queries: NDArray[np.floating], documents: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the cosine of each query with each document; equal embeddings have equal cosines, a zero embedding 0.

    For several vectors, it is the mean over the query's vectors of the best cosine to one of the document's (mean
    MaxSim).

    :param queries: float ``[queries, dimension]``, or ``[queries, vectors, dimension]``.
    :param documents: float ``[documents, dimension]``, or ``[documents, vectors, dimension]``.
    :returns: float64 ``[queries, documents]``, in [-1, 1].
    """
    queries, documents = unit(queries.astype(np.float64)), unit(documents.astype(np.float64))
    if queries.ndim == 2:
        return np.round(queries @ documents.T, DECIMALS)
    best = np.stack([np.tensordot(each, documents, (1, 2)).max(axis=2) for each in queries.swapaxes(0, 1)])
    return np.round(best.mean(axis=0), DECIMALS)


def ranks_of_relevant(similarities: NDArray[np.floating], relevant: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the ranks of all documents that are relevant to one query, best first.

    A document that is not relevant ranks before a relevant one with the same score, so that a model whose embeddings
    are all equal gains nothing.

    :param similarities: The query's similarity to each document, float ``[documents]``.
    :param relevant: Columns of the relevant documents, distinct, at least one; int ``[relevant]``.
    :raises ValueError: If none is relevant, or a similarity is not finite.
    """
    if len(relevant) == 0:
        raise ValueError("a query without a relevant document has no ranks")
    if not np.isfinite(similarities).all():
        raise ValueError("similarities are not finite; the model that made them is broken")
    scores = np.sort(similarities[relevant])[::-1]
    as_good = (similarities >= scores[:, None]).sum(axis=1)
    as_good_and_relevant = (scores >= scores[:, None]).sum(axis=1)
    return as_good - as_good_and_relevant + np.arange(1, len(scores) + 1)


def query_metrics(ranks: Sequence[NDArray[np.integer]]) -> dict[str, NDArray[np.float64]]:
    """Return the metrics of each query by name: recall@k, hit@k and ndcg@k at ``CUT_OFFS``, and mrr.

    - recall@k: the ratio of the query's relevant documents among the first k.
    - hit@k: 1 if any of them is among the first k, otherwise 0; COCO and Flickr30k call it R@k.
    - mrr: 1 / the rank of the best relevant document.
    - ndcg@k: DCG with relevance 0 or 1 (Järvelin and Kekäläinen 2002, discount log2(rank + 1)) over that of the best
      order.

    :param ranks: The ranks of each query's relevant documents, best first, from ``ranks_of_relevant``.
    :returns: float64 ``[queries]`` by name, in [0, 1]; their means are the metrics of all queries.
    """
    return {
        **{f"recall@{k}": np.array([(each <= k).mean() for each in ranks]) for k in CUT_OFFS},
        **{f"hit@{k}": np.array([float(each[0] <= k) for each in ranks]) for k in CUT_OFFS},
        "mrr": np.array([1.0 / each[0] for each in ranks]),
        **{f"ndcg@{k}": np.array([_ndcg(each, k) for each in ranks]) for k in CUT_OFFS},
    }


def _ndcg(ranks: NDArray[np.integer], k: int) -> float:
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    return float(discounts[ranks[ranks <= k] - 1].sum() / discounts[: len(ranks)].sum())


def chance_metrics(relevant: int, documents: int) -> dict[str, float]:
    """Return the expected metrics of one query when the documents are in random order.

    :param relevant: How many of the ``documents`` are relevant, at least one.
    """
    rank = np.arange(1, documents + 1)
    # The probability that no document up to a rank is relevant, and that the first relevant one has that rank.
    none_yet = np.cumprod(np.maximum(documents - relevant - rank + 1, 0) / (documents - rank + 1))
    is_first = -np.diff(none_yet, prepend=1.0)
    discounts = 1.0 / np.log2(rank + 1)
    ratio = relevant / documents
    return {
        **{f"recall@{k}": min(1.0, k / documents) for k in CUT_OFFS},
        **{f"hit@{k}": float(is_first[:k].sum()) for k in CUT_OFFS},
        "mrr": float((is_first / rank).sum()),
        **{f"ndcg@{k}": float(ratio * discounts[:k].sum() / discounts[: min(relevant, k)].sum()) for k in CUT_OFFS},
    }
