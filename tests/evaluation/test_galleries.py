"""The best and the worst queries are those that a look at every similarity says they are."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored_model import ScoredModel, mosaic

from cocoa_embed.data.rows import Item
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.evaluation.galleries import SHOWN_HITS, QueryGallery, _first
from cocoa_embed.evaluation.pairs import Direction, Pair, evaluate_pairs
from cocoa_embed.report.page import SHOWN_CHARACTERS


def direction(relevant: list[list[int]], documents: int) -> Direction:
    queries = [Item(text=f"query {number}") for number in range(len(relevant))]
    found = [Item(text=f"document {number}") for number in range(documents)]
    return Direction("text_to_text", queries, found, [np.array(own) for own in relevant], np.arange(len(relevant)))


def test_ranks_margins_and_hits_are_those_of_a_sorted_list() -> None:
    generator = np.random.default_rng(0)
    similarities = np.round(generator.normal(size=(40, 30)), 2)
    relevant = [sorted(generator.choice(30, size=generator.integers(1, 3), replace=False).tolist()) for _ in range(40)]
    asked, gallery = direction(relevant, 30), QueryGallery()
    gallery.observe(asked, 0, similarities[:25])
    gallery.observe(asked, 25, similarities[25:])
    worst, best = gallery.galleries(worst=6, best=3)
    expected = []
    for number, (row, own) in enumerate(zip(similarities.tolist(), relevant, strict=True)):
        right = max(row[document] for document in own)
        wrong = [row[document] for document in range(30) if document not in own]
        expected.append((-(1 + sum(score >= right for score in wrong)), right - max(wrong), number))
    expected.sort()
    assert [(-query.rank, query.text) for query in worst.queries if query.rank] == [
        (rank, f"query {number}") for rank, _, number in expected[:6]
    ]
    assert [query.text for query in best.queries] == [f"query {number}" for _, _, number in expected[::-1][:3]]
    assert [query.margin for query in worst.queries] == pytest.approx([margin for _, margin, _ in expected[:6]])
    for query in (*worst.queries, *best.queries):
        scores = [hit.score for hit in query.hits]
        assert scores == sorted(scores, reverse=True)
        assert any(hit.correct for hit in query.hits)
        assert len(query.hits) in (SHOWN_HITS, SHOWN_HITS + 1)
        if len(query.hits) > SHOWN_HITS:
            assert query.hits[-1].correct
            assert query.hits[-1].rank == query.rank
            assert query.rank is not None
            assert query.rank > SHOWN_HITS


@given(
    scores=st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=40),
    count=st.integers(1, 12),
)
def test_the_first_documents_are_those_of_the_whole_list_sorted_however_many_are_equal(
    scores: list[tuple[int, bool]], count: int
) -> None:
    similarities = np.array([score / 2 for score, _ in scores])
    is_wrong = np.array([wrong for _, wrong in scores])
    expected = sorted(range(len(scores)), key=lambda number: (-similarities[number], not is_wrong[number]))
    assert _first(similarities, is_wrong, count) == expected[:count]


def test_no_more_is_sorted_than_may_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_at_once, sort = [], np.lexsort

    def watched(keys: tuple[np.ndarray, ...]) -> np.ndarray:
        sorted_at_once.append(len(keys[0]))
        return np.asarray(sort(keys))

    monkeypatch.setattr(np, "lexsort", watched)
    asked, gallery = direction([[7], [9]], 5000), QueryGallery()
    gallery.observe(asked, 0, np.random.default_rng(0).permutation(10000).reshape(2, 5000) / 10000)
    assert sorted_at_once == [SHOWN_HITS, SHOWN_HITS]


def test_long_texts_are_shortened() -> None:
    def long(name: str) -> Item:
        return Item(text=f"{name} " + "word " * 200)

    documents = [long("right"), Item(text="x" * SHOWN_CHARACTERS)]
    asked = Direction("text_to_text", [long("query")], documents, [np.array([0])], np.array([0]))
    gallery = QueryGallery()
    gallery.observe(asked, 0, np.array([[0.5, 0.25]]))
    (shown,) = gallery.galleries()[0].queries
    assert shown.text is not None
    for text, name in ((shown.text, "query"), (shown.hits[0].caption, "right")):
        assert text.startswith(f"{name} word")
        assert SHOWN_CHARACTERS - 5 <= len(text) <= SHOWN_CHARACTERS
        assert text.endswith("…")
    assert shown.hits[1].caption == "x" * SHOWN_CHARACTERS, "no longer than what is shown"


def test_no_query_is_among_the_best_and_the_worst() -> None:
    asked, gallery = direction([[0], [1], [2]], 3), QueryGallery()
    gallery.observe(asked, 0, np.eye(3))
    worst, best = gallery.galleries()
    assert len(worst.queries) == 2
    assert len(best.queries) == 1
    assert not {query.text for query in worst.queries} & {query.text for query in best.queries}
    assert "closest calls" in worst.note


def test_where_every_document_is_right_there_is_no_margin() -> None:
    asked, gallery = direction([[0, 1]], 2), QueryGallery()
    gallery.observe(asked, 0, np.array([[0.5, 0.25]]))
    (only,) = gallery.galleries()
    assert only.queries[0].margin is None
    assert only.queries[0].rank == 1


def test_a_wrong_document_that_scores_the_same_stands_before_the_right_one() -> None:
    asked, gallery = direction([[1]], 2), QueryGallery()
    gallery.observe(asked, 0, np.array([[0.5, 0.5]]))
    (only,) = gallery.galleries()
    assert only.queries[0].rank == 2
    assert [hit.correct for hit in only.queries[0].hits] == [False, True]


def test_an_evaluation_is_watched_in_both_directions_and_scores_as_it_does_unwatched(tmp_path: Path) -> None:
    pairs = []
    for number, colour in enumerate(["red", "green", "blue", "yellow"] * 3):
        mosaic(number, colour).save(tmp_path / f"{number}.png")
        pairs.append(Pair(Item(text=f"{colour} {number}"), Item(image=tmp_path / f"{number}.png")))
    gallery = QueryGallery()
    watched = evaluate_pairs([Encoder(ScoredModel(), "ours")], pairs, resamples=10, observe=gallery.observe)
    assert watched == evaluate_pairs([Encoder(ScoredModel(), "ours")], pairs, resamples=10)
    galleries = gallery.galleries()
    assert [each.title for each in galleries] == [
        "Text to image: the worst queries",
        "Text to image: the best queries",
        "Image to text: the worst queries",
        "Image to text: the best queries",
    ]
    by_text, by_image = galleries[0].queries[0], galleries[2].queries[0]
    assert by_text.text is not None
    assert by_text.image is None
    assert all(hit.image is not None for hit in by_text.hits)
    assert by_image.image is not None
    assert all(hit.image is None and hit.caption for hit in by_image.hits)
    first = [query.rank == 1 for each in galleries[:2] for query in each.queries]
    assert watched["subsets"]["text_to_image"]["recall@1"] >= sum(first) / 12
