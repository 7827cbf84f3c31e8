"""A collection accessed through a ``QdrantClient`` that the caller made and closes."""

from pathlib import Path

from qdrant_client import AsyncQdrantClient, QdrantClient
from qdrant_client.qdrant_remote import QdrantRemote

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.qdrant.stores.client import ClientStore
from cocoa_embed.integrations.qdrant.stores.local import InMemoryStore
from cocoa_embed.integrations.qdrant.stores.options import CREATE_KEYS, StoreOptions
from cocoa_embed.integrations.qdrant.stores.server import ServerStore


def open_collection(client: QdrantClient, collection: str, options: StoreOptions) -> ClientStore:
    """Return a collection accessed through a client, which may be connected to a server or local.

    :raises UsageError: If it is an asynchronous client, or a location.
    """
    if isinstance(client, (AsyncQdrantClient, str, Path)):
        raise UsageError(
            f"client is of type {type(client).__name__}; give a qdrant_client.QdrantClient, or an address as url; the"
            " asynchronous methods (asearch) use it too"
        )
    if isinstance(client._client, QdrantRemote):
        options.refuse("a given client", ("prefer_grpc",), "a client with prefer_grpc=True")
        return ServerStore("the given client", collection, options, client._client.rest_uri, client=client)
    options.refuse("a local client", ("prefer_grpc", *CREATE_KEYS), "one that is connected to a server")
    return InMemoryStore("the given client", collection, options, client=client)
