"""How embeddings lie on the unit sphere: pure functions of float arrays ``[n, D]`` with rows of unit length."""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from scipy.special import entr, logsumexp

ALIGNMENT = "alignment"
PAIR_RECALL = "pair_recall"
"""The names of the two measures that training refers to."""

TIE = 1e-9
"""Cosines that differ by less count as equal: a matrix product may round equal ones differently."""


def alignment(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return the mean squared distance of pairs (Wang and Isola 2020, alpha 2), in [0, 4].

    It is 0 if the two sides of every pair are equal.

    :param first: float ``[n, D]``; each row is paired with the same row of ``second``.
    :raises ValueError: If the shapes differ, there is no row, or a value is not finite.
    """
    return float(((_checked(first) - _checked(second)) ** 2).sum(axis=1).mean())


def uniformity(embeddings: NDArray[np.floating]) -> float:
    """Return the log of the mean of ``exp(-2 d**2)`` over all pairs of different rows (Wang and Isola 2020, t 2).

    It is in [-8, 0]: 0 if all embeddings are equal, -4 if any two are orthogonal. Memory grows with ``n**2``.

    :param embeddings: float ``[n, D]``, two rows or more.
    :raises ValueError: If there are fewer, or a value is not finite.
    """
    distances = pdist(_checked(embeddings, fewest=2), "sqeuclidean")
    return float(logsumexp(-2 * distances) - np.log(len(distances)))


def modality_gap(images: NDArray[np.floating], texts: NDArray[np.floating]) -> float:
    """Return the distance between the two centroids (Liang et al. 2022), in [0, 2].

    :param images: float ``[images, D]``.
    :param texts: float ``[texts, D]``.
    :raises ValueError: If their widths differ, one side has no row, or a value is not finite.
    """
    return float(np.linalg.norm(_checked(images).mean(axis=0) - _checked(texts).mean(axis=0)))


def effective_rank(embeddings: NDArray[np.floating]) -> float:
    """Return the exponential of the entropy of the normalised singular values (Roy and Vetterli 2007).

    It is roughly the number of directions that the embeddings use equally, from 1 to the smaller of ``n`` and ``D``.
    Embeddings are not centred: a direction that all of them have in common counts.

    :param embeddings: float ``[n, D]``.
    :raises ValueError: If all are zero, there is no row, or a value is not finite.
    """
    values = np.linalg.svd(_checked(embeddings), compute_uv=False)
    if not values.any():
        raise ValueError("embeddings that are all zero have no rank")
    return float(np.exp(entr(values / values.sum()).sum()))


def pair_recall(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return recall@1 among the pairs, the mean of both directions, in [0, 1].

    A tie is a miss, so that recall is 0 if all embeddings are equal. Equal texts of two rows tie.

    :param first: float ``[n, D]``, two rows or more; each is paired with the same row of ``second``.
    :raises ValueError: If the shapes differ, there are fewer rows, or a value is not finite.
    """
    if first.shape != second.shape:
        raise ValueError(f"pairs need two arrays of one shape, got {first.shape} and {second.shape}")
    similarities = _checked(first, fewest=2) @ _checked(second).T
    own = similarities.diagonal().copy()
    np.fill_diagonal(similarities, -np.inf)
    return float(np.mean([own > similarities.max(axis=axis) + TIE for axis in (0, 1)]))


def geometry(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    *,
    first_has_image: NDArray[np.bool_],
    second_has_image: NDArray[np.bool_],
) -> dict[str, float]:
    """Return the measures of pairs, by their names in the log.

    Uniformity is the mean over the two sides; the effective rank is that of both sides together. The modality gap is
    between items with an image and text-only items; it is left out if all items are of one kind.

    :param first: float ``[n, D]``, two rows or more; each row is paired with the same row of ``second``.
    :param first_has_image: Which items of ``first`` have an image, alone or with a text; bool ``[n]``.
    :param second_has_image: The same for ``second``.
    :raises ValueError: If the widths differ, there are fewer than two pairs, or a value is not finite.
    """
    measures = {ALIGNMENT: alignment(first, second), "uniformity": (uniformity(first) + uniformity(second)) / 2}
    together = np.concatenate([first, second])
    has_image = np.concatenate([first_has_image, second_has_image])
    if has_image.any() and not has_image.all():
        measures["modality_gap"] = modality_gap(together[has_image], together[~has_image])
    return {**measures, "effective_rank": effective_rank(together), PAIR_RECALL: pair_recall(first, second)}


def _checked(embeddings: NDArray[np.floating], fewest: int = 1) -> NDArray[np.float64]:
    if embeddings.ndim != 2 or len(embeddings) < fewest:
        raise ValueError(f"embeddings must be [n, D] with n of {fewest} or more, got {embeddings.shape}")
    if not np.isfinite(embeddings).all():
        raise ValueError("embeddings are not finite; the model that made them is broken")
    return embeddings.astype(np.float64)
