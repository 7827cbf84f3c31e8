"""The same points through LlamaIndex's own store and index."""

from pathlib import Path

import pytest
from fake_model import COLOURS
from llama_index.core import StorageContext
from llama_index.core.indices import MultiModalVectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import ImageNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

from cocoa_embed.integrations.llama_index import CocoaEmbedding, CocoaRetriever
from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")


def file_of(folder: Path, colour: str) -> str:
    return str(folder / f"{colour}.png")


def retrieve(client: QdrantClient, embedding: CocoaEmbedding, text: str, key: str | None = None) -> list[str]:
    """Return the images that our retriever finds in what LlamaIndex wrote, best first."""
    filters = None if key is None else MetadataFilters(filters=[MetadataFilter(key=key, value=text[0])])
    indexer = QdrantIndexer(embedding.encoder, client=client, collection="theirs")
    return [node.node.image_path for node in CocoaRetriever(indexer, filters=filters).retrieve(text)]


def image_nodes(folder: Path) -> list[ImageNode]:
    """The images as LlamaIndex's nodes, each of its own document."""
    nodes = [ImageNode(image_path=file_of(folder, colour), metadata={"author": colour[0]}) for colour in COLOURS]
    for node in nodes:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"document {node.image_path}")
    return nodes


def test_llama_index_reads_and_deletes_what_the_indexer_wrote(
    indexer: QdrantIndexer, client: QdrantClient, embedding: CocoaEmbedding, folder: Path
) -> None:
    assert len(embedding.encoder.model.documents) == 4
    assert indexer.index(folder, llama_index=True, progress=False).unchanged == 4
    assert len(embedding.encoder.model.documents) == 4, "LlamaIndex's fields are added without embedding anything"
    store = QdrantVectorStore("images", client=client)
    result = store.query(VectorStoreQuery(embedding.get_query_embedding("blue"), similarity_top_k=2))
    (hit,) = indexer.search("blue", limit=1)
    best = result.nodes[0]
    assert isinstance(best, ImageNode)
    assert (best.image_path, best.text, best.node_id) == (hit.path, "a blue field", hit.id)
    assert result.similarities[0] == pytest.approx(hit.score)
    index = MultiModalVectorStoreIndex.from_vector_store(
        store, image_vector_store=store, embed_model=embedding, image_embed_model=embedding
    )
    theirs = index.as_retriever(image_similarity_top_k=2).text_to_image_retrieve("green")
    ours = CocoaRetriever(indexer, 2).retrieve("green")
    assert [each.node.to_dict() for each in ours] == [each.node.to_dict() for each in theirs]
    store.delete(best.ref_doc_id)
    store.delete_nodes([theirs[0].node.node_id])
    assert {Path(hit.path).stem for hit in indexer.search("red")} == {"red", "yellow"}


def test_the_retriever_finds_what_an_index_or_a_pipeline_of_llama_index_wrote(
    client: QdrantClient, embedding: CocoaEmbedding, folder: Path
) -> None:
    store = QdrantVectorStore("theirs", client=client)
    models = {"embed_model": embedding, "image_embed_model": embedding}
    stores = StorageContext.from_defaults(vector_store=QdrantVectorStore("texts", client=client), image_store=store)
    index = MultiModalVectorStoreIndex([TextNode(text="a text")], storage_context=stores, **models)
    index.insert_nodes(image_nodes(folder))
    assert retrieve(client, embedding, "green")[0] == file_of(folder, "green")
    assert retrieve(client, embedding, "blue", "author") == [file_of(folder, "blue")]
    client.delete_collection("theirs")
    without_text = [ImageNode(image_path=node.image_path) for node in image_nodes(folder)]
    store = QdrantVectorStore("theirs", client=client)
    IngestionPipeline(transformations=[embedding], vector_store=store, disable_cache=True).run(nodes=without_text)
    assert retrieve(client, embedding, "yellow")[0] == file_of(folder, "yellow")
