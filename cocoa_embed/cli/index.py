"""The command ``index``. Heavy imports are inside functions, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli.options import (
    AllowHostOption,
    BatchTokensOption,
    DevicesOption,
    DtypeOption,
    EveryOption,
    ExcludeOption,
    IncludeOption,
    MaxPixelsOption,
    RevisionOption,
    TrustOption,
    WorkersOption,
    model_options,
    source_options,
)
from cocoa_embed.cli.output import (
    JsonOption,
    check_all,
    print_json,
    say,
    say_passed_over,
    working,
)
from cocoa_embed.cli.storage import (
    ApiKeyOption,
    CollectionOption,
    CreateOption,
    EdgeOption,
    EmbedOption,
    GrpcOption,
    ModelOption,
    PathOption,
    UrlOption,
    check_storage,
    open_collection,
    open_indexer,
)
from cocoa_embed.errors import printable
from cocoa_embed.folders import refuse_foreign_folder

if TYPE_CHECKING:
    from rich.console import Console

    from cocoa_embed.integrations.qdrant.indexer import IndexSummary
    from cocoa_embed.sources.base import SourceOptions


def index(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Folders, images, 'patterns', .txt lists, archives, tables, addresses."),
    ],
    model: ModelOption,
    collection: CollectionOption = "images",
    path: PathOption = None,
    url: UrlOption = None,
    edge: EdgeOption = None,
    api_key: ApiKeyOption = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove files below PATH that no longer exist.")] = False,
    prune_all: Annotated[
        bool, typer.Option("--prune-all", help="Like --prune, even where no files are left, or few.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try unchanged files again that could not be used before.")
    ] = False,
    llama_index: Annotated[
        bool, typer.Option("--llama-index", help="Also store what LlamaIndex's QdrantVectorStore reads.")
    ] = False,
    embed: EmbedOption = None,
    exclude: ExcludeOption = None,
    thumbnails: Annotated[Path | None, typer.Option(help="A folder for small copies of the images.")] = None,
    dimension: Annotated[int | None, typer.Option(min=1, help="Truncate embeddings to this many dimensions.")] = None,
    create: CreateOption = None,
    prefer_grpc: GrpcOption = False,
    devices: DevicesOption = None,
    workers: WorkersOption = None,
    batch_tokens: BatchTokensOption = None,
    dtype: DtypeOption = None,
    max_pixels: MaxPixelsOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    allow_host: AllowHostOption = None,
    every: EveryOption = 10.0,
    include: IncludeOption = "",
    as_json: JsonOption = False,
) -> None:
    """Embed images and store them in Qdrant. Unchanged files are skipped by size and mtime."""
    from cocoa_embed.images.passed_over import THUMBNAILS_MARKER
    from cocoa_embed.model.loading import check_model

    storage = {"path": path, "url": url, "edge": edge}
    kept: dict[str, Any] = {"create": create, "prefer_grpc": prefer_grpc}
    options: dict[str, Any] = {"dimension": dimension, "embed": embed, **kept}
    options |= {"api_key": api_key, **model_options(devices, workers=workers, batch_tokens=batch_tokens)}
    options |= {"dtype": dtype, "max_pixels": max_pixels, "revision": revision, "trust_remote_code": trust_remote_code}
    sources = source_options(allow_host, every, include, exclude)
    check_all(
        lambda: check_storage(collection, storage),
        *([lambda: open_collection(collection, storage, None, **kept)] if any(kept.values()) else []),
        *([] if prune or prune_all else source_checks(paths, sources)),
        lambda: check_model(model),
        *([] if thumbnails is None else [partial(refuse_foreign_folder, thumbnails, marker=THUMBNAILS_MARKER)]),
    )
    with working() as console, open_indexer(model, collection, storage, **options) as indexer:
        summary = indexer.index(
            paths,
            prune=prune,
            prune_all=prune_all,
            thumbnails=thumbnails,
            llama_index=llama_index,
            retry_failed=retry_failed,
            sources=sources,
            progress=console.is_terminal,
        )
        report_summary(summary, console)
    if as_json:
        print_json(dataclasses.asdict(summary))
    if summary.failed:
        raise typer.Exit(1)


def source_checks(paths: Sequence[str], options: SourceOptions) -> list[Callable[[], object]]:
    """Return checks of the paths to index: of each that does not exist or, without any, that there are images."""
    from cocoa_embed.sources.open import all_sources

    missing = [path for path in paths if path and "://" not in path and not os.path.lexists(path)]
    return [partial(all_sources, [path], options) for path in missing] or [partial(all_sources, paths, options)]


def report_summary(summary: IndexSummary, console: Console) -> None:
    """Print the counts of an indexing run, and the files that could not be used."""
    values = dataclasses.asdict(summary)
    counts = ", ".join(f"{values[name]} {name}" for name in ("indexed", "unchanged", "updated", "replaced", "pruned"))
    rate = f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images/s"
    say(console, f"{summary.collection}: {counts}, {len(summary.failed)} left out ({rate})")
    say_passed_over(summary.skipped_reasons, console)
    for failure in summary.failed:
        say(console, f"left out: {printable(failure['path'])}: {failure['reason']}")
