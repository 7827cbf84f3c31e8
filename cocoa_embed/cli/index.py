"""The commands ``index`` and ``search``. Heavy imports are inside functions, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cocoa_embed.cli.output import DeviceOption, JsonOption, check_all, print_json, say, silence_libraries, working
from cocoa_embed.errors import CocoaError, ImageError, UsageError, printable, require
from cocoa_embed.folders import DEFAULT_INDEX

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from cocoa_embed.integrations.qdrant.indexer import IndexSummary, QdrantIndexer
    from cocoa_embed.integrations.qdrant.stores.base import Hit

WEB = ("http://", "https://")

ModelOption = Annotated[str, typer.Option(help="A SentenceTransformer folder, or owner/name on the Hugging Face hub.")]
CollectionOption = Annotated[str, typer.Option(help="The Qdrant collection.")]
PathOption = Annotated[Path | None, typer.Option(help=f"A local index folder [default: {DEFAULT_INDEX}].")]
UrlOption = Annotated[str | None, typer.Option(help="The URL of a Qdrant server, instead of --path.")]
EdgeOption = Annotated[Path | None, typer.Option(help="A Qdrant Edge folder, instead of --path; for many images.")]
ApiKeyOption = Annotated[str | None, typer.Option(envvar="QDRANT_API_KEY", help="API key for the Qdrant server.")]


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
        summary = indexer.index(paths, prune=prune, thumbnails=thumbnails, progress=console.is_terminal)
        report_summary(summary, console)
    if as_json:
        print_json(dataclasses.asdict(summary))
    if summary.failed:
        raise typer.Exit(1)


def search(
    model: ModelOption,
    text: Annotated[str | None, typer.Argument(help="The query; always a text, never a file name.")] = None,
    image: Annotated[str | None, typer.Option(help="A query image, alone or with a text: a file or data: URI.")] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="A host from which --image may be fetched over HTTP; repeatable."),
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="CONDITION",
            help="A condition, such as mime=image/png, width>=800 or caption~beach; repeatable.",
        ),
    ] = None,
    collection: CollectionOption = "images",
    path: PathOption = None,
    url: UrlOption = None,
    edge: EdgeOption = None,
    api_key: ApiKeyOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of hits.")] = 10,
    offset: Annotated[int, typer.Option(min=0, help="How many of the best hits to skip.")] = 0,
    score_threshold: Annotated[float | None, typer.Option(help="The minimum cosine similarity of a hit.")] = None,
    any_orientation: Annotated[
        bool, typer.Option("--any-orientation", help="Also search for the rotated and mirrored image.")
    ] = False,
    device: DeviceOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the hits to this file as an HTML page.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the images nearest to a text, to an image, or to both."""
    from cocoa_embed.integrations.qdrant.filters import parse_filters
    from cocoa_embed.model.loading import check_model

    if not (text and text.strip()) and image is None:
        raise UsageError("nothing to search for; give a text, --image FILE, or both")
    if any_orientation and image is None:
        raise UsageError("--any-orientation needs --image")
    storage = {"path": path, "url": url, "edge": edge}
    is_download = bool(allow_host) and image is not None and image.lower().startswith(WEB)
    *_, picture = check_all(
        lambda: check_storage(collection, storage, exists=True),
        lambda: check_model(model),
        lambda: parse_filters(filters or []),
        *([partial(check_page, html)] if html else []),
        lambda: image and not is_download and query_image(image, []),
    )
    if image and is_download:  # after all local checks
        picture = query_image(image, allow_host or [])
    with working() as console, open_indexer(model, collection, storage, api_key=api_key, device=device) as indexer:
        hits = indexer.search(
            text,
            picture or None,
            limit=limit,
            offset=offset,
            score_threshold=score_threshold,
            query_filter=filters,
            any_orientation=any_orientation,
        )
        report_hits(hits, console)
    if as_json:
        from cocoa_embed.integrations.qdrant.points import plain_payload

        print_json({"hits": [{**dataclasses.asdict(hit), "payload": plain_payload(hit.payload)} for hit in hits]})
    if html is not None:
        from cocoa_embed.integrations.qdrant.hits_page import write_hits_page

        image_name = "an image" if image and image.startswith("data:") else Path(image or "").name
        write_hits_page(html, " + ".join(filter(None, (text, image_name))), hits)
        typer.echo(f"wrote {printable(html)}", err=True)


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


def check_page(file: Path) -> None:
    """Check that an HTML page can be written.

    :raises CocoaError: If Jinja2 is not installed, or the folder does not exist.
    """
    require("jinja2", "report")
    if not file.parent.is_dir():
        raise CocoaError(f"--html: {printable(file)} cannot be written, its folder does not exist")


def query_image(image: str, allowed_hosts: Sequence[str]) -> Image:
    """Load the image of a query: a file, a ``data:`` URI, or an address on an allowed host.

    :raises ImageError: If it cannot be used.
    """
    from cocoa_embed.images.http import Fetcher
    from cocoa_embed.images.load import load_image

    try:
        return load_image(image, fetcher=Fetcher(allowed_hosts))
    except ImageError as error:
        if not error.reason.endswith("allowed hosts"):
            raise
        raise ImageError(error.source, f"{error.reason}; allow it with --allow-host HOST") from error


def open_indexer(model: str, collection: str, storage: dict[str, Any], **options: Any) -> QdrantIndexer:
    """Return an indexer for the collection that the options name."""
    require("qdrant_client", "qdrant")
    silence_libraries()
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

    return QdrantIndexer(model, collection=collection, **storage, **options)


def report_summary(summary: IndexSummary, console: Console) -> None:
    """Print the counts of an indexing run, and the files that could not be used."""
    values = dataclasses.asdict(summary)
    counts = ", ".join(f"{values[name]} {name}" for name in ("indexed", "unchanged", "updated", "replaced", "pruned"))
    rate = f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images/s"
    say(console, f"{summary.collection}: {counts}, {len(summary.failed)} left out ({rate})")
    for failure in summary.failed:
        say(console, f"left out: {printable(failure['path'])}: {failure['reason']}")


def report_hits(hits: Sequence[Hit], console: Console) -> None:
    """Print the hits of a search, best first."""
    for hit in hits:
        caption = f"  {' '.join(hit.caption.split())}" if hit.caption else ""
        say(console, f"{hit.score:.4f}  {printable(hit.path)}{caption}")
    if not hits:
        say(console, "nothing found")
