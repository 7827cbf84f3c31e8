"""The same points through LlamaIndex's own store and index, both ways; and the traps that remain on its side."""

import asyncio
import json
import uuid
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, colour_image, write_colours

pytest.importorskip("llama_index.vector_stores.qdrant")

from llama_index.core import StorageContext
from llama_index.core.indices import MultiModalVectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import ImageDocument, ImageNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import FilterCondition, MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import AsyncQdrantClient, QdrantClient, models

from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.integrations.llama_index import CocoaEmbedding, CocoaRetriever
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

COLOURS = ("red", "green", "blue", "yellow")

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, each with a caption and two columns."""
    folder = tmp_path / "pictures"
    write_colours(folder, *COLOURS)
    rows = [
        {"file_name": f"{colour}.png", "text": f"a {colour} field", "author": colour[0], "n": number}
        for number, colour in enumerate(COLOURS)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    client = QdrantClient(":memory:")
    yield client
    client.close()


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(FakeModel())


@pytest.fixture
def embedding(encoder: Encoder) -> CocoaEmbedding:
    return CocoaEmbedding(model=encoder)


@pytest.fixture
def indexer(client: QdrantClient, encoder: Encoder, folder: Path) -> QdrantIndexer:
    """The images, indexed by this project."""
    indexer = QdrantIndexer(encoder, client=client)
    indexer.index(folder, progress=False)
    return indexer


def file_of(folder: Path, colour: str) -> str:
    return str(folder / f"{colour}.png")


def paths(nodes: Any) -> list[str]:  # noqa: ANN401 - nodes with scores or without
    return [getattr(node, "node", node).image_path for node in nodes]


def where(condition: str = "and", **values: str | int) -> MetadataFilters:
    filters = [MetadataFilter(key=key.replace("__", "."), value=value) for key, value in values.items()]
    return MetadataFilters(filters=filters, condition=FilterCondition(condition))


# What the indexer wrote, LlamaIndex reads.


def test_the_store_reads_what_the_indexer_wrote(
    indexer: QdrantIndexer, client: QdrantClient, embedding: CocoaEmbedding, folder: Path
) -> None:
    store = QdrantVectorStore("images", client=client)
    query = VectorStoreQuery(query_embedding=embedding.get_query_embedding("blue"), similarity_top_k=2)
    result = store.query(query)
    best = result.nodes[0]
    assert isinstance(best, ImageNode)
    assert (best.image_path, best.text) == (file_of(folder, "blue"), "a blue field")
    (hit,) = indexer.search("blue", limit=1)
    assert (result.ids[0], best.node_id) == (hit.id, hit.id)
    assert result.similarities[0] == pytest.approx(hit.score)
    assert best.resolve_image() == hit.path


def test_the_store_finds_and_deletes_what_the_indexer_wrote(
    indexer: QdrantIndexer, client: QdrantClient, folder: Path
) -> None:
    store = QdrantVectorStore("images", client=client)
    ids = {Path(hit.path).stem: hit.id for hit in indexer.search("red")}
    assert paths(store.get_nodes([ids["red"]])) == [file_of(folder, "red")]
    assert paths(store.get_nodes(filters=where(metadata__author="g"))) == [file_of(folder, "green")]
    assert len(store.get_nodes()) == 4
    (node,) = store.get_nodes([ids["green"]])
    store.delete(node.ref_doc_id)
    store.delete_nodes([ids["red"]])
    assert {Path(hit.path).stem for hit in indexer.search("red")} == {"blue", "yellow"}


def test_the_stores_filters_see_our_keys_where_they_are(
    indexer: QdrantIndexer, client: QdrantClient, embedding: CocoaEmbedding, folder: Path
) -> None:
    """``metadata.`` before a column is the price of LlamaIndex's own store; CocoaRetriever takes it with or without."""
    store = QdrantVectorStore("images", client=client)
    vector = embedding.get_query_embedding("red")

    def found(filters: MetadataFilters) -> set[str]:
        query = VectorStoreQuery(query_embedding=vector, similarity_top_k=9, filters=filters)
        theirs = {Path(path).stem for path in paths(store.query(query).nodes)}
        ours = {Path(path).stem for path in paths(CocoaRetriever(indexer, filters=filters).retrieve("red"))}
        assert theirs <= ours
        return theirs

    assert found(where(relative_path="red.png")) == {"red"}
    assert found(where(path=file_of(folder, "red"), mime="image/png", width=24)) == {"red"}
    assert found(where("or", metadata__author="r", metadata__n=1)) == {"red", "green"}
    assert found(where("not", metadata__author="r")) == {"green", "blue", "yellow"}
    assert found(where(author="r")) == set()
    assert len(CocoaRetriever(indexer, filters=where(author="r")).retrieve("red")) == 1


def test_a_multimodal_index_retrieves_what_the_indexer_wrote(
    indexer: QdrantIndexer, client: QdrantClient, embedding: CocoaEmbedding, folder: Path
) -> None:
    store = QdrantVectorStore("images", client=client)
    index = MultiModalVectorStoreIndex.from_vector_store(
        store, image_vector_store=store, embed_model=embedding, image_embed_model=embedding
    )
    retriever = index.as_retriever(image_similarity_top_k=2)
    assert paths(retriever.text_to_image_retrieve("green"))[0] == file_of(folder, "green")
    assert paths(retriever.image_to_image_retrieve(file_of(folder, "yellow")))[0] == file_of(folder, "yellow")
    ours = CocoaRetriever(indexer, similarity_top_k=2).retrieve("green")
    theirs = retriever.text_to_image_retrieve("green")
    assert [node.node for node in ours] == [node.node for node in theirs]
    assert [node.score for node in ours] == pytest.approx([node.score for node in theirs])
    chosen = index.as_retriever(image_similarity_top_k=9, filters=where(metadata__author="b"))
    assert paths(chosen.text_to_image_retrieve("green")) == [file_of(folder, "blue")]


def test_asynchronously_too(encoder: Encoder, embedding: CocoaEmbedding, folder: Path, tmp_path: Path) -> None:
    """A local store has one client at a time: the indexer's, then LlamaIndex's."""
    with QdrantIndexer(encoder, path=tmp_path / "store") as indexer:
        indexer.index(folder, progress=False)
        ids = {Path(hit.path).stem: hit.id for hit in indexer.search("red")}

    async def retrieve() -> None:
        aclient = AsyncQdrantClient(path=str(tmp_path / "store"))
        store = QdrantVectorStore("images", aclient=aclient)
        index = MultiModalVectorStoreIndex.from_vector_store(
            store, image_vector_store=store, embed_model=embedding, image_embed_model=embedding
        )
        retriever = index.as_retriever(similarity_top_k=1, image_similarity_top_k=1)
        assert paths(await retriever.atext_to_image_retrieve("green")) == [file_of(folder, "green")]
        assert paths(await retriever.aimage_to_image_retrieve(file_of(folder, "blue"))) == [file_of(folder, "blue")]
        assert paths(await store.aget_nodes([ids["red"]])) == [file_of(folder, "red")]
        await store.adelete(ids["red"])
        await store.adelete_nodes([ids["green"]])
        await aclient.close()

    asyncio.run(retrieve())
    with QdrantIndexer(encoder, path=tmp_path / "store") as indexer:
        assert {Path(hit.path).stem for hit in indexer.search("red")} == {"blue", "yellow"}


# What LlamaIndex wrote, this project reads.


def image_nodes(folder: Path) -> list[ImageNode]:
    """The images as LlamaIndex's nodes, each its own document."""
    nodes = [
        ImageNode(id_=str(uuid.uuid4()), image_path=file_of(folder, colour), metadata={"author": colour[0]})
        for colour in COLOURS
    ]
    for node in nodes:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"document {node.image_path}")
    return nodes


def build_index(client: QdrantClient, embedding: CocoaEmbedding, nodes: list) -> MultiModalVectorStoreIndex:
    stores = StorageContext.from_defaults(
        vector_store=QdrantVectorStore("texts", client=client), image_store=QdrantVectorStore("theirs", client=client)
    )
    return MultiModalVectorStoreIndex(nodes, storage_context=stores, embed_model=embedding, image_embed_model=embedding)


def test_a_collection_of_llama_indexs_is_searched(
    client: QdrantClient, encoder: Encoder, embedding: CocoaEmbedding, folder: Path
) -> None:
    nodes = image_nodes(folder)
    build_index(client, embedding, nodes)
    indexer = QdrantIndexer(encoder, client=client, collection="theirs")
    assert [hit.id for hit in indexer.search("green", limit=1)] == [nodes[1].node_id]
    assert [hit.id for hit in indexer.search(image=file_of(folder, "blue"), limit=1)] == [nodes[2].node_id]
    (found,) = CocoaRetriever(indexer, similarity_top_k=1).retrieve("yellow")
    assert isinstance(found.node, ImageNode)
    assert (found.node.image_path, found.node.metadata) == (file_of(folder, "yellow"), {"author": "y"})
    (chosen,) = CocoaRetriever(indexer, filters=where(author="b")).retrieve("yellow")
    assert chosen.node.node_id == nodes[2].node_id


def test_nodes_that_llama_index_adds_to_our_collection_are_found_and_stay(
    indexer: QdrantIndexer, client: QdrantClient, embedding: CocoaEmbedding, folder: Path, tmp_path: Path
) -> None:
    colour_image("red", (40, 40)).save(tmp_path / "other.jpg")
    node = ImageNode(id_=str(uuid.uuid4()), image_path=str(tmp_path / "other.jpg"), text="another red field")
    QdrantVectorStore("images", client=client).add(embedding([node]))
    for _ in range(2):
        assert {hit.id for hit in indexer.search("red", limit=2)} > {node.node_id}
        nodes = CocoaRetriever(indexer, similarity_top_k=2).retrieve("red")
        assert set(paths(nodes)) == {node.image_path, file_of(folder, "red")}
        indexer.index(folder, progress=False)
    assert client.count("images").count == 5


def test_a_pipeline_of_llama_index_fills_a_collection_too(
    client: QdrantClient, encoder: Encoder, embedding: CocoaEmbedding, folder: Path
) -> None:
    """The shortest way for images without words, too, which an index would pass over."""
    nodes = [ImageNode(id_=str(uuid.uuid4()), image_path=file_of(folder, colour)) for colour in COLOURS]
    store = QdrantVectorStore("theirs", client=client)
    IngestionPipeline(transformations=[embedding], vector_store=store, disable_cache=True).run(nodes=nodes)
    ours = CocoaRetriever(QdrantIndexer(encoder, client=client, collection="theirs"), similarity_top_k=1)
    assert paths(ours.retrieve("yellow")) == [file_of(folder, "yellow")]
    assert paths(store.get_nodes([nodes[2].node_id])) == [file_of(folder, "blue")]


def test_no_image_is_put_into_a_payload(indexer: QdrantIndexer, client: QdrantClient) -> None:
    points, _ = client.scroll("images")
    for point in points:
        assert json.loads(point.payload["_node_content"])["image"] is None
        assert len(json.dumps(point.payload)) < 5000


# What LlamaIndex does otherwise than one would think. Where it changes, the README should too.


def test_trap_an_index_passes_over_images_without_words(
    client: QdrantClient, embedding: CocoaEmbedding, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_index(client, embedding, [ImageNode(image_path=file_of(folder, "red"))])
    assert "skipping" in capsys.readouterr().out
    assert not client.collection_exists("theirs")
    build_index(client, embedding, [ImageNode(image_path=file_of(folder, "red"), metadata={"any": "thing"})])
    assert client.count("theirs").count == 1


def test_trap_images_inserted_into_an_index_of_texts_are_found_by_our_retriever_alone(
    client: QdrantClient, encoder: Encoder, embedding: CocoaEmbedding, folder: Path
) -> None:
    index = build_index(client, embedding, [TextNode(text="a text")])
    index.insert_nodes(image_nodes(folder))
    assert client.count("theirs").count == 4
    assert index.as_retriever().text_to_image_retrieve("green") == []
    ours = CocoaRetriever(QdrantIndexer(encoder, client=client, collection="theirs"), similarity_top_k=1)
    assert paths(ours.retrieve("green")) == [file_of(folder, "green")]


def test_trap_deleting_a_node_leaves_its_image(client: QdrantClient, embedding: CocoaEmbedding, folder: Path) -> None:
    first, second, *_ = nodes = image_nodes(folder)
    index = build_index(client, embedding, [TextNode(text="a text"), *nodes])
    index.delete_nodes([first.node_id])
    assert client.count("theirs").count == 4
    index.image_vector_store.delete_nodes([first.node_id])
    index.delete_ref_doc(second.ref_doc_id)
    assert client.count("theirs").count == 2


def test_trap_one_collection_for_texts_and_images_keeps_one_vector_of_each_node(
    client: QdrantClient, embedding: CocoaEmbedding, folder: Path
) -> None:
    store = QdrantVectorStore("both", client=client)
    node = ImageNode(id_=str(uuid.uuid4()), image_path=file_of(folder, "red"), text="blue")
    stores = StorageContext.from_defaults(vector_store=store, image_store=store)
    MultiModalVectorStoreIndex([node], storage_context=stores, embed_model=embedding, image_embed_model=embedding)
    (stored,) = store.get_nodes()
    assert stored.embedding == pytest.approx(embedding.get_image_embedding(node.image_path)), "the text's is gone"


def test_trap_an_image_given_as_bytes_lands_in_the_payload(
    client: QdrantClient, embedding: CocoaEmbedding, folder: Path
) -> None:
    encoded = b64encode(Path(file_of(folder, "red")).read_bytes()).decode()
    node = ImageNode(id_=str(uuid.uuid4()), image=encoded)
    QdrantVectorStore("theirs", client=client).add(embedding([node]))
    (point,), _ = client.scroll("theirs")
    assert encoded in point.payload["_node_content"]


def test_trap_an_image_document_is_no_image_node(
    client: QdrantClient, encoder: Encoder, embedding: CocoaEmbedding, folder: Path
) -> None:
    store = QdrantVectorStore("theirs", client=client)
    document = ImageDocument(id_=str(uuid.uuid4()), image_path=file_of(folder, "red"))
    store.add(embedding([document]))
    with pytest.raises(ValueError, match="TextNode"):
        store.get_nodes()
    (found,) = CocoaRetriever(QdrantIndexer(encoder, client=client, collection="theirs")).retrieve("red")
    assert isinstance(found.node, ImageNode)
    assert found.node.image_path == file_of(folder, "red")


def test_trap_images_are_embedded_with_clip_unless_told_otherwise(
    client: QdrantClient, embedding: CocoaEmbedding
) -> None:
    store = QdrantVectorStore("theirs", client=client)
    with pytest.raises(ImportError, match="clip"):
        MultiModalVectorStoreIndex.from_vector_store(store, image_vector_store=store, embed_model=embedding)


def test_trap_the_store_needs_a_client_of_its_own_to_be_asynchronous(
    indexer: QdrantIndexer, client: QdrantClient, embedding: CocoaEmbedding, folder: Path
) -> None:
    store = QdrantVectorStore("images", client=client)
    query = VectorStoreQuery(query_embedding=embedding.get_query_embedding("blue"))
    with pytest.raises(ValueError, match="aclient"):
        asyncio.run(store.aquery(query))
    found = asyncio.run(CocoaRetriever(indexer, similarity_top_k=1).aretrieve("blue"))
    assert paths(found) == [file_of(folder, "blue")]


def test_trap_the_store_fails_on_points_of_others(
    indexer: QdrantIndexer, client: QdrantClient, embedding: CocoaEmbedding
) -> None:
    vector = embedding.get_text_embedding("red")
    client.upsert("images", points=[models.PointStruct(id=7, vector=vector, payload={"path": "/theirs.png"})])
    with pytest.raises(ValueError, match="TextNode"):
        QdrantVectorStore("images", client=client).get_nodes()
    assert "/theirs.png" in paths(CocoaRetriever(indexer).retrieve("red"))
