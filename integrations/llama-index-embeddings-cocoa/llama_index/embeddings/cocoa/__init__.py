"""CocoaEmbedding under the import path of LlamaIndex's integrations."""

from cocoa_embed.integrations.llama_index import CocoaEmbedding

__all__ = ["CocoaEmbedding"]
