import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_embed.evaluation import significance as bootstrap
from cocoa_embed.evaluation.significance import Interval, group_sums, mean_intervals, paired_differences, sign_flip_p


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def alone(count: int) -> np.ndarray:
    return np.arange(count)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_intervals_hold_the_true_mean_about_as_often_as_they_say(share: float) -> None:
    generator = seeded(1)
    held = 0
    for _ in range(300):
        values = (generator.random((100, 1)) < share).astype(float)
        (interval,) = mean_intervals(values, alone(100), generator, resamples=400)
        held += interval.low <= share <= interval.high
    assert 0.90 <= held / 300 <= 0.985


def test_groups_are_drawn_whole() -> None:
    """Five copies of each value tell no more than one: the interval over groups is that of the values alone."""
    values = seeded(2).random((60, 1))
    (once,) = mean_intervals(values, alone(60), seeded(), resamples=4000)
    copies = np.repeat(values, 5, axis=0)
    (whole,) = mean_intervals(copies, np.repeat(alone(60), 5), seeded(), resamples=4000)
    (naive,) = mean_intervals(copies, alone(300), seeded(), resamples=4000)
    assert whole == pytest.approx(once)
    assert naive.high - naive.low == pytest.approx((once.high - once.low) / math.sqrt(5), rel=0.1)


def test_an_interval_is_near_that_of_the_normal_distribution() -> None:
    values = seeded(3).normal(size=(2000, 2)) * [1, 3] + [0, 10]
    for column, interval in enumerate(mean_intervals(values, alone(2000), seeded())):
        mean, error = values[:, column].mean(), values[:, column].std() / math.sqrt(2000)
        assert interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)


def test_equal_values_give_a_point_and_a_seed_the_same_interval() -> None:
    assert mean_intervals(np.ones((9, 1)), alone(9), seeded()) == [Interval(1.0, 1.0)]
    values = seeded(4).random((50, 3))
    assert mean_intervals(values, alone(50), seeded(5)) == mean_intervals(values, alone(50), seeded(5))
    assert mean_intervals(values, alone(50), seeded(5)) != mean_intervals(values, alone(50), seeded(6))


def test_memory_is_bounded_and_makes_no_difference_to_the_size_of_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = seeded(7).random((80, 1))
    (whole,) = mean_intervals(values, alone(80), seeded(), resamples=3000)
    monkeypatch.setattr(bootstrap, "VALUES_AT_ONCE", 80 * 7)
    (parts,) = mean_intervals(values, alone(80), seeded(), resamples=3000)
    assert parts == pytest.approx(whole, abs=0.01)
    monkeypatch.setattr(bootstrap, "VALUES_AT_ONCE", 1)
    assert len(mean_intervals(values, alone(80), seeded(), resamples=3)) == 1


def test_p_is_near_that_of_all_signs() -> None:
    differences = np.array([0.4, -0.1, 0.3, 0.2, 0.5, -0.2, 0.1, 0.3, 0.25, 0.15])
    signs = itertools.product((-1, 1), repeat=len(differences))
    exact = np.mean([abs(np.dot(each, differences)) >= abs(differences.sum()) - 1e-12 for each in signs])
    assert 0.01 < exact < 0.05
    (p,) = sign_flip_p(differences[:, None], alone(10), seeded(), resamples=20000)
    assert p == pytest.approx(exact, abs=0.005)


def test_equal_models_differ_by_chance_and_different_ones_do_not() -> None:
    values = seeded(8).integers(0, 2, (200, 1)).astype(float)
    (same,) = paired_differences(values, values, alone(200), seeded())
    assert same == (0.0, 0.0, 0.0, 1.0)
    (better,) = paired_differences(np.ones((200, 1)), values, alone(200), seeded(), resamples=999)
    assert better.difference == pytest.approx(1 - values.mean())
    assert 0 < better.low < better.difference < better.high
    assert better.p == 1 / 1000, "never zero"


def test_p_of_no_difference_is_spread_evenly() -> None:
    generator = seeded(9)
    found = [sign_flip_p(generator.normal(size=(30, 1)), alone(30), generator, resamples=199)[0] for _ in range(400)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / 400))


def test_the_differences_of_a_group_change_sign_together() -> None:
    differences = np.repeat(seeded(10).normal(0.3, 1.0, size=(12, 1)), 20, axis=0)
    (whole,) = sign_flip_p(differences, np.repeat(alone(12), 20), seeded())
    (naive,) = sign_flip_p(differences, alone(240), seeded())
    (once,) = sign_flip_p(differences[::20], alone(12), seeded())
    assert whole == once
    assert naive < whole / 2


@given(
    values=st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 4)), min_size=1, max_size=20),
    seed=st.integers(0, 99),
)
def test_an_interval_lies_among_the_values_and_swapping_models_turns_a_difference_round(
    values: list[tuple[float, int]], seed: int
) -> None:
    column = np.array([[value] for value, _ in values])
    groups = np.array([group for _, group in values])
    (interval,) = mean_intervals(column, groups, seeded(seed), resamples=50)
    assert column.min() - 1e-9 <= interval.low <= interval.high <= column.max() + 1e-9
    (there,) = paired_differences(column, 0 * column, groups, seeded(seed), resamples=50)
    (back,) = paired_differences(0 * column, column, groups, seeded(seed), resamples=50)
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert there.p == back.p


def test_group_sums_and_shapes_that_do_not_fit() -> None:
    sums, sizes = group_sums(np.array([[1.0], [2.0], [4.0]]), np.array([7, 3, 7]))
    assert (sums.tolist(), sizes.tolist()) == ([[2.0], [5.0]], [1.0, 2.0])
    with pytest.raises(ValueError, match="3 queries and 2 groups"):
        group_sums(np.ones((3, 1)), alone(2))
    with pytest.raises(ValueError, match="0 queries"):
        group_sums(np.ones((0, 1)), alone(0))
    with pytest.raises(ValueError, match=r"\(3, 1\) and \(2, 1\) are not of the same queries"):
        paired_differences(np.ones((3, 1)), np.ones((2, 1)), alone(3), seeded())
