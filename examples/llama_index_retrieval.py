"""Retrieve images in LlamaIndex with CocoaRetriever, and with LlamaIndex's own Qdrant store on the same points.

pip install '.[llama-index,qdrant]' llama-index-vector-stores-qdrant
python examples/llama_index_retrieval.py cocoa-qwen2vl path/to/images "a red circle"
"""

import sys

from llama_index.core.indices import MultiModalVectorStoreIndex
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

from cocoa_embed.errors import CocoaError
from cocoa_embed.integrations.llama_index import CocoaEmbedding, CocoaRetriever
from cocoa_embed.integrations.qdrant import QdrantIndexer


def show(title: str, nodes: list[NodeWithScore]) -> None:
    print(title)
    for found in nodes:
        print(f"  {found.score:.4f}  {found.node.image_path}")


def main(model: str, folder: str, text: str) -> None:
    embedding = CocoaEmbedding(model)
    client = QdrantClient(":memory:")
    indexer = QdrantIndexer(embedding.encoder, client=client)
    for failure in indexer.index(folder, llama_index=True).failed:
        print(f"not indexed: {failure['path']}: {failure['reason']}")

    retriever = CocoaRetriever(indexer, similarity_top_k=3)
    nodes = retriever.retrieve(text)
    show(f"CocoaRetriever, {text!r}:", nodes)
    if nodes:
        query = QueryBundle(text, image_path=nodes[0].node.image_path)
        show("CocoaRetriever, that text with the best image:", retriever.retrieve(query))

    store = QdrantVectorStore("images", client=client)
    index = MultiModalVectorStoreIndex.from_vector_store(
        store, image_vector_store=store, embed_model=embedding, image_embed_model=embedding
    )
    stock = index.as_retriever(image_similarity_top_k=3)
    show(f"LlamaIndex's own index, {text!r}:", stock.text_to_image_retrieve(text))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except CocoaError as error:
        sys.exit(str(error))
