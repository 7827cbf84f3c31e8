"""The command line. Results for programs go to standard output as JSON, everything for people to standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cocoa_embed import __version__
from cocoa_embed.cli.collection import alias, export_points, filterable, forget, info, list_collections, seed
from cocoa_embed.cli.demo import demo
from cocoa_embed.cli.embed import embed, load
from cocoa_embed.cli.evaluate import mmeb, pairs
from cocoa_embed.cli.index import index
from cocoa_embed.cli.output import as_command
from cocoa_embed.cli.report import diagnose, report
from cocoa_embed.cli.search import search
from cocoa_embed.cli.serve import serve
from cocoa_embed.cli.train import caption, export, train
from cocoa_embed.cpu_threads import limit_spinning
from cocoa_embed.errors import CocoaError

OPTIONAL_VALUES = {"--dry-run": "--dry-run=sample", "--ray": "--ray=local"}
"""Options that may lack a value, which typer does not support, and what they then stand for."""

INTERRUPTED = 130
"""The exit status after Ctrl-C."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ABOUT_INDEXES = (index, search, serve, forget, info, export_points, filterable, alias, seed, embed, load)
ABOUT_MODELS = (demo, caption, train, export, diagnose, report)
for command in ABOUT_INDEXES + ABOUT_MODELS:
    app.command()(as_command(command))
app.command("list")(as_command(list_collections))
evaluation = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
evaluation.command()(as_command(mmeb))
evaluation.command()(as_command(pairs))
app.add_typer(evaluation, name="eval", help="Score a model on MMEB-V1, or on pairs.")


def main(arguments: Sequence[str] | None = None, commands: typer.Typer = app, program: str = "cocoa-embed") -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted. A failure prints one sentence.

    :param arguments: The command-line arguments; those of this process if None.
    :raises SystemExit: Always.
    """
    limit_spinning()
    try:
        words = sys.argv[1:] if arguments is None else arguments
        commands(args=[OPTIONAL_VALUES.get(word, word) for word in words], prog_name=program)
    except CocoaError as error:
        if not error.is_raised_by_all or os.environ.get("RANK", "0") == "0":
            typer.echo(f"cocoa-embed: {error}", err=True)
        raise SystemExit(error.exit_status) from None
    except SystemExit as stopped:
        if stopped.code == INTERRUPTED:  # typer exits like this after Ctrl-C, without a message
            typer.echo("cocoa-embed: interrupted", err=True)
        raise


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"cocoa-embed {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train, export and use CoCoA multimodal embedding models."""
