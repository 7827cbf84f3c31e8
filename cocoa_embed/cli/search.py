"""The command ``search``. Heavy imports are inside functions, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from cocoa_embed.errors import CocoaError, ImageError, UsageError, printable, require

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from cocoa_embed.integrations.qdrant.stores.base import Hit

WEB = ("http://", "https://")


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
    from cocoa_embed.integrations.qdrant.searching.filters import parse_filters
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
        from cocoa_embed.integrations.qdrant.searching.hits_page import write_hits_page

        image_name = "an image" if image and image.startswith("data:") else Path(image or "").name
        write_hits_page(html, " + ".join(filter(None, (text, image_name))), hits)
        typer.echo(f"wrote {printable(html)}", err=True)


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


def report_hits(hits: Sequence[Hit], console: Console) -> None:
    """Print the hits of a search, best first."""
    for hit in hits:
        caption = f"  {' '.join(hit.caption.split())}" if hit.caption else ""
        say(console, f"{hit.score:.4f}  {printable(hit.path)}{caption}")
    if not hits:
        say(console, "nothing found")
