"""``python -m cocoa_embed.demo.pretrain``: build a backbone from parts, as a captioner of scenes or photographs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cocoa_embed.cli.main import main
from cocoa_embed.cli.output import silence_libraries, working
from cocoa_embed.errors import require

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def pretrain_backbone(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Settings to change, such as all.steps=2000.")
    ] = None,
    data: Annotated[str, typer.Option(help="scenes, or a folder of images with captions.")] = "scenes",
    held_out: Annotated[Path | None, typer.Option(help="A folder of other images to measure on.")] = None,
    language_model: Annotated[Path | None, typer.Option(help="The folder of a language model to build on.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="A .pt2 program whose features the vision stage learns.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out, if any.")] = False,
) -> None:
    """Build a backbone from parts: assemble a Qwen2-VL and train it as a captioner."""
    with working():
        require("yaml", "train")
        from cocoa_embed.demo.pretrain.settings import read_settings

        given = {"data": data, "held_out": held_out, "language_model": language_model, "teacher": teacher}
        settings = read_settings(overrides or [], **given)
        require("accelerate", "train")
        silence_libraries()
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device is enough
        from cocoa_embed.demo.pretrain.run import pretrain

        pretrain(settings, out, resume=resume)


if __name__ == "__main__":
    main(commands=app, program="python -m cocoa_embed.demo.pretrain")
