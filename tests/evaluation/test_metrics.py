import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cocoa_embed.evaluation.metrics import (
    CUT_OFFS,
    cosine_similarities,
    hits,
    ndcgs,
    query_metrics,
    ranks,
    ranks_of_relevant,
    recalls,
    reciprocal_ranks,
    retrieval_metrics,
)


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


@st.composite
def scored_queries(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of one query, with ties, and the columns of its relevant documents."""
    scores = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=14))
    relevant = draw(st.lists(st.integers(0, len(scores) - 1), min_size=1, max_size=len(scores), unique=True))
    return np.array(scores), np.array(relevant)


@given(query=scored_queries())
def test_ranks_of_relevant_are_those_of_sorting_with_relevant_ones_last_among_equals(
    query: tuple[np.ndarray, np.ndarray],
) -> None:
    scores, relevant = query
    order = sorted(range(len(scores)), key=lambda column: (-scores[column], column in relevant))
    assert ranks_of_relevant(scores, relevant).tolist() == [
        place for place, column in enumerate(order, 1) if column in relevant
    ]


@given(query=scored_queries())
def test_one_relevant_document_has_the_rank_that_ranks_gives(query: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = query
    assert ranks_of_relevant(scores, relevant[:1]).tolist() == ranks(scores[None], relevant[:1]).tolist()


@given(query=scored_queries())
def test_metrics_are_those_of_walking_down_the_list(query: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = query
    order = sorted(range(len(scores)), key=lambda column: (-scores[column], column in relevant))
    is_relevant = [column in relevant for column in order]
    measured = query_metrics([ranks_of_relevant(scores, relevant)])
    for cut_off in CUT_OFFS:
        first = is_relevant[:cut_off]
        gain = sum(math.log(2) / math.log(place + 1) for place, each in enumerate(first, 1) if each)
        best = sum(math.log(2) / math.log(place + 1) for place in range(1, min(len(relevant), cut_off) + 1))
        assert measured[f"hit@{cut_off}"] == [float(any(first))]
        assert measured[f"recall@{cut_off}"] == [pytest.approx(sum(first) / len(relevant))]
        assert measured[f"ndcg@{cut_off}"] == [pytest.approx(gain / best)]
    assert measured["mrr"] == [pytest.approx(1 / (is_relevant.index(True) + 1))]
    assert all(0 <= values[0] <= 1 for values in measured.values())


def test_closed_forms_of_several_relevant_documents() -> None:
    found = [np.array([1, 2, 3]), np.array([2, 4, 11]), np.array([12, 13, 14])]
    assert hits(found, 1).tolist() == [1, 0, 0]
    assert hits(found, 10).tolist() == [1, 1, 0]
    assert recalls(found, 1) == pytest.approx([1 / 3, 0, 0])
    assert recalls(found, 10) == pytest.approx([1, 2 / 3, 0])
    assert reciprocal_ranks(found) == pytest.approx([1, 1 / 2, 1 / 12])
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert ndcgs(found, 10) == pytest.approx([1, (1 / math.log2(3) + 1 / math.log2(5)) / ideal, 0])
    assert ndcgs(found, 1) == pytest.approx([1, 0, 0]), "one place cannot hold three"


def test_ndcg_of_one_relevant_document_is_its_discount() -> None:
    found = [np.array([rank]) for rank in (1, 2, 3, 10, 11)]
    assert ndcgs(found, 10) == pytest.approx([1, 1 / math.log2(3), 0.5, 1 / math.log2(11), 0])


def test_a_query_without_a_relevant_document_is_refused() -> None:
    with pytest.raises(ValueError, match="without a relevant document"):
        ranks_of_relevant(np.ones(3), np.array([], dtype=np.int64))


@pytest.mark.parametrize("count", [1, 3, 17, 1000])
def test_equal_embeddings_have_equal_cosines_wherever_they_stand(count: int) -> None:
    generator = np.random.default_rng(count)
    document = generator.normal(size=771).astype(np.float32)
    similarities = cosine_similarities(generator.normal(size=(5, 771)), np.tile(document, (count, 1)))
    assert (similarities == similarities[:, :1]).all()
    assert ranks(similarities, np.zeros(5, dtype=np.int64)).tolist() == [count] * 5


def test_cosines_do_not_see_length_and_a_zero_embedding_is_like_nothing() -> None:
    queries = np.array([[3.0, 0.0], [0.0, 0.0]])
    documents = np.array([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0], [1.0, 1.0]])
    expected = np.array([[1, 0, -1, math.sqrt(0.5)], [0, 0, 0, 0]])
    np.testing.assert_allclose(cosine_similarities(queries, documents), expected, atol=1e-9)
