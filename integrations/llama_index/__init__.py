"""LlamaIndex: a multimodal embedding, and a retriever over an indexed collection."""

from cocoa_embed.errors import require

require("llama_index.core", "llama-index")

from cocoa_embed.integrations.llama_index.embedding import CocoaEmbedding  # noqa: E402 - after the error
from cocoa_embed.integrations.llama_index.retriever import CocoaRetriever  # noqa: E402

__all__ = ["CocoaEmbedding", "CocoaRetriever"]
