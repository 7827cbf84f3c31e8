"""A collection behind a ``QdrantClient`` that the caller made and closes."""

from qdrant_client import QdrantClient
from qdrant_client.qdrant_remote import QdrantRemote

from cocoa_embed.integrations.qdrant.stores.base import StoreOptions
from cocoa_embed.integrations.qdrant.stores.client import ClientStore
from cocoa_embed.integrations.qdrant.stores.server import ServerStore


def open_collection(client: QdrantClient, collection: str, options: StoreOptions) -> ClientStore:
    """Return a collection behind a client, which may be connected to a server or local."""
    store = ServerStore if isinstance(client._client, QdrantRemote) else ClientStore
    return store("the given client", collection, options, client=client)
