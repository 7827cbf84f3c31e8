"""LlamaIndex: a multimodal embedding, and a retriever over an indexed collection."""

from cocoa_embed.integrations.llama_index.embedding import CocoaEmbedding
from cocoa_embed.integrations.llama_index.retriever import CocoaRetriever

__all__ = ["CocoaEmbedding", "CocoaRetriever"]
