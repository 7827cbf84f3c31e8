"""``cocoa-embed index`` and ``search``. What they need is imported when they run, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.cli.output import DeviceOption, JsonOption, print_json, say, silence_libraries, working
from cocoa_embed.errors import UsageError, printable, require

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from cocoa_embed.integrations.qdrant.indexer import IndexSummary, QdrantIndexer
    from cocoa_embed.integrations.qdrant.stores.base import Hit

DEFAULT_INDEX = Path("cocoa-index")

ModelOption = Annotated[
    str, typer.Option("--model", help="A SentenceTransformer folder, or owner/name on the Hugging Face hub.")
]
CollectionOption = Annotated[str, typer.Option("--collection", help="The Qdrant collection.")]
PathOption = Annotated[
    Path | None, typer.Option("--path", help=f"The folder of a local index [default: {DEFAULT_INDEX}].")
]
UrlOption = Annotated[str | None, typer.Option("--url", help="The address of a Qdrant server, instead of --path.")]
EdgeOption = Annotated[
    Path | None, typer.Option("--edge", help="The folder of a Qdrant Edge index, instead of --path; for many images.")
]
DimensionOption = Annotated[
    int | None,
    typer.Option("--dimension", min=1, help="Keep the first so many values of an embedding [default: all]."),
]
ApiKeyOption = Annotated[
    str | None, typer.Option("--api-key", envvar="QDRANT_API_KEY", help="What the server wants to see, if anything.")
]


class Quantization(str, Enum):
    """What vectors are compared by first."""

    scalar = "scalar"
    binary = "binary"


def index(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Folders, image files, quoted patterns, .txt files with a path a line."),
    ],
    model: ModelOption,
    collection: CollectionOption = "images",
    path: PathOption = None,
    url: UrlOption = None,
    edge: EdgeOption = None,
    api_key: ApiKeyOption = None,
    prune: Annotated[bool, typer.Option("--prune", help="Take out the files below PATH that are gone.")] = False,
    thumbnails: Annotated[
        Path | None, typer.Option("--thumbnails", help="A folder for small copies of the images.")
    ] = None,
    dimension: DimensionOption = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option("--quantization", help="What a new collection (--url, --edge) compares vectors by first."),
    ] = None,
    on_disk: Annotated[
        bool, typer.Option("--on-disk", help="Keep the vectors of a new collection (--url, --edge) on disk.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="The most images to embed at once.")] = 32,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Embed images and store them in Qdrant. A file that is as it was costs a look at its date."""
    options = {"dimension": dimension, "quantization": quantization and quantization.value, "on_disk": on_disk}
    home = Home(path, url, edge, api_key)
    with (
        working() as console,
        open_indexer(model, collection, home, batch_size=batch_size, device=device, **options) as indexer,
    ):
        summary = indexer.index(paths, prune=prune, thumbnails=thumbnails, progress=console.is_terminal)
        report_summary(summary, console)
    if as_json:
        print_json(dataclasses.asdict(summary))
    if summary.failed:
        raise typer.Exit(1)


def search(
    model: ModelOption,
    text: Annotated[str | None, typer.Argument(help="What to look for; always taken as text.")] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", help="An image to look for, alone or with the text: a file, or a data: address."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", help="A host that --image may be fetched from, by http or https; may be repeated."
        ),
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="A condition such as mime=image/png, width>=800, mtime<2026-01-01, caption~beach; all must hold.",
        ),
    ] = None,
    collection: CollectionOption = "images",
    path: PathOption = None,
    url: UrlOption = None,
    edge: EdgeOption = None,
    api_key: ApiKeyOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The most images to return.")] = 10,
    offset: Annotated[int, typer.Option("--offset", min=0, help="How many of the best to leave out.")] = 0,
    score_threshold: Annotated[
        float | None, typer.Option("--score-threshold", help="The least cosine of a hit, between -1 and 1.")
    ] = None,
    any_orientation: Annotated[
        bool, typer.Option("--any-orientation", help="Look for the image turned and mirrored too.")
    ] = False,
    dimension: DimensionOption = None,
    device: DeviceOption = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a gallery of the images to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the images nearest to a text, to an image, or to both."""
    if not (text and text.strip()) and image is None:
        raise UsageError("nothing to search for; give a text, --image FILE, or both")
    home = Home(path, url, edge, api_key)
    with (
        working() as console,
        open_indexer(model, collection, home, dimension=dimension, device=device) as indexer,
    ):
        hits = indexer.search(
            text,
            None if image is None else query_image(image, allow_host or []),
            limit=limit,
            offset=offset,
            score_threshold=score_threshold,
            query_filter=filters,
            any_orientation=any_orientation,
        )
        if html is not None:
            from cocoa_embed.integrations.qdrant.hits_page import write_hits_page

            title = " + ".join(part for part in (text, image and image_title(image)) if part)
            write_hits_page(html, title, hits)
            console.print(f"wrote {html}", soft_wrap=True, markup=False, highlight=False)
        report_hits(hits, console)
    if as_json:
        print_json({"hits": [hit_document(hit) for hit in hits]})


@dataclasses.dataclass(frozen=True)
class Home:
    """Where the options of a command say that the points are.

    :raises UsageError: If they name more than one place.
    """

    path: Path | None
    url: str | None
    edge: Path | None
    api_key: str | None

    def __post_init__(self) -> None:
        options = {"--path": self.path, "--url": self.url, "--edge": self.edge}
        given = [option for option, value in options.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} were given together; give the one that holds the index")


@contextlib.contextmanager
def open_indexer(model: str, collection: str, home: Home, **options: Any) -> Iterator[QdrantIndexer]:
    """Open the collection that the options name, and close it at the end."""
    require("qdrant_client", "qdrant")
    silence_libraries()
    from cocoa_embed.integrations.qdrant.indexer import QdrantIndexer

    is_default = home.url is None and home.edge is None
    with QdrantIndexer(
        model,
        path=(home.path or DEFAULT_INDEX) if is_default else None,
        url=home.url,
        edge=home.edge,
        api_key=home.api_key,
        collection=collection,
        **options,
    ) as indexer:
        yield indexer


def query_image(image: str, allowed_hosts: Sequence[str]) -> Image:
    """Return the image that a query names: a file, a ``data:`` address, or an address on an allowed host.

    :raises ImageError: If it cannot be used.
    """
    from cocoa_embed.images.http import Fetcher
    from cocoa_embed.images.load import load_image

    return load_image(image, fetcher=Fetcher(allowed_hosts) if allowed_hosts else None)


def image_title(image: str) -> str:
    """Return what a page calls a query's image: its file name, or an address without its data."""
    return "an image" if image.startswith("data:") else image.rstrip("/").rsplit("/", 1)[-1]


def report_summary(summary: IndexSummary, console: Console) -> None:
    """Print what an indexing run did, and the files that were left out."""
    values = dataclasses.asdict(summary)
    counts = ", ".join(f"{values[name]} {name}" for name in ("indexed", "unchanged", "updated", "replaced", "pruned"))
    rate = f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images/s"
    say(console, f"{summary.collection}: {counts}, {len(summary.failed)} left out ({rate})")
    for failure in summary.failed:
        say(console, f"left out: {printable(failure['path'])}: {failure['reason']}")


def report_hits(hits: Sequence[Hit], console: Console) -> None:
    """Print what a search found, best first."""
    for hit in hits:
        caption = f"  {' '.join(hit.caption.split())}" if hit.caption else ""
        say(console, f"{hit.score:.4f}  {printable(hit.path)}{caption}")
    if not hits:
        say(console, "nothing found")


def hit_document(hit: Hit) -> dict[str, Any]:
    """Return the JSON document of a hit, without what LlamaIndex alone needs of the payload."""
    from cocoa_embed.integrations.qdrant.points import plain_payload

    return {**dataclasses.asdict(hit), "payload": plain_payload(hit.payload)}
