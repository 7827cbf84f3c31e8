"""Retrieval metrics: pure functions of a similarity matrix."""

import numpy as np
from numpy.typing import NDArray

CUT_OFFS = (1, 5, 10)


def ranks(similarities: NDArray[np.floating], relevant: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the rank of each query's relevant document, 1 for the best.

    A document that scores the same as the relevant one counts as before it, so that equal embeddings gain nothing.

    :param similarities: float ``[queries, documents]``.
    :param relevant: Column of each query's relevant document, int ``[queries]``.
    :raises ValueError: If the shapes do not fit, or a similarity is not finite.
    """
    if similarities.ndim != 2 or len(similarities) != len(relevant):
        raise ValueError(f"similarities {similarities.shape} for {len(relevant)} relevant documents")
    if not np.isfinite(similarities).all():
        raise ValueError("similarities are not finite; the model that made them is broken")
    scores = similarities[np.arange(len(relevant)), relevant]
    return (similarities >= scores[:, None]).sum(axis=1)


def retrieval_metrics(rank: NDArray[np.integer]) -> dict[str, float]:
    """Return recall@1, recall@5, recall@10 and the mean reciprocal rank from :func:`ranks`, each in [0, 1]."""
    metrics = {f"recall@{cut_off}": float((rank <= cut_off).mean()) for cut_off in CUT_OFFS}
    return {**metrics, "mrr": float((1.0 / rank).mean())}
