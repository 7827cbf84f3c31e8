"""The command line. Results for programs go to standard output as JSON, everything for people to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoa_embed.errors import CocoaError, UsageError, require
from cocoa_embed.evaluation.commands import evaluation

if TYPE_CHECKING:
    from rich.console import Console

    from cocoa_embed.integrations.qdrant import Hit, IndexSummary, QdrantIndexer
    from cocoa_embed.train import StageResult
    from cocoa_embed.train.plan import RunPlan

DEFAULT_INDEX = Path("cocoa-index")
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


@app.command()
def index(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Folders of images, and image files.")],
    model: ModelOption,
    collection: CollectionOption = "images",
    path: PathOption = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images to embed at once.")] = 32,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Embed images and store them in Qdrant. What is stored already is not embedded again."""
    with (
        working() as console,
        open_indexer(model, collection, path, url, api_key, batch_size=batch_size, device=device) as indexer,
    ):
        summary = indexer.index(paths, progress=console.is_terminal)
        report_summary(summary, console)
    if as_json:
        print_json(dataclasses.asdict(summary))
    if summary.failed:
        raise typer.Exit(1)


@app.command()
def search(
    model: ModelOption,
    text: Annotated[str | None, typer.Argument(help="What to look for; always taken as text.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="An image to look for, alone or with the text.")] = None,
    collection: CollectionOption = "images",
    path: PathOption = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The most images to return.")] = 10,
    device: DeviceOption = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a gallery of the images to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the images nearest to a text, to an image, or to both."""
    if not text and image is None:
        raise UsageError("nothing to search for; give a text, --image FILE, or both")
    with working() as console, open_indexer(model, collection, path, url, api_key, device=device) as indexer:
        hits = indexer.search(text, image, limit=limit)
        if html is not None:
            from cocoa_embed.integrations.hits_page import write_hits_page

            title = " + ".join(part for part in (text, image and image.name) if part)
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


@contextlib.contextmanager
def working() -> Iterator[Console]:
    """Keep standard output for the result: what anything prints meanwhile goes to standard error."""
    from rich.console import Console

    with contextlib.redirect_stdout(sys.stderr):
        yield Console(stderr=True)


@contextlib.contextmanager
def open_indexer(
    model: str,
    collection: str,
    path: Path | None,
    url: str | None,
    api_key: str | None,
    batch_size: int = 32,
    device: str | None = None,
) -> Iterator[QdrantIndexer]:
    """Open the collection that the options name, and close it at the end.

    :raises UsageError: If both ``--path`` and ``--url`` are given.
    """
    if path is not None and url is not None:
        raise UsageError("--path and --url were both given; give the one that holds the index")
    silence_libraries()
    require("qdrant_client", "qdrant")
    from cocoa_embed.integrations.qdrant import QdrantIndexer

    with QdrantIndexer(
        model,
        path=(path or DEFAULT_INDEX) if url is None else None,
        url=url,
        api_key=api_key,
        collection=collection,
        batch_size=batch_size,
        device=device,
    ) as indexer:
        yield indexer


def silence_libraries() -> None:
    """Turn off the loading bars and informal messages of other libraries."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("sentence_transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on standard output, in ASCII, so that no terminal's encoding can spoil it."""
    typer.echo(json.dumps(document, indent=2))


def report_stages(results: Sequence[StageResult], console: Console) -> None:
    """Tell people what a training run did, and how long each stage took."""
    for result in results:
        line = f"{result.stage}: {result.steps} steps, {clock(result.seconds)}, loss {result.final['loss']:.3f}"
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    total = clock(sum(result.seconds for result in results))
    console.print(f"{total} in all; checkpoint {results[-1].folder}", soft_wrap=True, markup=False, highlight=False)


def stage_document(result: StageResult) -> dict[str, Any]:
    """Return a stage's result as programs read it."""
    return {
        "stage": result.stage,
        "checkpoint": str(result.folder),
        "steps": result.steps,
        "rows": result.rows,
        "seconds": round(result.seconds, 1),
        "final": result.final,
    }


def report_plan(planned: RunPlan, console: Console) -> None:
    """Tell people what a run would do and cost."""
    lines = [f"{planned.recipe}: {planned.backbone}, {planned.devices} device{'s' * (planned.devices > 1)}"]
    lines += [f"{stage}: finished already" for stage in planned.finished]
    for stage in planned.stages:
        share = stage.trainable_parameters / stage.parameters
        rows = ", ".join(f"{name} {count}" for name, count in stage.rows.items())
        kept = ", ".join(f"{name} {binary_size(held)}" for name, held in stage.memory_bytes.items() if name != "total")
        lines += [
            f"{stage.stage}: writes {stage.folder}",
            f"  parameters  {stage.parameters:,}, of them trained {stage.trainable_parameters:,} ({share:.1%})",
            f"  rows        {sum(stage.rows.values()):,} ({rows})",
            f"  steps       {stage.steps:,} of {stage.batch_size} rows, {stage.rows_at_once} at once on a device",
            f"  tokens      about {stage.tokens_per_step:,.0f} a step",
            f"  memory      about {binary_size(stage.memory_bytes['total'])} a device ({kept})",
            f"  disk        up to three checkpoints of {binary_size(stage.checkpoint_bytes)} while it runs",
            f"  compute     about {stage.flops:.2g} FLOP in all",
        ]
    lines += [f"would be left out: {row['source']}: {row['reason']}" for row in planned.bad_rows]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def binary_size(count: float) -> str:
    """Return a number of bytes as people read it."""
    unit, size = ("GiB", count / 2**30) if count >= 2**30 else ("MiB", count / 2**20)
    return f"{size:.1f} {unit}"


def clock(seconds: float) -> str:
    """Return a duration as people read it: seconds, or hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def report_summary(summary: IndexSummary, console: Console) -> None:
    """Tell people what an indexing run did, naming the files left out."""
    from cocoa_embed.images import printable

    figures = dataclasses.asdict(summary)
    counts = ", ".join(f"{figures[name]} {name}" for name in ("indexed", "unchanged", "updated", "replaced"))
    rate = f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images/s"
    lines = [f"{summary.collection}: {counts}, {len(summary.failed)} left out ({rate})"]
    lines += [f"left out: {printable(failure['path'])}: {failure['reason']}" for failure in summary.failed]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def report_hits(hits: Sequence[Hit], console: Console) -> None:
    """Tell people what a search found, best first."""
    from cocoa_embed.images import printable

    for hit in hits:
        caption = hit.payload.get("caption")
        line = f"{hit.score:.4f}  {printable(hit.path)}" + (f"  {' '.join(caption.split())}" if caption else "")
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if not hits:
        console.print("nothing found")


def hit_document(hit: Hit) -> dict[str, Any]:
    """Return a hit as programs read it, without what is in the payload for LlamaIndex alone."""
    from cocoa_embed.integrations.points import plain_payload

    return {**dataclasses.asdict(hit), "payload": plain_payload(hit.payload)}
