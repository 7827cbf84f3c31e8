"""The command ``train``."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cocoa_embed.cli.terminal import JsonOption, print_json, silence_libraries, working
from cocoa_embed.errors import require

if TYPE_CHECKING:
    from cocoa_embed.train import Recipe


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Values to change in the recipe.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder for checkpoints [default: runs/ and the recipe's name].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out, if any.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what the run would do and cost, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model by a recipe: warm-up, bridge, contrastive. Each stage writes a checkpoint."""
    is_first = os.environ.get("RANK", "0") == "0"
    with working() as console:
        require("yaml", "train")
        loaded = _load(recipe, overrides or []) if is_first else None  # before torch, which takes seconds
        require("accelerate", "train")
        silence_libraries()
        from cocoa_embed.cli.summaries import report_plan, report_stages, stage_document
        from cocoa_embed.train import run
        from cocoa_embed.train.loop.processes import by_first_process, silence_nonzero_ranks
        from cocoa_embed.train.plan.dry_run import plan

        silence_nonzero_ranks()
        chosen = by_first_process(lambda: loaded or _load(recipe, overrides or []))
        folder = out or Path("runs") / chosen.name
        if dry_run:
            planned = by_first_process(lambda: plan(chosen, folder, resume=resume))
            document = dataclasses.asdict(planned)
            if is_first:
                report_plan(planned, console)
        else:
            results = run(chosen, folder, resume=resume)
            document = {"stages": [stage_document(result) for result in results]}
            if is_first:
                report_stages(results, console)
    if as_json and is_first:
        print_json(document)


def _load(recipe: str, overrides: list[str]) -> Recipe:
    from cocoa_embed.train import Recipe

    return Recipe.load(recipe, overrides, check_paths=True)
