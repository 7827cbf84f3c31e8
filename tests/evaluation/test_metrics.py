import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_embed.evaluation.metrics import (
    CUT_OFFS,
    chance_metrics,
    cosine_similarities,
    query_metrics,
    ranks_of_relevant,
)


@st.composite
def scored_queries(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of one query, with ties, and the columns of its relevant documents."""
    scores = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=14))
    relevant = draw(st.lists(st.integers(0, len(scores) - 1), min_size=1, max_size=len(scores), unique=True))
    return np.array(scores), np.array(relevant)


@given(query=scored_queries())
def test_metrics_equal_those_of_a_sorted_list_with_relevant_documents_last_among_ties(
    query: tuple[np.ndarray, np.ndarray],
) -> None:
    scores, relevant = query
    order = sorted(range(len(scores)), key=lambda column: (-scores[column], column in relevant))
    is_relevant = [column in relevant for column in order]
    ranks = ranks_of_relevant(scores, relevant)
    assert ranks.tolist() == [rank for rank, each in enumerate(is_relevant, 1) if each]
    measured = query_metrics([ranks])
    for k in CUT_OFFS:
        gain = sum(math.log(2) / math.log(rank + 1) for rank, each in enumerate(is_relevant[:k], 1) if each)
        best = sum(math.log(2) / math.log(rank + 1) for rank in range(1, min(len(relevant), k) + 1))
        assert measured[f"hit@{k}"] == [float(any(is_relevant[:k]))]
        assert measured[f"recall@{k}"] == [pytest.approx(sum(is_relevant[:k]) / len(relevant))]
        assert measured[f"ndcg@{k}"] == [pytest.approx(gain / best)]
    assert measured["mrr"] == [pytest.approx(1 / (is_relevant.index(True) + 1))]


def test_a_query_without_a_relevant_document_or_with_broken_similarities_is_refused() -> None:
    with pytest.raises(ValueError, match="without a relevant document"):
        ranks_of_relevant(np.ones(3), np.array([], dtype=np.int64))
    # A comparison with NaN is false: without the check, a model that diverged would always be right.
    with pytest.raises(ValueError, match="not finite"):
        ranks_of_relevant(np.full(3, np.nan), np.array([0]))


@pytest.mark.parametrize(("relevant", "documents"), [(1, 1), (1, 50), (3, 12), (5, 5), (2, 60)])
def test_chance_is_the_mean_over_all_orders(relevant: int, documents: int) -> None:
    measured = query_metrics([np.array(ranks) for ranks in combinations(range(1, documents + 1), relevant)])
    assert chance_metrics(relevant, documents) == pytest.approx({name: each.mean() for name, each in measured.items()})


@pytest.mark.parametrize("count", [1, 3, 17, 1000])
def test_equal_embeddings_have_equal_cosines_in_any_place(count: int) -> None:
    generator = np.random.default_rng(count)
    document = generator.normal(size=771).astype(np.float32)
    similarities = cosine_similarities(generator.normal(size=(5, 771)), np.tile(document, (count, 1)))
    assert (similarities == similarities[:, :1]).all()
    ranks = [ranks_of_relevant(row, np.array([0])).tolist() for row in similarities]
    assert ranks == [[count]] * 5, "equal embeddings gain nothing"
