"""Storage backends of a collection. A new one needs a module with ``open_collection`` and a line in ``BACKENDS``."""

from importlib import import_module
from typing import Any

from cocoa_embed.errors import UsageError
from cocoa_embed.integrations.qdrant.stores.checks import check_collection_name, check_folder
from cocoa_embed.integrations.qdrant.stores.options import StoreOptions
from cocoa_embed.integrations.qdrant.stores.store import Store

BACKENDS = {"client": "given_client", "path": "local", "url": "server", "edge": "edge"}
"""The module of each backend, by the keyword that gives its location; imported when needed, like their packages."""


def open_store(*, collection: str, options: StoreOptions | None = None, **locations: Any) -> Store:
    """Return a collection in one of the storage backends; nothing is opened yet.

    :param options: How to connect and how a new collection keeps its vectors.
    :param locations: One of ``client`` (a ``QdrantClient``, which the caller closes), ``path`` (the folder of a local
        store), ``url`` (the address of a server) and ``edge`` (the folder of Qdrant Edge shards).
    :raises UsageError: If not exactly one location is given, or if one of the arguments is invalid.
    :raises MissingExtraError: If a package that the backend needs is not installed.
    """
    given = {name: location for name, location in locations.items() if location is not None}
    if len(given) != 1:
        raise UsageError(f"{len(given)} storage locations were given; give one of {', '.join(BACKENDS)}")
    check_collection_name(collection)
    ((name, location),) = given.items()
    if name in ("path", "edge"):
        check_folder(location, name)
    backend = import_module(f"{__name__}.{BACKENDS[name]}")
    return backend.open_collection(location, collection, options or StoreOptions())
