"""The options that name a collection, and how commands open it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli.output import silence_libraries
from cocoa_embed.errors import CocoaError, UsageError, printable, require
from cocoa_embed.folders import DEFAULT_INDEX

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
    from cocoa_embed.integrations.qdrant.stores.store import Store

CollectionOption = Annotated[str, typer.Option(help="The Qdrant collection.")]
ApiKeyOption = Annotated[str | None, typer.Option(envvar="QDRANT_API_KEY", help="API key for the Qdrant server.")]
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="CONDITION",
        help="A condition, such as mime=image/png, width>=800 or caption~beach; repeatable.",
    ),
]


@dataclass(frozen=True)
class Location:
    """Where collections are; an option that is not given is None."""

    path: Annotated[Path | None, typer.Option(help=f"A local index folder [default: {DEFAULT_INDEX}].")] = None
    url: Annotated[str | None, typer.Option(help="The URL of a Qdrant server, instead of --path.")] = None
    edge: Annotated[Path | None, typer.Option(help="A Qdrant Edge folder, instead of --path; for many images.")] = None

    def given(self) -> dict[str, Any]:
        """Return the options that are given."""
        places = {"path": self.path, "url": self.url, "edge": self.edge}
        return {name: place for name, place in places.items() if place is not None}


@dataclass(frozen=True)
class Storage(Location):
    """Where collections are, and the key to them."""

    api_key: ApiKeyOption = None


@dataclass(frozen=True)
class Backend:
    """How to connect to a server, and how a new collection stores its points."""

    create: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,...",
            help="How to create a new collection (--url, --edge): vectors=float16, quantization=scalar|binary|turbo,"
            " memory=cold, graph=cold, tenant=KEY; for --url also hnsw=after, shards=N, replicas=N.",
        ),
    ] = None
    prefer_grpc: Annotated[bool, typer.Option("--prefer-grpc", help="Use gRPC with --url, on port 6334.")] = False


DEFAULT_BACKEND = Backend()


def check_storage(collection: str, location: Location, *, exists: bool = False) -> None:
    """Check the options that name a collection.

    :param exists: Whether a local index has to exist.
    :raises UsageError: If they contradict each other, or one is malformed.
    :raises CocoaError: If there is no such index, or its folder holds something else.
    """
    from cocoa_embed.integrations.qdrant.stores.checks import check_collection_name, check_folder, check_url
    from cocoa_embed.integrations.qdrant.stores.foreign import OWN_MARKERS, refuse_foreign_index

    given = location.given()
    if len(given) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in given)} were given together; give one of them")
    check_collection_name(collection)
    ((name, folder),) = (given or {"path": Path(DEFAULT_INDEX)}).items()
    if name == "url":
        check_url(folder)
        return
    check_folder(folder, name)
    with contextlib.suppress(OSError):  # opening it reports the reason
        refuse_foreign_index(folder, markers=OWN_MARKERS[name])
    if exists and not os.path.isdir(folder):  # False for a name that is too long
        others = "" if given else ", or give --edge or --url"
        raise CocoaError(f"there is no index in {printable(folder)}; run cocoa-embed index, or change --{name}{others}")


def storage_checks(collection: str, storage: Storage, backend: Backend) -> list[Callable[[], object]]:
    """Return checks of the options that name a collection, which need not exist yet."""
    kept = [partial(open_collection, collection, storage, backend)] if backend != DEFAULT_BACKEND else []
    return [partial(check_storage, collection, storage), *kept]


def open_collection(collection: str, storage: Storage, backend: Backend = DEFAULT_BACKEND) -> Store:
    """Return the store of the collection that the options name, without a model; nothing is opened yet.

    :raises UsageError: If the storage has more than one location, or an option is malformed.
    """
    require("qdrant_client", "qdrant")
    from cocoa_embed.integrations.qdrant.stores import open_store
    from cocoa_embed.integrations.qdrant.stores.options import StoreOptions, read_create

    options = StoreOptions(api_key=storage.api_key, prefer_grpc=backend.prefer_grpc, **read_create(backend.create))
    return open_store(collection=collection, options=options, **storage.given() or {"path": Path(DEFAULT_INDEX)})


def open_indexer(model: str | None, collection: str, storage: Storage, **options: Any) -> QdrantIndexer:
    """Return an indexer for the collection that the options name."""
    require("qdrant_client", "qdrant")
    if model is not None:
        silence_libraries()
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

    return QdrantIndexer(model, collection=collection, **vars(storage), **options)
