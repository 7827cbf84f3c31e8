"""The command ``demo``. Heavy imports are inside the function, so that ``--help`` is quick."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cocoa_embed.cli.output import check_all, silence_libraries, working
from cocoa_embed.data import CaptionChoice
from cocoa_embed.errors import require

DEMO_NEEDS = ("accelerate", "datasets", "qdrant_client", "llama_index.core", "jinja2", "matplotlib")
"""The modules of the optional packages that the demo uses; the extra ``all`` installs them."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder for the exported model.")] = Path("cocoa-qwen2vl"),
    work: Annotated[Path, typer.Option("--work", help="The folder for everything else.")] = Path("cocoa-demo"),
    photos: Annotated[
        Path | None, typer.Option(help="A folder of captioned photographs, instead of drawn scenes.")
    ] = None,
    captions: Annotated[
        CaptionChoice, typer.Option(help="The texts of a photograph to use: all of its captions, or its text.")
    ] = "captions",
    backbone: Annotated[
        str | None, typer.Option(help="The vision-language model to start from [default: the package's captioner].")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, help="The seed of data, initial weights and training.")
    ] = 0,
) -> dict[str, Any]:
    """Train, export, index and search a tiny model on this machine, with or without a GPU."""
    with working():
        from cocoa_embed.demo import check_folders
        from cocoa_embed.demo.photographs import read_photographs
        from cocoa_embed.train.recipe import Recipe

        recipe = "tiny" if photos is None else "photos"
        overrides = ["data.folder=.", *([] if backbone is None else [f"backbone={json.dumps(backbone)}"])]
        check_all(  # before torch, which takes seconds
            partial(check_folders, out, work, photos, backbone),
            partial(Recipe.load, recipe, overrides, check_paths=True),
            *([] if photos is None else [partial(read_photographs, photos, captions)]),
        )
        for module in DEMO_NEEDS:
            require(module, "all")
        silence_libraries()
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one is enough; several need a launcher
        from cocoa_embed.demo.story import Demo

        texts = captions if photos else "text"
        return Demo(out, work, seed, recipe, photos=photos, captions=texts, backbone=backbone).run()
