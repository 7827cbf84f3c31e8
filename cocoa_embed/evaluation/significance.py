"""Confidence intervals of means over queries, and tests of the difference between two models.

Queries of one group (such as the captions of one image) depend on each other, so whole groups are resampled. The
documents are not resampled: the intervals apply to other queries of the same kind against the same documents.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 5000

VALUES_AT_ONCE = 2**22
"""The number of resampled values that are in memory at once."""


def mean_intervals(
    values: Floats, groups: NDArray[np.integer], generator: np.random.Generator, resamples: int = RESAMPLES
) -> Floats:
    """Return percentile bootstrap intervals of the mean of each column, at ``LEVEL``.

    :param values: float64 ``[queries, columns]``.
    :param groups: The group of each query, int ``[queries]``.
    :returns: The two ends by column, float64 ``[columns, 2]``; both are the mean if there is one group.
    """
    sums, sizes = group_sums(values, groups)
    if len(sums) == 1:  # scipy refuses a single observation
        return np.repeat(values.mean(axis=0)[:, None], 2, axis=1)
    found = stats.bootstrap(
        (sums, np.broadcast_to(sizes[:, None], sums.shape)),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        n_resamples=resamples,
        batch=max(1, VALUES_AT_ONCE // sums.size),
        vectorized=True,
        paired=True,
        axis=0,
        confidence_level=LEVEL,
        method="percentile",
        rng=generator,
    )
    return np.stack(found.confidence_interval, axis=1)


def sign_flip_p(
    differences: Floats, groups: NDArray[np.integer], generator: np.random.Generator, resamples: int = RESAMPLES
) -> Floats:
    """Return two-sided p-values of a permutation test that flips the signs of whole groups, one for each column.

    The observed signs count as one of the resamples (Phipson and Smyth 2010), so that p is never 0. All combinations of
    signs are tried if there are at most ``resamples``.

    :param differences: One model's values minus the other's on the same queries, float64 ``[queries, columns]``.
    :param groups: The group of each query, int ``[queries]``.
    :returns: float64 ``[columns]``.
    """
    sums, _ = group_sums(differences, groups)
    if len(sums) == 1:  # scipy refuses a single observation, whose sign means nothing
        return np.ones(sums.shape[1])
    found = stats.permutation_test(
        (sums,),
        lambda sums, axis: np.abs(sums.sum(axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=resamples,
        batch=max(1, VALUES_AT_ONCE // sums.size),
        vectorized=True,
        axis=0,
        rng=generator,
    )
    return np.asarray(found.pvalue)


def group_sums(values: Floats, groups: NDArray[np.integer]) -> tuple[Floats, Floats]:
    """Return each group's sums, float64 ``[groups, columns]``, and its number of queries, float64 ``[groups]``."""
    _, numbers = np.unique(groups, return_inverse=True)
    sizes = np.bincount(numbers).astype(np.float64)
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, numbers, values)
    return sums, sizes
