import asyncio
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from fake_model import FakeModel, colour_image

pytest.importorskip("llama_index.core")
pytest.importorskip("qdrant_client")

from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores import VectorStoreQuery
from qdrant_client import QdrantClient

from cocoa_embed.encoder import Encoder
from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.llama_index import CocoaEmbedding, CocoaRetriever, to_node
from cocoa_embed.integrations.qdrant import Hit, QdrantIndexer

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    files = [str(tmp_path / f"{colour}.png") for colour in COLOURS]
    for colour, file in zip(COLOURS, files, strict=True):
        colour_image(colour).save(file)
    return files


@pytest.fixture
def embedding() -> CocoaEmbedding:
    return CocoaEmbedding("fake", model=FakeModel(), embed_batch_size=3)


@pytest.fixture
def indexed(files: list[str]) -> Iterator[tuple[QdrantIndexer, QdrantClient]]:
    client = QdrantClient(":memory:")
    with QdrantIndexer(FakeModel(), client=client) as index:
        index.index(files, progress=False)
        yield index, client
    client.close()


def model_of(embedding: CocoaEmbedding) -> FakeModel:
    return embedding._encoder.model


def test_a_text_and_an_image_of_it_are_near(embedding: CocoaEmbedding, files: list[str]) -> None:
    query = embedding.get_query_embedding("red")
    images = np.array(embedding.get_image_embedding_batch(files))
    assert isinstance(query, list)
    assert isinstance(query[0], float)
    assert int(np.argmax(images @ query)) == COLOURS.index("red")


def test_queries_and_documents_get_the_prompts_of_their_kind(embedding: CocoaEmbedding, files: list[str]) -> None:
    embedding.get_query_embedding("red")
    embedding.get_text_embedding("blue")
    embedding.get_image_embedding(files[0])
    model = model_of(embedding)
    assert model.queries == [{"text": "red"}]
    assert [sorted(item) for item in model.documents] == [["text"], ["image"]]


def test_a_query_that_is_the_path_of_an_image_stays_text(embedding: CocoaEmbedding, files: list[str]) -> None:
    embedding.get_query_embedding(files[0])
    embedding.get_text_embedding(files[0])
    assert model_of(embedding).queries == model_of(embedding).documents == [{"text": files[0]}]


def test_batches_reach_the_model_as_batches(embedding: CocoaEmbedding, files: list[str]) -> None:
    embedding.get_text_embedding_batch(list(COLOURS))
    embedding.get_image_embedding_batch(files)
    assert model_of(embedding).batches == [3, 1, 3, 1]


def test_async_equals_sync_batch_by_batch_and_never_two_at_once(embedding: CocoaEmbedding, files: list[str]) -> None:
    async def embed() -> tuple[list, ...]:
        return await asyncio.gather(
            embedding.aget_query_embedding("red"),
            embedding.aget_text_embedding("blue"),
            embedding.aget_image_embedding(files[0]),
            embedding.aget_text_embedding_batch(list(COLOURS)),
            embedding.aget_image_embedding_batch(files * 5),
        )

    assert asyncio.run(embed()) == [
        embedding.get_query_embedding("red"),
        embedding.get_text_embedding("blue"),
        embedding.get_image_embedding(files[0]),
        embedding.get_text_embedding_batch(list(COLOURS)),
        embedding.get_image_embedding_batch(files * 5),
    ]
    assert len(model_of(embedding).threads) > 1


def test_a_stream_and_its_file_are_the_same_image(embedding: CocoaEmbedding, files: list[str]) -> None:
    stream = BytesIO(Path(files[1]).read_bytes())
    assert embedding.get_image_embedding(stream) == embedding.get_image_embedding(files[1])


def test_a_broken_image_is_named(embedding: CocoaEmbedding, tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(CocoaError, match=r"page\.jpg: is not an image"):
        embedding.get_image_embedding(str(tmp_path / "page.jpg"))


def test_the_contract_of_llama_index(embedding: CocoaEmbedding) -> None:
    assert isinstance(embedding, MultiModalEmbedding)
    assert CocoaEmbedding.class_name() == "CocoaEmbedding"
    serialised = embedding.to_dict()
    assert serialised["class_name"] == "CocoaEmbedding"
    assert (serialised["model_name"], serialised["embed_batch_size"]) == ("fake", 3)
    assert not any("model" in key and key != "model_name" for key in serialised)
    assert CocoaEmbedding(model=FakeModel()).embed_batch_size == 10


def test_callbacks_are_told_of_embeddings() -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    embedding = CocoaEmbedding("fake", model=FakeModel(), callback_manager=CallbackManager([handler]))
    embedding.get_text_embedding_batch(["red", "blue"])
    assert len(handler.get_event_pairs(CBEventType.EMBEDDING)) == 1


def test_embeddings_may_share_a_model() -> None:
    encoder = Encoder(FakeModel())
    one, other = CocoaEmbedding(model=encoder), CocoaEmbedding(model=encoder)
    assert one.get_text_embedding("red") == other.get_text_embedding("red")
    assert len(encoder.model.documents) == 2


def test_a_model_without_images_or_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CocoaError, match="words does not embed images"):
        CocoaEmbedding("words", model=FakeModel(modalities=["text"]))
    with pytest.raises(CocoaError, match="there is no such model folder"):
        CocoaEmbedding(tmp_path / "none")


def check(nodes: list[NodeWithScore], path: str) -> None:
    assert isinstance(nodes[0].node, ImageNode)
    assert nodes[0].node.image_path == path
    assert nodes[0].node.image is None
    assert nodes[0].node.metadata["relative_path"] == Path(path).name
    assert nodes[0].score > nodes[1].score


def test_the_retriever_takes_text_images_and_both(indexed: tuple, files: list[str]) -> None:
    index, _ = indexed
    retriever = CocoaRetriever(index, similarity_top_k=2)
    queries = [
        ("green", files[1]),
        (QueryBundle("", image_path=files[2]), files[2]),
        (QueryBundle("yellow", image_path=files[3]), files[3]),
        (QueryBundle("a paraphrase", custom_embedding_strs=["red"]), files[0]),
    ]
    for query, path in queries:
        check(retriever.retrieve(query), path)
        assert retriever.retrieve(query) == asyncio.run(retriever.aretrieve(query))
    assert [sorted(item) for item in index.encoder.model.queries[::3]] == [
        ["text"],
        ["image"],
        ["image", "text"],
        ["text"],
    ]


def test_a_node_shows_the_caption_that_metadata_hold_now(indexed: tuple, files: list[str]) -> None:
    index, _ = indexed
    retriever = CocoaRetriever(index, similarity_top_k=1)
    assert retriever.retrieve("green")[0].node.text == ""
    row = {"file_name": "green.png", "text": "a lawn", "licence": "CC0"}
    (Path(files[1]).parent / "metadata.jsonl").write_text(json.dumps(row))
    embedded = len(index.encoder.model.documents)
    assert index.index(files, progress=False).updated == 1
    assert len(index.encoder.model.documents) == embedded
    (found,) = retriever.retrieve("green")
    assert isinstance(found.node, ImageNode)
    assert found.node.image_path == files[1]
    assert found.node.text == found.node.metadata["caption"] == "a lawn"
    shown = found.node.get_content(MetadataMode.LLM)
    assert "a lawn" in shown
    assert "CC0" in shown


def test_the_retriever_keeps_to_its_threshold(indexed: tuple) -> None:
    index, _ = indexed
    assert len(CocoaRetriever(index).retrieve("red")) == 4
    assert len(CocoaRetriever(index, score_threshold=0.999).retrieve("red")) == 1


def test_many_retrievals_at_once(indexed: tuple, files: list[str]) -> None:
    async def retrieve() -> list[list[NodeWithScore]]:
        return await asyncio.gather(*(CocoaRetriever(indexed[0]).aretrieve(colour) for colour in COLOURS * 4))

    found = asyncio.run(retrieve())
    assert [nodes[0].node.image_path for nodes in found] == files * 4


def test_a_point_that_others_wrote_is_named() -> None:
    with pytest.raises(CocoaError, match="point 7 "):
        to_node(Hit(id="7", score=1.0, path="", payload={"path": "x"}))


def test_the_vector_store_of_llama_index_reads_our_points_as_image_nodes(indexed: tuple, files: list[str]) -> None:
    qdrant = pytest.importorskip("llama_index.vector_stores.qdrant")
    index, client = indexed
    store = qdrant.QdrantVectorStore("images", client=client)
    embedding = CocoaEmbedding(model=FakeModel())
    query = VectorStoreQuery(query_embedding=embedding.get_query_embedding("blue"), similarity_top_k=2)
    result = store.query(query)
    assert isinstance(result.nodes[0], ImageNode)
    assert result.nodes[0].image_path == files[2]
    assert result.ids[0] == result.nodes[0].node_id == index.search("blue", limit=1)[0].id
    store.delete(result.nodes[0].ref_doc_id)
    assert client.count("images").count == 3


def test_a_multimodal_index_of_llama_index_retrieves_our_points(indexed: tuple, files: list[str]) -> None:
    qdrant = pytest.importorskip("llama_index.vector_stores.qdrant")
    indices = pytest.importorskip("llama_index.core.indices")
    _, client = indexed
    store = qdrant.QdrantVectorStore("images", client=client)
    embedding = CocoaEmbedding(model=FakeModel())
    index = indices.MultiModalVectorStoreIndex.from_vector_store(
        store, image_vector_store=store, embed_model=embedding, image_embed_model=embedding
    )
    retriever = index.as_retriever(image_similarity_top_k=2)
    check(retriever.text_to_image_retrieve("green"), files[1])
    check(retriever.image_to_image_retrieve(files[3]), files[3])
