"""The options that name a model and a collection, and how commands open them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli.output import silence_libraries
from cocoa_embed.errors import CocoaError, UsageError, printable, require
from cocoa_embed.folders import DEFAULT_INDEX

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

ModelOption = Annotated[str, typer.Option(help="A SentenceTransformer folder, or owner/name on the Hugging Face hub.")]
CollectionOption = Annotated[str, typer.Option(help="The Qdrant collection.")]
PathOption = Annotated[Path | None, typer.Option(help=f"A local index folder [default: {DEFAULT_INDEX}].")]
UrlOption = Annotated[str | None, typer.Option(help="The URL of a Qdrant server, instead of --path.")]
EdgeOption = Annotated[Path | None, typer.Option(help="A Qdrant Edge folder, instead of --path; for many images.")]
ApiKeyOption = Annotated[str | None, typer.Option(envvar="QDRANT_API_KEY", help="API key for the Qdrant server.")]


def check_storage(collection: str, storage: dict[str, Any], *, exists: bool = False) -> None:
    """Check the options that name a collection.

    :param storage: The values of ``--path``, ``--url`` and ``--edge``; None for those that are not given.
    :param exists: Whether a local index has to be there.
    :raises UsageError: If they contradict each other, or one is malformed.
    :raises CocoaError: If there is no such index.
    """
    from cocoa_embed.integrations.qdrant.stores.checks import check_collection_name, check_url

    given = [name for name, value in storage.items() if value is not None] or ["path"]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in given)} were given together; give one of them")
    check_collection_name(collection)
    folder: Any = storage[given[0]] or Path(DEFAULT_INDEX)
    if given == ["url"]:
        check_url(folder)
    elif exists and not folder.is_dir():
        raise CocoaError(f"there is no index in {printable(folder)}; run cocoa-embed index, or change --{given[0]}")


def open_indexer(model: str, collection: str, storage: dict[str, Any], **options: Any) -> QdrantIndexer:
    """Return an indexer for the collection that the options name."""
    require("qdrant_client", "qdrant")
    silence_libraries()
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

    return QdrantIndexer(model, collection=collection, **storage, **options)
