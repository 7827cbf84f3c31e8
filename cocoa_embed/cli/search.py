"""The command ``search``. Heavy imports are inside functions, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli.options import MODEL_HELP, DeviceOption, Loading
from cocoa_embed.cli.output import check_all, say, working
from cocoa_embed.cli.serve import ServerKeyOption, search_server
from cocoa_embed.cli.storage import FilterOption, Storage, check_storage, open_indexer
from cocoa_embed.errors import CocoaError, ImageError, UsageError, printable, require

if TYPE_CHECKING:
    from PIL.Image import Image

WEB, REMOTE = r"(?!file:)[\w+.-]+://", r"(?!file:|https?:)[\w+.-]+://"
"""Match the addresses of any remote file system, and of those other than the web."""


def search(
    *,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    text: Annotated[str | None, typer.Argument(help="The query; always a text, never a file name.")] = None,
    image: Annotated[
        str | None,
        typer.Option(help="A query image, alone or with a text: a file, a hit's path (a.pdf#page=3), an address."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="A host from which images may be fetched over HTTP; repeatable."),
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH|ID", help="An indexed image that hits should resemble; alone it needs no --model; repeatable."
        ),
    ] = None,
    unlike: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH|ID", help="An indexed image that hits should not resemble; repeatable."),
    ] = None,
    filters: FilterOption = None,
    collection: Annotated[str | None, typer.Option(help="The Qdrant collection [default: images].")] = None,
    storage: Storage,
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of hits.")] = 10,
    offset: Annotated[int, typer.Option(min=0, help="How many of the best hits to skip.")] = 0,
    score_threshold: Annotated[float | None, typer.Option(help="The minimum cosine similarity of a hit.")] = None,
    any_orientation: Annotated[
        bool, typer.Option("--any-orientation", help="Also search for the rotated and mirrored image.")
    ] = False,
    diversity: Annotated[
        float | None, typer.Option(help="From 0 (the nearest) to 1 (as different from each other as possible).")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(metavar="KEY", help="Of all images with one value of this key, return only the best.")
    ] = None,
    hnsw_ef: Annotated[
        int | None,
        typer.Option(
            min=1, help="Candidates that the search index considers: more are slower and find more (--url, --edge)."
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare all vectors, without the search index.")] = False,
    vectors: Annotated[
        int,
        typer.Option(
            min=1, help="For a model of several vectors, how many of the query's vectors rescore the best hits."
        ),
    ] = 1,
    device: DeviceOption = None,
    loading: Loading,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask a running cocoa-embed serve, instead of loading the model.")
    ] = None,
    server_api_key: ServerKeyOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the hits to this file as an HTML page.")] = None,
) -> dict[str, Any]:
    """Find the images nearest to a text, to an image, or to indexed images."""
    is_embedded = bool(text and text.strip()) or image is not None
    if not is_embedded and not like:
        raise UsageError("nothing to search for; give a text, --image FILE, --like PATH, or several of them")
    wanted: dict[str, Any] = {"limit": limit, "offset": offset, "score_threshold": score_threshold}
    wanted |= {"any_orientation": any_orientation, "diversity": diversity, "group_by": group_by, "vectors": vectors}
    examples: dict[str, Any] = {"like": like or (), "unlike": unlike or ()}
    model_options = {"device": device, **vars(loading)}
    if server is not None:
        own: dict[str, object] = {"model": model, "collection": collection, **storage.given(), **model_options}
        own |= {"hnsw_ef": hnsw_ef, "exact": exact, "html": html}
        if given := [name for name, value in own.items() if value not in (None, False)]:
            name = given[0].replace("_", "-")
            raise UsageError(f"--server has its own model and index, and shows hits on its page; leave out --{name}")
        with working():
            fields = {"text": text, "filters": filters, **examples, **wanted}
            found = search_server(server, server_api_key, image, allow_host or (), fields)
            report_hits((hit["score"], hit["path"], hit["caption"]) for hit in found["hits"])
        return found
    from cocoa_embed.integrations.qdrant.searching.filters import parse_filters
    from cocoa_embed.integrations.qdrant.searching.options import SearchOptions
    from cocoa_embed.model.loading import check_model

    if is_embedded and model is None:
        raise UsageError("a text or an image needs the model of the collection; give it as --model")
    if any_orientation and image is None:
        raise UsageError("--any-orientation needs --image")
    collection = collection or "images"
    wanted |= {"hnsw_ef": hnsw_ef, "exact": exact}
    is_download = image is not None and re.match(WEB if allow_host else REMOTE, image, re.IGNORECASE) is not None
    *_, picture = check_all(
        lambda: check_storage(collection, storage, exists=True),
        *([] if model is None else [partial(check_model, model)]),
        lambda: parse_filters(filters or []),
        lambda: SearchOptions(**wanted),
        *([partial(check_page, html)] if html else []),
        lambda: image and not is_download and query_image(image, []),
    )
    if image and is_download:  # after all local checks
        picture = query_image(image, allow_host or [])
    with working(), open_indexer(model, collection, storage, **model_options) as indexer:
        asked = text if is_embedded else None
        hits = indexer.search(asked, picture or None, query_filter=filters, **examples, **wanted)
        report_hits((hit.score, hit.path, hit.caption) for hit in hits)
    from cocoa_embed.integrations.qdrant.points import plain_payload

    rows = [{**dataclasses.asdict(hit), "payload": plain_payload(hit.payload)} for hit in hits]
    document: dict[str, Any] = {"hits": rows}
    if html is not None:
        from cocoa_embed.integrations.qdrant.searching.hits_page import write_hits_page

        image_name = "an image" if image and image.startswith("data:") else Path(image or "").name
        names = [text, image_name, *(f"like {Path(name).name}" for name in like or ())]
        names += [f"unlike {Path(name).name}" for name in unlike or ()]
        for name in like or ():
            with suppress(ImageError):  # the id of a point, or an image that is gone
                picture = picture or query_image(name, allow_host or [])
        try:
            write_hits_page(html, " + ".join(filter(None, names)), hits, picture, allow_host or [])
            say(f"wrote {printable(html)}")
        except CocoaError as error:  # the hits are printed anyway
            document["failed"] = [{"path": str(html), "reason": str(error)}]
            say(f"cocoa-embed: {error}")
    return document


def check_page(file: Path) -> None:
    """Check that an HTML page can be written.

    :raises CocoaError: If Jinja2 is not installed, or the folder does not exist.
    """
    require("jinja2", "report")
    if not file.parent.is_dir():
        raise CocoaError(f"--html: {printable(file)} cannot be written: its folder does not exist")


def query_image(image: str, allowed_hosts: Sequence[str]) -> Image:
    """Load the image of a query: a file, a ``data:`` URI, an address, or one image of an archive, a document...

    :raises ImageError: If it cannot be used.
    """
    from cocoa_embed.images.load import load_image
    from cocoa_embed.sources.keys import load_key

    if image[:5].lower() == "data:":
        return load_image(image)
    return load_key(image, allowed_hosts)


def report_hits(hits: Iterable[tuple[float, str, str]]) -> None:
    """Print score, path and caption of the hits of a search, best first."""
    is_empty = True
    for score, path, text in hits:
        is_empty = False
        caption = f"  {' '.join(text.split())}" if text else ""
        say(f"{score:.4f}  {printable(path)}{caption}")
    if is_empty:
        say("nothing found")
