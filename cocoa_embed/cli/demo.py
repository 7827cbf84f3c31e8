"""The command ``demo``. Heavy imports are inside the function, so that ``--help`` is quick."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cocoa_embed.cli.output import JsonOption, print_json, silence_libraries, working
from cocoa_embed.errors import require

DEMO_NEEDS = ("accelerate", "datasets", "qdrant_client", "llama_index.core", "jinja2", "matplotlib")
"""The modules of the optional packages that the demo uses; the extra ``all`` installs them."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder for the exported model.")] = Path("cocoa-qwen2vl"),
    work: Annotated[Path, typer.Option("--work", help="The folder for everything else.")] = Path("cocoa-demo"),
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="The seed of data, initial weights and training.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train, export, index and search a tiny model on this machine, with or without a GPU."""
    with working():
        from cocoa_embed.demo import check_folders

        check_folders(out, work)  # before torch, which takes seconds
        for module in DEMO_NEEDS:
            require(module, "all")
        silence_libraries()
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device is enough; training would ask for a launcher
        from cocoa_embed.demo.story import Demo

        results = Demo(out, work, seed).run()
    if as_json:
        print_json(results)
