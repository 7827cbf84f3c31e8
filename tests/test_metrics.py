import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cocoa_embed.evaluation.metrics import ranks, retrieval_metrics


def rank_by_sorting(scores: list[float], relevant: int) -> int:
    """Sort the documents, the relevant one last among its equals, and look where it stands."""
    order = sorted(range(len(scores)), key=lambda column: (-scores[column], column == relevant))
    return order.index(relevant) + 1


@given(
    similarities=st.tuples(st.integers(1, 6), st.integers(1, 8)).flatmap(
        lambda shape: arrays(np.float32, shape, elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]))
    ),
    data=st.data(),
)
def test_ranks_are_those_of_sorting_every_row(similarities: np.ndarray, data: st.DataObject) -> None:
    queries, documents = similarities.shape
    relevant = np.array(data.draw(st.lists(st.integers(0, documents - 1), min_size=queries, max_size=queries)))
    expected = [rank_by_sorting(row.tolist(), column) for row, column in zip(similarities, relevant, strict=True)]
    assert ranks(similarities, relevant).tolist() == expected


def test_equal_scores_gain_nothing() -> None:
    assert ranks(np.ones((3, 7)), np.arange(3)).tolist() == [7, 7, 7]


def test_a_rank_is_told_by_a_worked_example() -> None:
    similarities = np.array([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1], [0.5, 0.2, 0.5]])
    assert ranks(similarities, np.array([0, 2, 0])).tolist() == [1, 3, 2]


def test_metrics_are_shares_of_ranks_and_the_mean_of_their_inverses() -> None:
    metrics = retrieval_metrics(np.array([1, 2, 6, 11]))
    assert metrics == {
        "recall@1": 0.25,
        "recall@5": 0.5,
        "recall@10": 0.75,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 11) / 4),
    }


@pytest.mark.parametrize(("rank", "expected"), [(1, [1, 1, 1, 1]), (5, [0, 1, 1, 0.2]), (10, [0, 0, 1, 0.1])])
def test_a_cut_off_is_inside_its_recall(rank: int, expected: list[float]) -> None:
    assert list(retrieval_metrics(np.full(9, rank)).values()) == pytest.approx(expected)


def test_random_scores_are_found_as_often_as_chance_has_it() -> None:
    generator = np.random.default_rng(0)
    metrics = retrieval_metrics(ranks(generator.normal(size=(2000, 50)), generator.integers(0, 50, size=2000)))
    assert metrics["recall@1"] == pytest.approx(1 / 50, abs=0.01)
    assert metrics["recall@10"] == pytest.approx(10 / 50, abs=0.03)
    assert metrics["mrr"] == pytest.approx(sum(1 / rank for rank in range(1, 51)) / 50, abs=0.015)


@pytest.mark.parametrize(("shape", "relevant"), [((3, 4), 2), ((3, 4), 4), ((3,), 3), ((3, 4, 1), 3)])
def test_shapes_that_do_not_fit_are_refused_with_both(shape: tuple[int, ...], relevant: int) -> None:
    with pytest.raises(ValueError, match=rf"\({', '.join(map(str, shape))},?\) for {relevant} relevant"):
        ranks(np.zeros(shape), np.zeros(relevant, dtype=np.int64))


def test_embeddings_that_are_no_numbers_do_not_count_as_found() -> None:
    """A comparison with NaN is false: counted as it is, a model that diverged would be right every time."""
    similarities = np.full((2, 3), np.nan)
    with pytest.raises(ValueError, match=r"(?i)nan|finite"):
        ranks(similarities, np.array([0, 1]))
