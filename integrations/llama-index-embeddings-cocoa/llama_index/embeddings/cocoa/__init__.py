"""CocoaEmbedding where LlamaIndex's integrations have it."""

from cocoa_embed.integrations.llama_index import CocoaEmbedding

__all__ = ["CocoaEmbedding"]
