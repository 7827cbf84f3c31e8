"""Retrieval metrics: pure functions of similarities and of ranks. Ranks begin at 1."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

METRICS = ("recall@1", "recall@5", "recall@10", "hit@1", "hit@5", "hit@10", "mrr", "ndcg@10")

CUT_OFFS = (1, 5, 10)

DECIMALS = 9
"""Cosines are rounded to these: sums of equal products differ behind them, by the order in which BLAS adds."""


def cosine_similarities(queries: NDArray[np.floating], documents: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the cosine of each query with each document; equal embeddings get equal ones. A zero embedding has 0.

    :param queries: float ``[queries, dimension]``.
    :param documents: float ``[documents, dimension]``.
    :return: float64 ``[queries, documents]``, in [-1, 1].
    """
    return np.round(_unit(queries) @ _unit(documents).T, DECIMALS)


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    doubles = vectors.astype(np.float64)
    lengths = np.linalg.norm(doubles, axis=1, keepdims=True)
    return doubles / np.where(lengths == 0, 1.0, lengths)


def ranks(similarities: NDArray[np.floating], relevant: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the rank of each query's relevant document, 1 for the best.

    A document that scores the same as the relevant one counts as before it, so that equal embeddings gain nothing.

    :param similarities: float ``[queries, documents]``.
    :param relevant: Column of each query's relevant document, int ``[queries]``.
    :raises ValueError: If the shapes do not fit, or a similarity is not finite.
    """
    if similarities.ndim != 2 or len(similarities) != len(relevant):
        raise ValueError(f"similarities {similarities.shape} for {len(relevant)} relevant documents")
    _require_finite(similarities)
    scores = similarities[np.arange(len(relevant)), relevant]
    return (similarities >= scores[:, None]).sum(axis=1)


def ranks_of_relevant(similarities: NDArray[np.floating], relevant: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the ranks of all documents that are relevant to one query, best first.

    A document that is not relevant counts as before a relevant one that scores the same, as in ``ranks``.

    :param similarities: Of the query with each document, float ``[documents]``.
    :param relevant: Columns of the relevant documents, distinct, at least one; int ``[relevant]``.
    :raises ValueError: If none is relevant, or a similarity is not finite.
    """
    if len(relevant) == 0:
        raise ValueError("a query without a relevant document has no ranks")
    _require_finite(similarities)
    scores = np.sort(similarities[relevant])[::-1]
    as_good = (similarities >= scores[:, None]).sum(axis=1)
    as_good_and_relevant = (scores >= scores[:, None]).sum(axis=1)
    return as_good - as_good_and_relevant + np.arange(1, len(scores) + 1)


def _require_finite(similarities: NDArray[np.floating]) -> None:
    if not np.isfinite(similarities).all():
        raise ValueError("similarities are not finite; the model that made them is broken")


def retrieval_metrics(rank: NDArray[np.integer]) -> dict[str, float]:
    """Return recall@1, recall@5, recall@10 and the mean reciprocal rank from ``ranks``, each in [0, 1]."""
    metrics = {f"recall@{cut_off}": float((rank <= cut_off).mean()) for cut_off in CUT_OFFS}
    return {**metrics, "mrr": float((1.0 / rank).mean())}


def hits(found: Sequence[NDArray[np.integer]], cut_off: int) -> NDArray[np.float64]:
    """Return for each query whether a relevant document is among the first ``cut_off``: hit@k, 1.0 or 0.0.

    It is what image retrieval (COCO, Flickr30k) calls R@k.

    :param found: The ranks of each query's relevant documents, best first, from ``ranks_of_relevant``.
    """
    return np.array([float(each[0] <= cut_off) for each in found])


def recalls(found: Sequence[NDArray[np.integer]], cut_off: int) -> NDArray[np.float64]:
    """Return for each query the share of its relevant documents that is among the first ``cut_off``: recall@k."""
    return np.array([(each <= cut_off).mean() for each in found])


def reciprocal_ranks(found: Sequence[NDArray[np.integer]]) -> NDArray[np.float64]:
    """Return for each query one divided by the rank of its best relevant document; their mean is the MRR."""
    return np.array([1.0 / each[0] for each in found])


def ndcgs(found: Sequence[NDArray[np.integer]], cut_off: int) -> NDArray[np.float64]:
    """Return for each query nDCG@k with relevance 0 or 1 (Järvelin and Kekäläinen 2002, discount log2(rank + 1)).

    It is the sum of the discounts of the relevant documents among the first ``cut_off``, divided by the largest that
    this sum could be.
    """
    discounts = 1.0 / np.log2(np.arange(2, cut_off + 2))
    ideal = np.cumsum(discounts)
    gains = [discounts[each[each <= cut_off] - 1].sum() / ideal[min(len(each), cut_off) - 1] for each in found]
    return np.array(gains)


def query_metrics(found: Sequence[NDArray[np.integer]]) -> dict[str, NDArray[np.float64]]:
    """Return the metrics of each query by their names: recall@k, hit@k and ndcg@k at ``CUT_OFFS``, and mrr.

    :param found: The ranks of each query's relevant documents, best first.
    :return: float ``[queries]`` each, in [0, 1]; their means are the metrics of all queries.
    """
    return {
        **{f"recall@{cut_off}": recalls(found, cut_off) for cut_off in CUT_OFFS},
        **{f"hit@{cut_off}": hits(found, cut_off) for cut_off in CUT_OFFS},
        "mrr": reciprocal_ranks(found),
        **{f"ndcg@{cut_off}": ndcgs(found, cut_off) for cut_off in CUT_OFFS},
    }
