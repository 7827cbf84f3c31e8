"""How sure a mean over queries is, and whether two models differ: pure functions with an explicit generator.

Queries of one group (the captions of one image, say) are not independent of each other, so whole groups are drawn. The
collection that is searched is not drawn again: intervals say what other queries of the same kind would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 5000

VALUES_AT_ONCE = 2**22
"""Draws that are held in memory together."""


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """A mean difference of two models on the same queries.

    :param difference: The first model's mean less the second's.
    :param low: The lower end of its confidence interval.
    :param high: The upper end.
    :param p: How often a difference as large comes out, where in truth it is chance which model does better on a group.
    """

    difference: float
    low: float
    high: float
    p: float


def mean_intervals(
    values: NDArray[np.float64],
    groups: NDArray[np.integer],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> list[Interval]:
    """Return a percentile bootstrap interval for the mean of each column.

    Where all values are equal the interval is a point, and says nothing of queries that were not asked.

    :param values: float ``[queries, columns]``.
    :param groups: The group of each query, int ``[queries]``.
    :param level: The share of repetitions whose interval should hold the true mean.
    """
    sums, sizes = group_sums(values, groups)
    means = np.concatenate(
        [counts @ sums / (counts @ sizes)[:, None] for counts in _draws(len(sizes), resamples, generator)]
    )
    ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(float(low), float(high)) for low, high in ends.T]


def paired_differences(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    groups: NDArray[np.integer],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> list[PairedDifference]:
    """Compare two models on the same queries: bootstrap intervals, and two-sided sign-flip permutation tests.

    :param first: One model's values, float ``[queries, columns]``; ``second`` the other's.
    :param groups: The group of each query, int ``[queries]``; the differences of a group change sign together.
    :raises ValueError: If the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"values {first.shape} and {second.shape} are not of the same queries")
    differences = first - second
    intervals = mean_intervals(differences, groups, generator, resamples, level)
    values = sign_flip_p(differences, groups, generator, resamples)
    return [
        PairedDifference(float(mean), interval.low, interval.high, p)
        for mean, interval, p in zip(differences.mean(axis=0), intervals, values, strict=True)
    ]


def sign_flip_p(
    differences: NDArray[np.float64],
    groups: NDArray[np.integer],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
) -> list[float]:
    """Return for each column how often random signs of the groups' differences give a mean as far from zero.

    The observed signs count as one of the draws (Phipson and Smyth 2010), so that p is never 0.

    :param differences: float ``[queries, columns]``.
    """
    sums, _ = group_sums(differences, groups)
    observed = np.abs(sums.sum(axis=0)) * (1 - 1e-12)  # what differs by rounding alone is as far
    as_far = np.zeros(differences.shape[1], dtype=np.int64)
    for count in _chunks(len(sums), resamples):
        signs = generator.integers(0, 2, size=(count, len(sums))) * 2.0 - 1.0
        as_far += (np.abs(signs @ sums) >= observed).sum(axis=0)
    return [float(p) for p in (as_far + 1) / (resamples + 1)]


def group_sums(
    values: NDArray[np.float64], groups: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each group's sums, float ``[groups, columns]``, and its number of queries, float ``[groups]``.

    :raises ValueError: If there are no queries, or not as many groups as queries.
    """
    if len(values) == 0 or len(values) != len(groups):
        raise ValueError(f"{len(values)} queries and {len(groups)} groups of queries")
    _, numbers = np.unique(groups, return_inverse=True)
    sizes = np.bincount(numbers).astype(np.float64)
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, numbers, values)
    return sums, sizes


def _draws(groups: int, resamples: int, generator: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Yield how often each group is drawn in each resample, float ``[some resamples, groups]``."""
    for count in _chunks(groups, resamples):
        drawn = generator.integers(0, groups, size=(count, groups))
        rows = np.arange(count)[:, None] * groups
        counts = np.bincount((drawn + rows).ravel(), minlength=count * groups)
        yield counts.reshape(count, groups).astype(np.float64)


def _chunks(width: int, resamples: int) -> Iterator[int]:
    """Yield numbers of resamples that fit in memory together and sum to ``resamples``."""
    at_once = max(1, VALUES_AT_ONCE // width)
    for first in range(0, resamples, at_once):
        yield min(at_once, resamples - first)
