"""The command line. Results for programs go to standard output as JSON, everything for people to standard error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cocoa_embed import __version__
from cocoa_embed.cli.evaluate import evaluation
from cocoa_embed.cli.index import index, search
from cocoa_embed.cli.terminal import DeviceOption, JsonOption, print_json, silence_libraries, working
from cocoa_embed.cli.train import train
from cocoa_embed.errors import CocoaError, printable, require

DEMO_NEEDS = ("accelerate", "datasets", "qdrant_client", "llama_index.core", "jinja2", "matplotlib")
"""The modules of the optional packages that the demo uses; the extra ``all`` installs them."""

app = typer.Typer(
    name="cocoa-embed",
    help="Train, export and use CoCoA multimodal embedding models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(index)
app.command()(search)
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


app.command()(train)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of the training.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the model to write.")],
) -> None:
    """Write a checkpoint as a SentenceTransformer folder, which needs nothing of this package."""
    with working() as console:
        silence_libraries()
        from cocoa_embed.model.export import export_model

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
        from cocoa_embed.cli.summaries import report_diagnosis
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
        from cocoa_embed.train.run_report.content import Asked, write_run_report

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
