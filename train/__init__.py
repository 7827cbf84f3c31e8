"""The three stages of CoCoA: warm-up, bridge, contrastive."""

from cocoa_embed.cpu_threads import limit_spinning
from cocoa_embed.errors import require

limit_spinning()
require("accelerate", "train")
require("datasets", "train")

from cocoa_embed.train.loop.run_record import StageResult  # noqa: E402 - after the errors that name the extra
from cocoa_embed.train.pipeline import run  # noqa: E402
from cocoa_embed.train.recipe import Recipe  # noqa: E402

__all__ = ["Recipe", "StageResult", "run"]
