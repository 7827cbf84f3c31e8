"""How embeddings lie on the sphere: pure functions of float arrays ``[n, D]`` whose rows are of length one."""

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = "alignment"
UNIFORMITY = "uniformity"
MODALITY_GAP = "modality_gap"
EFFECTIVE_RANK = "effective_rank"

ROWS_AT_ONCE = 512
"""Rows whose distances to all others are in memory together."""


def alignment(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return the mean squared distance of the pairs (Wang and Isola 2020, alpha 2), in [0, 4]; 0 where all are equal.

    :param first: float ``[n, D]``; each row's partner is the same row of ``second``.
    :raises ValueError: If the shapes differ, there is no row, or a value is not finite.
    """
    first, second = _checked(first, 1), _checked(second, 1)
    if first.shape != second.shape:
        raise ValueError(f"pairs need two sides of one shape, got {first.shape} and {second.shape}")
    return float(((first - second) ** 2).sum(axis=1).mean())


def uniformity(embeddings: NDArray[np.floating]) -> float:
    """Return the log of the mean of ``exp(-2 d**2)`` over all pairs of different rows (Wang and Isola 2020, t 2).

    It is 0 where all embeddings are equal, -4 where any two are orthogonal, and in [-8, 0].

    :param embeddings: float ``[n, D]``, two rows or more.
    :raises ValueError: If there are fewer, or a value is not finite.
    """
    embeddings = _checked(embeddings, 2)
    squares = (embeddings**2).sum(axis=1)
    total = -np.inf
    for start in range(0, len(embeddings), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        products = embeddings[some] @ embeddings[start:].T
        # Rounding can make the distance of two equal embeddings a little less than nothing.
        distances = np.maximum(squares[some, None] + squares[None, start:] - 2 * products, 0)
        later = np.triu(np.ones(distances.shape, dtype=bool), k=1)
        if later.any():
            total = np.logaddexp(total, _log_sum_exp(-2 * distances[later]))
    return float(total - np.log(len(embeddings) * (len(embeddings) - 1) / 2))


def modality_gap(images: NDArray[np.floating], texts: NDArray[np.floating]) -> float:
    """Return the distance of the two centroids (Liang et al. 2022), in [0, 2].

    :param images: float ``[images, D]``.
    :param texts: float ``[texts, D]``.
    :raises ValueError: If their widths differ, one side has no row, or a value is not finite.
    """
    images, texts = _checked(images, 1), _checked(texts, 1)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"images have {images.shape[1]} dimensions and texts {texts.shape[1]}")
    return float(np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0)))


def effective_rank(embeddings: NDArray[np.floating]) -> float:
    """Return the exponential of the entropy of the singular values, divided by their sum (Roy and Vetterli 2007).

    It is how many directions the embeddings use about equally, from 1 to the smaller of ``n`` and ``D``. They are not
    centred first: a direction that all of them share counts.

    :param embeddings: float ``[n, D]``.
    :raises ValueError: If all are zero, there is no row, or a value is not finite.
    """
    values = np.linalg.svd(_checked(embeddings, 1), compute_uv=False)
    if not values.any():
        raise ValueError("embeddings that are all zero have no rank")
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def geometry(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    *,
    first_has_image: NDArray[np.bool_],
    second_has_image: NDArray[np.bool_],
) -> dict[str, float]:
    """Return the four figures of pairs by their names in the log.

    Uniformity is the mean over the two sides, the effective rank is that of both sides together. The modality gap is
    between items with an image and items of text alone; it is left out where all items are of one kind.

    :param first: float ``[n, D]``, two rows or more; each row's partner is the same row of ``second``.
    :param first_has_image: Which of ``first`` are of an image, alone or with a text; bool ``[n]``.
    :param second_has_image: The same of ``second``.
    :raises ValueError: If the shapes do not fit, there are fewer than two pairs, or a value is not finite.
    """
    figures = {ALIGNMENT: alignment(first, second), UNIFORMITY: (uniformity(first) + uniformity(second)) / 2}
    together = np.concatenate([first, second])
    has_image = np.concatenate([first_has_image, second_has_image])
    if len(has_image) != len(together):
        raise ValueError(f"{len(has_image)} items are said to have an image or none, and there are {len(together)}")
    if has_image.any() and not has_image.all():
        figures[MODALITY_GAP] = modality_gap(together[has_image], together[~has_image])
    return {**figures, EFFECTIVE_RANK: effective_rank(together)}


def _log_sum_exp(exponents: NDArray[np.float64]) -> float:
    largest = exponents.max()
    return float(largest + np.log(np.exp(exponents - largest).sum()))


def _checked(embeddings: NDArray[np.floating], fewest: int) -> NDArray[np.float64]:
    if embeddings.ndim != 2 or len(embeddings) < fewest:
        raise ValueError(f"embeddings must be [n, D] with n of {fewest} or more, got {embeddings.shape}")
    if not np.isfinite(embeddings).all():
        raise ValueError("embeddings are not finite; the model that made them is broken")
    return embeddings.astype(np.float64)
