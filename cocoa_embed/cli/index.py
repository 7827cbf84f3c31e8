"""The command ``index``. Heavy imports are inside functions, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cocoa_embed.cli.output import DeviceOption, JsonOption, check_all, print_json, say, working
from cocoa_embed.cli.storage import (
    ApiKeyOption,
    CollectionOption,
    EdgeOption,
    ModelOption,
    PathOption,
    UrlOption,
    check_storage,
    open_indexer,
)
from cocoa_embed.errors import CocoaError, UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from cocoa_embed.integrations.qdrant.indexer import IndexSummary


def index(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Folders, images, 'patterns', .txt file lists.")
    ],
    model: ModelOption,
    collection: CollectionOption = "images",
    path: PathOption = None,
    url: UrlOption = None,
    edge: EdgeOption = None,
    api_key: ApiKeyOption = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove files below PATH that no longer exist.")] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Pass over files and folders, as in .gitignore (repeatable)."),
    ] = None,
    thumbnails: Annotated[Path | None, typer.Option(help="A folder for small copies of the images.")] = None,
    dimension: Annotated[int | None, typer.Option(min=1, help="Truncate embeddings to this many dimensions.")] = None,
    quantization: Annotated[
        Literal["scalar", "binary"] | None, typer.Option(help="Quantize a new collection (--url, --edge).")
    ] = None,
    on_disk: Annotated[
        bool, typer.Option("--on-disk", help="Keep the vectors of a new collection on disk (--url, --edge).")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Embed images and store them in Qdrant. Unchanged files are skipped by size and mtime."""
    from cocoa_embed.model.loading import check_model

    storage = {"path": path, "url": url, "edge": edge}
    options: dict[str, Any] = {"dimension": dimension, "quantization": quantization, "on_disk": on_disk}
    options |= {"api_key": api_key, "device": device}
    if (quantization or on_disk) and url is None and edge is None:
        raise UsageError("--quantization and --on-disk need --url or --edge; a local index (--path) has neither")
    check_all(
        lambda: check_storage(collection, storage),
        lambda: check_sources(paths, may_be_empty=prune),
        lambda: check_model(model),
    )
    with working() as console, open_indexer(model, collection, storage, **options) as indexer:
        summary = indexer.index(
            paths, prune=prune, exclude=exclude or (), thumbnails=thumbnails, progress=console.is_terminal
        )
        report_summary(summary, console)
    if as_json:
        print_json(dataclasses.asdict(summary))
    if summary.failed:
        raise typer.Exit(1)


def check_sources(paths: Sequence[str], *, may_be_empty: bool) -> None:
    """Check that the paths to index exist, and hold an image.

    :raises CocoaError: If they do not.
    """
    from cocoa_embed.images.find_files import IMAGE_SUFFIXES, find_images

    # A pattern, or missing.
    check_all(*(partial(find_images, [path]) for path in paths if path and not os.path.lexists(path)))
    suffixes = (Path(name).suffix.lower() for path in paths for *_, names in os.walk(path) for name in names)
    if may_be_empty or not IMAGE_SUFFIXES.isdisjoint(suffixes):
        return
    unlisted: list[Path] = []
    if not find_images(paths, on_error=lambda folder, _: unlisted.append(folder)) and not unlisted:
        listed = ", ".join(map(printable, paths))
        raise CocoaError(f"there are no images in {listed}; name a folder that holds some (jpg, png, webp, ...)")


def report_summary(summary: IndexSummary, console: Console) -> None:
    """Print the counts of an indexing run, and the files that could not be used."""
    values = dataclasses.asdict(summary)
    counts = ", ".join(f"{values[name]} {name}" for name in ("indexed", "unchanged", "updated", "replaced", "pruned"))
    rate = f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images/s"
    say(console, f"{summary.collection}: {counts}, {len(summary.failed)} left out ({rate})")
    if summary.skipped:
        say(console, f"passed over: {', '.join(f'{number} {why}' for why, number in summary.skipped_reasons.items())}")
    for failure in summary.failed:
        say(console, f"left out: {printable(failure['path'])}: {failure['reason']}")
