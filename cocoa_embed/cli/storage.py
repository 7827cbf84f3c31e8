"""The options that name a model and a collection, and how commands open them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cocoa_embed.cli.output import silence_libraries
from cocoa_embed.errors import CocoaError, UsageError, printable, require
from cocoa_embed.folders import DEFAULT_INDEX

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer
    from cocoa_embed.integrations.qdrant.stores.store import Store

MODEL_HELP = "A SentenceTransformer folder, or owner/name on the Hugging Face hub."
ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
CollectionOption = Annotated[str, typer.Option(help="The Qdrant collection.")]
PathOption = Annotated[Path | None, typer.Option(help=f"A local index folder [default: {DEFAULT_INDEX}].")]
UrlOption = Annotated[str | None, typer.Option(help="The URL of a Qdrant server, instead of --path.")]
EdgeOption = Annotated[Path | None, typer.Option(help="A Qdrant Edge folder, instead of --path; for many images.")]
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="CONDITION",
        help="A condition, such as mime=image/png, width>=800 or caption~beach; repeatable.",
    ),
]
GrpcOption = Annotated[bool, typer.Option("--prefer-grpc", help="Speak gRPC with --url, on port 6334.")]
CreateOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY=VALUE,...",
        help="How to create a new collection (--url, --edge): vectors=float16, quantization=scalar|binary|turbo,"
        " memory=cold, graph=cold, tenant=KEY; for --url also hnsw=after, shards=N, replicas=N.",
    ),
]
EmbedOption = Annotated[
    Literal["image", "image+caption", "both"] | None,
    typer.Option(help="Embed the image, with its caption in one vector, or each in its own [default: image]."),
]
ApiKeyOption = Annotated[str | None, typer.Option(envvar="QDRANT_API_KEY", help="API key for the Qdrant server.")]


def check_storage(collection: str, storage: dict[str, Any], *, exists: bool = False) -> None:
    """Check the options that name a collection.

    :param storage: The values of ``--path``, ``--url`` and ``--edge``; None for those that are not given.
    :param exists: Whether a local index has to be there.
    :raises UsageError: If they contradict each other, or one is malformed.
    :raises CocoaError: If there is no such index, or its folder holds something else.
    """
    from cocoa_embed.integrations.qdrant.stores.checks import check_collection_name, check_folder, check_url
    from cocoa_embed.integrations.qdrant.stores.foreign import OWN_MARKERS, refuse_foreign_index

    given = [name for name, value in storage.items() if value is not None] or ["path"]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in given)} were given together; give one of them")
    check_collection_name(collection)
    folder: Any = storage[given[0]] or Path(DEFAULT_INDEX)
    if given == ["url"]:
        check_url(folder)
        return
    check_folder(folder, given[0])
    with contextlib.suppress(OSError):  # which opening it explains
        refuse_foreign_index(folder, markers=OWN_MARKERS[given[0]])
    if exists and not folder.is_dir():
        others = "" if storage[given[0]] else ", or give --edge or --url"
        raise CocoaError(
            f"there is no index in {printable(folder)}; run cocoa-embed index, or change --{given[0]}{others}"
        )


def open_collection(
    collection: str,
    storage: dict[str, Any],
    api_key: str | None,
    *,
    create: str | None = None,
    prefer_grpc: bool = False,
) -> Store:
    """Return the store of the collection that the options name, without a model; nothing is opened yet.

    :raises UsageError: If the storage has none of the options, or one is malformed.
    """
    require("qdrant_client", "qdrant")
    from cocoa_embed.integrations.qdrant.stores import open_store
    from cocoa_embed.integrations.qdrant.stores.options import StoreOptions, read_create

    place = storage if any(storage.values()) else {"path": Path(DEFAULT_INDEX)}
    options = StoreOptions(api_key=api_key, prefer_grpc=prefer_grpc, **read_create(create))
    return open_store(collection=collection, options=options, **place)


def open_indexer(model: str | None, collection: str, storage: dict[str, Any], **options: Any) -> QdrantIndexer:
    """Return an indexer for the collection that the options name."""
    require("qdrant_client", "qdrant")
    if model is not None:
        silence_libraries()
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

    return QdrantIndexer(model, collection=collection, **storage, **options)
