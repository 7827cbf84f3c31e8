import math

import numpy as np
import pytest

from cocoa_embed.evaluation.significance import mean_intervals, sign_flip_p


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def alone(count: int) -> np.ndarray:
    return np.arange(count)


def test_groups_are_resampled_whole() -> None:
    """Five copies of each value hold no more information: the interval over groups is that of the values alone."""
    values = seeded(2).random((60, 1))
    copies = np.repeat(values, 5, axis=0)
    once, whole, naive = (
        mean_intervals(each, groups, seeded(), resamples=4000)[0]
        for each, groups in ((values, alone(60)), (copies, np.repeat(alone(60), 5)), (copies, alone(300)))
    )
    assert whole == pytest.approx(once)
    assert np.ptp(naive) == pytest.approx(np.ptp(once) / math.sqrt(5), rel=0.1)


def test_equal_values_and_a_single_group_give_a_point_and_a_seed_the_same_interval() -> None:
    assert mean_intervals(np.ones((9, 1)), alone(9), seeded()).tolist() == [[1.0, 1.0]]
    values = seeded(4).random((50, 3))
    one_group = np.zeros(50, dtype=int)
    assert mean_intervals(values, one_group, seeded()).T == pytest.approx(np.tile(values.mean(axis=0), (2, 1)))
    assert sign_flip_p(values, one_group, seeded()).tolist() == [1.0] * 3
    first, again, other = (mean_intervals(values, alone(50), seeded(seed)).tolist() for seed in (5, 5, 6))
    assert first == again != other


def test_p_of_no_difference_is_1_and_that_of_the_largest_is_never_0() -> None:
    differences = np.stack([np.zeros(200), np.ones(200)], axis=1)
    assert sign_flip_p(differences, alone(200), seeded(), resamples=999).tolist() == [1.0, 1 / 1000]


def test_the_differences_of_a_group_change_sign_together() -> None:
    differences = np.repeat(seeded(10).normal(0.3, 1.0, size=(12, 1)), 20, axis=0)
    whole = sign_flip_p(differences, np.repeat(alone(12), 20), seeded())
    assert whole == pytest.approx(sign_flip_p(differences[::20], alone(12), seeded()))
    assert sign_flip_p(differences, alone(240), seeded()) < whole / 2
