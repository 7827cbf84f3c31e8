"""The command line. Results for programs go to standard output as JSON, everything for people to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed import __version__
from cocoa_embed.errors import CocoaError, UsageError, printable, require
from cocoa_embed.evaluation.commands import evaluation

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from cocoa_embed.integrations.qdrant import QdrantIndexer

DEFAULT_INDEX = Path("cocoa-index")


class Quantization(str, Enum):
    """What vectors are compared by first."""

    scalar = "scalar"
    binary = "binary"


DEMO_NEEDS = ("accelerate", "datasets", "qdrant_client", "llama_index.core", "jinja2", "matplotlib")
"""The modules of the optional packages that the demo uses; the extra ``all`` installs them."""

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
DeviceOption = Annotated[str | None, typer.Option("--device", help="The torch device [default: the fastest].")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

app = typer.Typer(
    name="cocoa-embed",
    help="Train, export and use CoCoA multimodal embedding models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluation, name="eval", help="Measure a model: on MMEB-V1, or on pairs of your own.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage. A failure is one sentence on standard error.

    :param arguments: The words after ``cocoa-embed``; those of this process if None.
    :raises SystemExit: Always.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="cocoa-embed")
    except CocoaError as error:
        if not error.is_raised_by_all or os.environ.get("RANK", "0") == "0":
            typer.echo(f"cocoa-embed: {error}", err=True)
        raise SystemExit(error.exit_status) from None


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cocoa-embed {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Tell the version and stop.")
    ] = False,
) -> None:
    """Train, export and use CoCoA multimodal embedding models."""


@app.command()
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
    from cocoa_embed.cli_reports import report_summary

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


@app.command()
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
    from cocoa_embed.cli_reports import hit_document, report_hits

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
            from cocoa_embed.integrations.hits_page import write_hits_page

            title = " + ".join(part for part in (text, image and image_title(image)) if part)
            write_hits_page(html, title, hits)
            console.print(f"wrote {html}", soft_wrap=True, markup=False, highlight=False)
        report_hits(hits, console)
    if as_json:
        print_json({"hits": [hit_document(hit) for hit in hits]})


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the exported model goes.")] = Path("cocoa-qwen2vl"),
    work: Annotated[Path, typer.Option("--work", help="Where everything else goes.")] = Path("cocoa-demo"),
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="The seed of data, initial weights and training.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train, export, index and search a tiny model on this machine: the whole story, on a CPU too."""
    with working():
        for module in DEMO_NEEDS:
            require(module, "all")
        silence_libraries()
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device does; training would ask for a launcher
        from cocoa_embed.demo.story import Demo

        results = Demo(out, work, seed).run()
    if as_json:
        print_json(results)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Values to change in the recipe.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder for checkpoints [default: runs/ and the recipe's name].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, where one was begun.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, tell what the run would do and cost, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model as a recipe says: warm-up, bridge, contrastive. Each stage leaves a checkpoint."""
    with working() as console:
        require("accelerate", "train")
        silence_libraries()
        from cocoa_embed.cli_reports import report_plan, report_stages, stage_document
        from cocoa_embed.train import Recipe, run
        from cocoa_embed.train.plan import plan
        from cocoa_embed.train.processes import by_first_process, hush_others, is_first_process

        hush_others()
        loaded = by_first_process(lambda: Recipe.load(recipe, overrides or []))
        folder = out or Path("runs") / loaded.name
        if dry_run:
            planned = by_first_process(lambda: plan(loaded, folder, resume=resume))
            document = dataclasses.asdict(planned)
            if is_first_process():
                report_plan(planned, console)
        else:
            results = run(loaded, folder, resume=resume)
            document = {"stages": [stage_document(result) for result in results]}
            if is_first_process():
                report_stages(results, console)
    if as_json and is_first_process():
        print_json(document)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of the training.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the model to write.")],
) -> None:
    """Write a checkpoint as a SentenceTransformer folder, which needs nothing of this package."""
    with working() as console:
        silence_libraries()
        from cocoa_embed.export import export_model

        written = export_model(checkpoint, out)
        console.print(f"wrote {written}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def diagnose(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of the training, or an exported model.")
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="An image folder with texts [default: the rows that the bridge keeps out]."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=2, help="The most rows to measure [default: all kept out, or 64].")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what a checkpoint's <EOS> carries of an image, and how its embeddings lie."""
    with working() as console:
        require("accelerate", "train")
        silence_libraries()
        from cocoa_embed.cli_reports import report_diagnosis
        from cocoa_embed.train.diagnosis import diagnose as measure

        diagnosis = measure(checkpoint, data=data, rows=rows, device=device)
        report_diagnosis(diagnosis, console)
    if as_json:
        print_json(diagnosis.document())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a training run, finished or not.")],
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", help="Pairs to score the model on, as eval pairs reads them [default: own rows]."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Where the paths of a table of pairs start [default: its folder].")
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="A pairs.json or mmeb.json of eval; may be repeated. Those in RUN/eval are taken."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The page [default: report.html in RUN].")] = None,
    scores: Annotated[bool, typer.Option("--scores/--no-scores", help="Score the model, once it is finished.")] = True,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", min=1, help="About the most tokens to embed at once.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Write a page about a training run: recipe, data, curves, reconstructions, scores. It needs no network."""
    with working() as console:
        require("accelerate", "train")
        silence_libraries()
        from cocoa_embed.train.run_report import Asked, write_run_report

        def say(line: str) -> None:
            console.print(line, soft_wrap=True, markup=False, highlight=False)

        asked = Asked(
            pairs,
            images,
            evaluations or (),
            device,
            scores=scores,
            batch_tokens=batch_tokens,
            progress=console.is_terminal,
            tell=say,
        )
        say(f"wrote {printable(write_run_report(run, asked, out))}")


@contextlib.contextmanager
def working() -> Iterator[Console]:
    """Keep standard output for the result: what anything prints meanwhile goes to standard error."""
    from rich.console import Console

    with contextlib.redirect_stdout(sys.stderr):
        yield Console(stderr=True)


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
    from cocoa_embed.integrations.qdrant import QdrantIndexer

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
    from cocoa_embed.images import load_image
    from cocoa_embed.remote import Fetcher

    return load_image(image, fetcher=Fetcher(allowed_hosts) if allowed_hosts else None)


def image_title(image: str) -> str:
    """Return what a page calls a query's image: its file name, or an address without its data."""
    return "an image" if image.startswith("data:") else image.rstrip("/").rsplit("/", 1)[-1]


def silence_libraries() -> None:
    """Turn off the loading bars, the warnings and the informal messages of other libraries."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="PIL")  # of broken files, which are reported by name
    for name in ("sentence_transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on standard output, in ASCII, so that no terminal's encoding can spoil it."""
    typer.echo(json.dumps(document, indent=2))
