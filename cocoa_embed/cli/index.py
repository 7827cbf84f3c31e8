"""The command ``index``. Heavy imports are inside functions, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli import options
from cocoa_embed.cli.output import check_all, say, say_left_out, say_passed_over, working
from cocoa_embed.cli.storage import Backend, CollectionOption, Storage, open_indexer, storage_checks

if TYPE_CHECKING:
    from cocoa_embed.integrations.qdrant.indexer import IndexSummary
    from cocoa_embed.sources.base import SourceOptions


def index(
    *,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Folders, images, 'patterns', .txt lists, archives, tables, addresses."),
    ],
    model: options.ModelOption,
    collection: CollectionOption = "images",
    storage: Storage,
    prune: Annotated[bool, typer.Option("--prune", help="Remove files below PATH that no longer exist.")] = False,
    prune_all: Annotated[
        bool, typer.Option("--prune-all", help="Like --prune, even if few files or none are left.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Retry unchanged files that could not be used before.")
    ] = False,
    llama_index: Annotated[
        bool, typer.Option("--llama-index", help="Also store what LlamaIndex's QdrantVectorStore reads.")
    ] = False,
    embed: options.EmbedOption = None,
    thumbnails: Annotated[Path | None, typer.Option(help="A folder for small copies of the images.")] = None,
    dimension: options.DimensionOption = None,
    backend: Backend,
    devices: options.Devices,
    loading: options.Loading,
    given: options.Sources,
) -> dict[str, Any]:
    """Embed images and store them in Qdrant. Unchanged files are skipped by size and mtime."""
    from cocoa_embed.integrations.qdrant.indexing.thumbnails import check_folder
    from cocoa_embed.model.loading import check_model

    settings = {"dimension": dimension, "embed": embed, **vars(backend), **devices.arguments(), **vars(loading)}
    sources = given.options()
    check_all(
        *storage_checks(collection, storage, backend),
        *([] if prune or prune_all else source_checks(paths, sources)),
        lambda: check_model(model),
        *([] if thumbnails is None else [partial(check_folder, thumbnails)]),
    )
    with working(), open_indexer(model, collection, storage, **settings) as indexer:
        summary = indexer.index(
            paths,
            prune=prune,
            prune_all=prune_all,
            thumbnails=thumbnails,
            llama_index=llama_index,
            retry_failed=retry_failed,
            sources=sources,
            progress=sys.stderr.isatty(),
        )
        report_summary(summary)
    return dataclasses.asdict(summary)


def source_checks(paths: Sequence[str], options: SourceOptions) -> list[Callable[[], object]]:
    """Return checks of the paths to index: of each missing one or, if all exist, that there are images."""
    from cocoa_embed.sources.open import all_sources

    missing = [path for path in paths if path and "://" not in path and not os.path.lexists(path)]
    return [partial(all_sources, [path], options) for path in missing] or [partial(all_sources, paths, options)]


def report_summary(summary: IndexSummary) -> None:
    """Print the counts of an indexing run, and the files that could not be used."""
    values = dataclasses.asdict(summary)
    counts = ", ".join(f"{values[name]} {name}" for name in ("indexed", "unchanged", "updated", "replaced", "pruned"))
    rate = f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images/s"
    say(f"{summary.collection}: {counts}, {len(summary.failed)} left out ({rate})")
    say_passed_over(summary.passed_over)
    say_left_out(summary.failed)
