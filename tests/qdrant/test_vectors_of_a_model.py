"""A model of several vectors from images to hits: indexed or embedded to files, searched, served and evaluated."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, SeveralVectors, colour_image, write_colours
from qdrant_client import QdrantClient, models

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.errors import CocoaError, UsageError
from cocoa_embed.evaluation.metrics import cosine_similarities
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.integrations.qdrant.shards.embed import embed, plan
from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder
from cocoa_embed.integrations.qdrant.shards.load import load
from cocoa_embed.integrations.qdrant.stores import open_store
from cocoa_embed.serve.batching import Batches, BatchingEncoder
from cocoa_embed.sources.base import SourceOptions
from cocoa_embed.sources.open import all_sources

COLOURS = ("red", "green", "blue", "yellow")
QUERY = "red blue"


@pytest.fixture
def indexer(tmp_path: Path) -> QdrantIndexer:
    write_colours(tmp_path / "colours", *COLOURS)
    indexer = QdrantIndexer(SeveralVectors(), client=QdrantClient(":memory:"))
    indexer.index(tmp_path / "colours", progress=False)
    return indexer


def stored(client: QdrantClient) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the first vector and all of each image, by its file's name."""
    records, _ = client.scroll("images", with_vectors=True)
    vectors: Any = {record.payload["relative_path"]: record.vector for record in records if record.payload}
    return {path: (np.array(each[""]), np.array(each["all"])) for path, each in vectors.items()}


def test_all_vectors_are_stored_and_a_search_by_all_is_their_mean_max_sim(indexer: QdrantIndexer) -> None:
    encoder = Encoder(SeveralVectors())
    vectors = stored(indexer.store._opened)
    for colour in COLOURS:
        expected = encoder.truncate(None, 3).embed_documents([{"image": colour_image(colour)}])[0]
        first, every = vectors[f"{colour}.png"]
        np.testing.assert_allclose(every, expected, atol=1e-6)
        np.testing.assert_allclose(first, expected[0], atol=1e-6)
    query = encoder.truncate(None, 3).embed_queries([{"text": QUERY}])[0]
    for count in (1, 2, 3):
        hits = {Path(hit.path).name: hit.score for hit in indexer.search(QUERY, vectors=count)}
        for path, (first, every) in vectors.items():
            cosines = query[:count] @ (every if count > 1 else first[None]).T
            assert hits[path] == pytest.approx(cosines.max(axis=1).mean(), abs=1e-5)


def test_examples_and_orientations_are_searched_by_all_vectors(indexer: QdrantIndexer) -> None:
    vectors = {path: every for path, (_, every) in stored(indexer.store._opened).items()}
    like = next(hit for hit in indexer.search("red") if hit.path.endswith("red.png"))
    hits = {Path(hit.path).name: hit.score for hit in indexer.search(like=like, vectors=3)}
    assert sorted(hits) == ["blue.png", "green.png", "yellow.png"]
    for path, score in hits.items():
        assert score == pytest.approx((vectors["red.png"] @ vectors[path].T).max(axis=1).mean(), abs=1e-5)
    best = indexer.search(image=colour_image("blue"), any_orientation=True, limit=1, vectors=3)
    assert (Path(best[0].path).name, best[0].score) == ("blue.png", pytest.approx(1, abs=1e-5))


def test_embeddings_in_files_are_those_that_indexing_stores(indexer: QdrantIndexer, tmp_path: Path) -> None:
    folder, client = EmbeddingFolder(str(tmp_path / "out")), QdrantClient(":memory:")
    sources = all_sources([tmp_path / "colours"], SourceOptions())
    list(embed(plan(sources, folder), folder, Encoder(SeveralVectors())))
    load(folder, open_store(collection="images", client=client))
    found, expected = stored(client), stored(indexer.store._opened)
    assert found.keys() == expected.keys()
    for path, pair in found.items():
        for vectors, others in zip(pair, expected[path], strict=True):
            np.testing.assert_allclose(vectors, others, atol=1e-3)  # float16


def test_other_models_and_more_vectors_are_refused_with_the_way_out(indexer: QdrantIndexer, tmp_path: Path) -> None:
    client: Any = indexer.store._opened
    with pytest.raises(
        UsageError, match=r"vectors is 8, but collection 'images' .* has 3 vectors per point; give 1 to 3"
    ):
        indexer.search(QUERY, vectors=8)
    with pytest.raises(UsageError, match="vectors and diversity cannot be combined"):
        indexer.search(QUERY, vectors=2, diversity=0.5)
    one = QdrantIndexer(FakeModel(), client=client)
    with pytest.raises(CocoaError, match="has 3 vectors per point, but the model makes one vector; choose another"):
        one.search(QUERY)
    other = QdrantIndexer(FakeModel(), client=client, collection="single")
    other.index(tmp_path / "colours", progress=False)
    with pytest.raises(UsageError, match=r"has one vector per point; leave vectors out"):
        other.search(QUERY, vectors=2)
    several = QdrantIndexer(SeveralVectors(), client=client, collection="single")
    with pytest.raises(CocoaError, match=r"has one vector per point, .*, or the export of the model with --vectors 1"):
        several.index(tmp_path / "colours", progress=False)
    client.create_collection("foreign", vectors_config=models.VectorParams(size=48, distance=models.Distance.COSINE))
    foreign = QdrantIndexer(SeveralVectors(), client=client, collection="foreign")
    with pytest.raises(CocoaError, match="has one vector per point, but the model makes 3 vectors; choose another"):
        foreign.index(tmp_path / "colours", progress=False)
    of_one = QdrantIndexer(FakeModel(), client=client, collection="foreign")
    assert of_one.index(tmp_path / "colours", progress=False).indexed == 4, "it was not signed for the other model"
    both = QdrantIndexer(SeveralVectors(), client=client, collection="both", embed="both")
    with pytest.raises(UsageError, match="--embed both keeps one vector of an image and one of its caption, but"):
        both.index(tmp_path / "colours", progress=False)


def test_a_caption_in_the_vectors_changes_all_of_them(tmp_path: Path) -> None:
    write_colours(tmp_path / "colours", "red")
    indexer = QdrantIndexer(SeveralVectors(), client=QdrantClient(":memory:"), embed="image+caption")
    for caption in ("blue", "green"):
        (tmp_path / "colours" / "metadata.jsonl").write_text(f'{{"file_name": "red.png", "text": "{caption}"}}')
        indexer.index(tmp_path / "colours", progress=False)
        encoder = Encoder(SeveralVectors()).truncate(None, 3)
        expected = encoder.embed_documents([{"image": colour_image("red"), "text": caption}])[0]
        ((first, every),) = stored(indexer.store._opened).values()
        np.testing.assert_allclose(every, expected, atol=1e-6)
        np.testing.assert_allclose(first, expected[0], atol=1e-6)


def test_a_queue_before_the_model_gives_as_many_vectors() -> None:
    plain = Encoder(SeveralVectors())
    batches = Batches(plain, 60)
    queued, item = BatchingEncoder(batches), [{"text": QUERY}]
    for dimension, count in ((None, 1), (None, 3), (6, 2)):
        found, expected = (each.truncate(dimension, count).embed_queries(item) for each in (queued, plain))
        np.testing.assert_array_equal(found, expected)
    batches.close()


def test_evaluation_compares_several_vectors_by_their_mean_max_sim() -> None:
    generator = np.random.default_rng(0)
    queries, documents = generator.normal(size=(4, 3, 8)), generator.normal(size=(5, 2, 8))
    for query, row in zip(queries, cosine_similarities(queries, documents), strict=True):
        for document, found in zip(documents, row, strict=True):
            best = [max(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in document) for a in query]
            assert found == pytest.approx(np.mean(best))
    one = cosine_similarities(queries[:, :1], documents[:, :1])
    np.testing.assert_array_equal(one, cosine_similarities(queries[:, 0], documents[:, 0]))
