"""Several vectors a point, in every backend: what is stored, and searches that rescore with all of them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fake_qdrant import SIGNATURE, name
from qdrant_client import models

from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.integrations.qdrant.stores.base import NewVector, Point, Query
from cocoa_embed.integrations.qdrant.stores.store import Store

pytestmark = pytest.mark.usefixtures("few_payload_indexes")

VECTORS, DIMENSION, POINTS = 3, SIGNATURE.dimension, 40
SEVERAL = replace(SIGNATURE, vectors=VECTORS)
GENERATOR = np.random.default_rng(0)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


DOCUMENTS = unit(GENERATOR.normal(size=(POINTS, VECTORS, DIMENSION)))
QUERY = unit(GENERATOR.normal(size=(VECTORS, DIMENSION)))


def mean_max_sim(query: np.ndarray, documents: np.ndarray) -> np.ndarray:
    return np.einsum("kd,njd->nkj", query, documents).max(axis=2).mean(axis=1)


@pytest.fixture
def store(opener: Callable[..., Store]) -> Store:
    store = opener()
    store.create(SEVERAL)
    store.insert(
        [
            Point(name(number), vectors, {"path": f"/{number}.png", "mime": "image/png" if number % 2 else "image/gif"})
            for number, vectors in enumerate(DOCUMENTS)
        ]
    )
    return store


def stored_vectors(store: Store) -> dict[str, np.ndarray]:
    return {point.id: np.asarray(point.vectors) for point in store.points(with_vectors=True)}


def test_a_score_is_the_mean_of_the_best_cosines_of_the_stored_vectors(
    store: Store, opener: Callable[..., Store]
) -> None:
    store.finish()
    stored = stored_vectors(store)
    documents = np.stack([stored[name(number)] for number in range(POINTS)])
    np.testing.assert_allclose(documents, DOCUMENTS, atol=1e-6)
    for count in (2, VECTORS):
        expected = mean_max_sim(QUERY[:count], documents)
        order = np.argsort(-expected)
        assert list(order[:5]) != list(np.argsort(-(documents[:, 0] @ QUERY[0]))[:5]), "the first alone finds others"
        for exact in (False, True):
            hits = store.search(Query(QUERY[:count], limit=5, offset=1, exact=exact))
            assert [hit.id for hit in hits] == [name(number) for number in order[1:6]]
            np.testing.assert_allclose([hit.score for hit in hits], expected[order[1:6]], atol=1e-5)
    store.close()
    again = opener()
    assert again.signature() == SEVERAL


def test_one_vector_of_a_query_searches_as_in_a_collection_of_single_vectors(
    store: Store, opener: Callable[..., Store]
) -> None:
    single = opener("single", "other")
    single.create(SIGNATURE)
    single.insert([Point(name(number), vectors[0], {}) for number, vectors in enumerate(DOCUMENTS)])
    query = Query(QUERY[0], limit=7, diversity=0.3)
    found, expected = ([(hit.id, hit.score) for hit in each.search(query)] for each in (store, single))
    assert found == expected
    point = next(store.points(with_vectors=True))
    np.testing.assert_allclose(np.asarray(point.vector), np.asarray(point.vectors)[0], atol=1e-6)


def test_the_first_vector_finds_the_candidates(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cocoa_embed.integrations.qdrant.stores.base.MIN_CANDIDATES", 1)
    candidates = np.argsort(-(DOCUMENTS[:, 0] @ QUERY[0]))[:4]  # of one hit
    scores = mean_max_sim(QUERY, DOCUMENTS)
    assert scores.argmax() not in candidates
    (hit,) = store.search(Query(QUERY, limit=1))
    assert hit.id == name(max(candidates, key=lambda number: scores[number]))
    (hit,) = store.search(Query(QUERY, limit=1, exact=True))
    assert hit.id == name(int(scores.argmax()))


@pytest.mark.parametrize("exact", [False, True])
def test_a_threshold_applies_to_the_mean_and_a_filter_to_the_candidates(store: Store, exact: bool) -> None:
    scores = mean_max_sim(QUERY, DOCUMENTS)
    threshold = float(np.sort(scores)[-6])
    gif = models.Filter(must=[models.FieldCondition(key="mime", match=models.MatchValue(value="image/gif"))])
    expected = [number for number in np.argsort(-scores)[:6] if number % 2 == 0]
    assert 0 < len(expected) < 6
    hits = store.search(Query(QUERY, limit=10, score_threshold=threshold - 1e-6, filter=gif, exact=exact))
    assert [hit.id for hit in hits] == [name(number) for number in expected]


def test_new_vectors_replace_all(store: Store) -> None:
    payload = store.retrieve([name(0)])[name(0)]
    new = unit(GENERATOR.normal(size=(VECTORS, DIMENSION)))
    store.replace_payloads([(name(0), payload, {**payload, "caption": "new"})], {name(0): NewVector("", new)})
    np.testing.assert_allclose(stored_vectors(store)[name(0)], new, atol=1e-6)
    (hit,) = store.search(Query(new[0], limit=1))
    assert (hit.id, hit.payload["caption"]) == (name(0), "new")


def test_another_number_of_vectors_is_refused_with_both_numbers(store: Store, opener: Callable[..., Store]) -> None:
    with pytest.raises(CocoaError, match=r"has 3 vectors per point, but m makes one vector; choose another collection"):
        store.create(SIGNATURE)
    with pytest.raises(CocoaError, match=r"shape \(8,\); expected 3 x 8 finite values; nothing was written"):
        store.insert([Point(name(99), DOCUMENTS[0, 0], {})])
    with pytest.raises(UsageError, match="vectors is 4, but the collection has 3 vectors per point; give 1 to 3"):
        store.search(Query(np.ones((4, DIMENSION), dtype=np.float32), limit=1))
    single = opener("single", "other")
    single.create(SIGNATURE)
    with pytest.raises(CocoaError, match="has one vector per point, but m makes 3 vectors"):
        single.create(SEVERAL)
    with pytest.raises(UsageError, match="vectors is 2, but the collection has one vector per point"):
        single.search(Query(QUERY[:2], limit=1))
